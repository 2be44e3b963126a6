"""`deltal prepare`: a published file becomes ours, and what was dropped is said."""

import json

import pytest

from deltal_jax.cli.main import main
from deltal_jax.tasks.countdown import data as countdown_data
from tests.test_math_data import AMC, GSM8K, ORZ, VERL, read_file, written


def prepared(capsys, *arguments):
    code = main(["prepare", *map(str, arguments)])
    return code, capsys.readouterr()


def test_a_file_is_converted_and_its_problems_are_those_of_the_source(tmp_path, capsys):
    source, target = written(tmp_path, [ORZ, GSM8K, AMC, VERL]), tmp_path / "ours.jsonl"
    code, said = prepared(capsys, "mine", "--from", source, "--to", target)
    assert (code, said.out) == (0, f"{target}: 4 problems, 0 rows dropped\n")
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [sorted(row) for row in rows[:3]] == [["answer", "id", "problem", "source"]] * 3
    assert sorted(rows[3]) == ["answer", "id", "prompt", "source"]
    assert {row["source"] for row in rows} == {"mine"}
    before, after = read_file(source, "--from")[0], read_file(target, "--to")[0]
    assert [(x.text, x.answer, x.complete, x.id) for x in after] == [
        (x.text, x.answer, x.complete, x.id) for x in before
    ]


def test_what_was_dropped_is_counted_by_reason_with_the_first(tmp_path, capsys):
    rows = [ORZ, {"problem": "a"}, {"problem": "b"}, {"answer": "1"}]
    source, target = written(tmp_path, rows), tmp_path / "ours.jsonl"
    code, said = prepared(capsys, "mine", "--from", source, "--to", target)
    lines = said.out.splitlines()
    assert (code, lines[0]) == (0, f"{target}: 1 problems, 3 rows dropped")
    assert [line.split() for line in lines[1::2]] == [["2", "no", "answer"], ["1", "no", "problem"]]
    assert lines[2].strip() == "first row 1: {'problem': 'a'}"
    assert lines[4].strip() == "first row 3: {'answer': '1'}"
    target.unlink()
    code, said = prepared(capsys, "mine", "--from", source, "--to", target, "--json")
    assert json.loads(said.out) == {
        "problems": 1,
        "dropped": {"no answer": 2, "no problem": 1},
        "first": {
            "no answer": "row 1: {'problem': 'a'}",
            "no problem": "row 3: {'answer': '1'}",
        },
    }


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none.json", "ours.jsonl", "--from: "),
        ("bad.json", "ours.jsonl", "--from: "),
        ("empty.json", "ours.jsonl", "--from: "),
        ("good.json", "ours.json", "--to: "),
        ("good.json", "there.jsonl", "--to: "),
        ("good.json", "no/folder/ours.jsonl", "--to: "),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, source, target, message):
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    (tmp_path / "empty.json").write_text("[7]", encoding="utf-8")
    (tmp_path / "there.jsonl").write_text("kept", encoding="utf-8")
    written(tmp_path, [ORZ], "good.json")
    code, said = prepared(capsys, "x", "--from", tmp_path / source, "--to", tmp_path / target)
    assert code == 2
    assert said.err.startswith(f"deltal: {message}") and said.err.count("\n") == 1
    assert (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "kept"
    assert len(list(tmp_path.iterdir())) == 4  # no part of a file stays


def test_countdown_is_converted_and_read_as_the_source_is(tmp_path, capsys):
    rows = [
        {"target": 40, "nums": [7, 1, 5]},
        {
            "data_source": "countdown",
            "prompt": [{"role": "user", "content": "Reach 13"}],
            "reward_model": {"ground_truth": {"target": 13, "numbers": [7, 1, 5]}},
        },
        {"target": 40},
    ]
    source, target = written(tmp_path, rows), tmp_path / "ours.jsonl"
    options = ("mine", "--task", "countdown", "--from", source, "--to", target)
    code, said = prepared(capsys, *options)
    assert (code, said.out.splitlines()[0]) == (0, f"{target}: 2 problems, 1 rows dropped")
    assert said.out.split()[-4:] == ["row", "2:", "{'target':", "40}"]
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row.pop("source") for row in found] == ["mine", "mine"]
    assert found == [rows[0], {"target": 13, "nums": [7, 1, 5], "prompt": rows[1]["prompt"]}]
    assert list(map(countdown_data.make_example, found)) == [
        countdown_data.make_example(row) for row in rows[:2]
    ]
