"""Rows of data files by number, against the plain way to read them."""

import json
import os
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from deltal_jax.data import rows as module
from deltal_jax.data.rows import NotJson, open_rows
from deltal_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

VERL = [
    {
        "data_source": "orz",
        "prompt": [{"role": "user", "content": f"{n} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
        "extra_info": {"index": n, "split": "train"},
    }
    for n in range(300)
]


def plain(text: str) -> list:
    """What a file of JSON lines holds, read as a whole."""
    found = []
    for line in text.split("\n"):
        if line.strip(" \t\r\v\f"):
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append(NotJson(line.strip()))
    return found


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from(
            [
                "",
                " ",
                "\r",
                " \t ",
                '{"a": 1}',
                ' {"b": "é"}',
                "[1]\r",
                "no",
                "7",
                '"' + 40 * "x" + '"',
            ]
        )
    ),
    last=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_lines_are_those_of_the_whole_text_wherever_it_is_cut(tmp_path_factory, lines, last, chunk):
    text = "\n".join(lines) + "\n" * last
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        rows = open_rows(path, "data")
    want = plain(text)
    assert len(rows) == len(want)
    assert [*rows] == want
    assert [type(row) for row in rows] == [type(row) for row in want]
    assert [rows[i] for i in reversed(range(len(want)))] == want[::-1]
    assert rows[-3:] == want[-3:]


def test_a_byte_order_mark_and_bytes_that_are_no_text_cost_no_other_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xff\xfe\n{"a": 2}')
    assert [*open_rows(path, "data")] == [{"a": 1}, "\ufffd\ufffd", {"a": 2}]
    assert isinstance(open_rows(path, "data")[1], NotJson)
    json_file = tmp_path / "a.json"
    json_file.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert [*open_rows(json_file, "data")] == [1, 2]


@pytest.mark.parametrize("group", [7, 64, 1000])
def test_parquet_rows_by_number_whatever_its_row_groups(tmp_path, group):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(VERL), path, row_group_size=group)
    rows = open_rows(path, "data")
    assert len(rows) == 300
    assert [*rows] == VERL
    order = np.random.default_rng(0).permutation(300).tolist()
    assert [rows[i] for i in order] == [VERL[i] for i in order]


def test_parquet_columns_of_categories_are_their_values(tmp_path):
    kinds = pa.array(["a", "b", "a", None]).dictionary_encode()
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"kind": kinds, "n": [1, 2, 3, 4]}), path, row_group_size=3)
    assert [row["kind"] for row in open_rows(path, "data")] == ["a", "b", "a", None]


def test_many_threads_read_the_rows_of_one(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(VERL), path)
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, VERL)))
    for rows in (open_rows(path, "data"), open_rows(lines, "data")):
        wrong = []

        def read(seed: int, rows=rows, wrong=wrong) -> None:
            for i in np.random.default_rng(seed).integers(0, 300, 300).tolist():
                if rows[i] != VERL[i]:
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_files_are_closed_with_their_rows_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "copies").mkdir()
    parquet.write_table(pa.Table.from_pylist(VERL), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in ("a.parquet", "a.jsonl"):
        rows = open_rows(tmp_path / name, "data")
        assert rows[0] is not None
        assert list((tmp_path / "copies").iterdir()) == []
        del rows
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_fingerprint_is_of_every_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n3\n")
    first = open_rows(path, "data").fingerprint
    assert open_rows(path, "data").fingerprint == first
    path.write_text("1\n4\n3\n")
    assert open_rows(path, "data").fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"1", "ends neither in .json, .jsonl nor .parquet"),
        ("a.json", b"{}\n{}", "is not JSON: .*JSON lines end in .jsonl"),
        ("a.json", b"{}", "is no list"),
        ("a.json", b'["\xff"]', "can't be read: .*utf-8"),
        ("a.parquet", b"PAR1 no", "is not Parquet: "),
        ("missing.jsonl", None, "can't be read: .*No such file"),
        ("missing.json", None, "can't be read: .*No such file"),
        ("missing.parquet", None, "can't be read: .*No such file"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_field(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^task\.math\.train: .*{name} {message}") as raised:
        open_rows(tmp_path / name, "task.math.train")
    assert "\n" not in str(raised.value)
