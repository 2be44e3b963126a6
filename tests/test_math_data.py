r"""Files of problems in their published formats, and what is dropped of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.data.rows import open_rows
from deltal_jax.errors import UserError
from deltal_jax.tasks.math.data import Example, read_examples

PROBLEM = "What is $6 \\cdot 7$?"
ORZ = [
    {"from": "human", "value": f" {PROBLEM} "},
    {"from": "assistant", "ground_truth": {"value": "42"}},
]
ORZ_TEST = {"prompt": [{"from": "user", "value": PROBLEM}], "final_answer": "42"}
MATH500 = {
    "problem": PROBLEM,
    "solution": "It is $\\boxed{41}$.",
    "answer": "42",
    "subject": "Algebra",
    "level": 2,
    "unique_id": "test/algebra/7.json",
}
MATH = {"problem": PROBLEM, "solution": "First \\boxed{1}, so $\\boxed{42}$.", "level": "Level 2"}
AIME = {"ID": "2024-I-4", "Problem": PROBLEM, "Solution": "We see …", "Answer": 42}
AMC = {"id": 0, "problem": PROBLEM, "answer": 42.0, "url": "https://example.org"}
MINERVA = {"question": PROBLEM, "answer": ["42", "forty-two"]}
GSM8K = {"question": PROBLEM, "answer": "6*7 = <<6*7=42>>42\n#### 42"}
OURS = {"problem": PROBLEM, "answer": "42", "source": "mine", "id": "a"}
VERL = {
    "data_source": "orz",
    "prompt": [{"role": "user", "content": f"User: {PROBLEM}\nAssistant: <think>"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 5},
}


def read_file(path, field):
    return read_examples(open_rows(path, field), field)


def written(tmp_path, rows, name="rows.json"):
    path = tmp_path / name
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "source", "name"),
    [
        (ORZ, "rows", "0"),
        (ORZ_TEST, "rows", "0"),
        (MATH500, "rows", "test/algebra/7.json"),
        (MATH, "rows", "0"),
        (AIME, "rows", "2024-I-4"),
        (AMC, "rows", "0"),
        (MINERVA, "rows", "0"),
        (GSM8K, "rows", "0"),
        (OURS, "mine", "a"),
    ],
)
@pytest.mark.parametrize("file", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_every_published_format_gives_the_same_problem(tmp_path, row, source, name, file):
    if file == "rows.parquet" and isinstance(row, list):  # a table has no lists for rows
        row = OURS | {"source": source, "id": name}
    examples, dropped = read_file(written(tmp_path, [row], file), "data")
    assert examples == [Example(PROBLEM, "42", source, name)]
    assert not dropped.counts


@pytest.mark.parametrize("file", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_prompts_of_verl_are_used_as_they_are(tmp_path, file):
    whole = f"User: {PROBLEM}\nAssistant: <think>"
    texts = [VERL, VERL | {"prompt": whole}]
    for row in texts[: 1 if file == "rows.parquet" else 2]:
        examples, _ = read_file(written(tmp_path, [row], file), "data")
        messages = (("user", whole),) if row is VERL else ()
        assert examples == [Example(whole, "42", "orz", "5", True, messages)]
    system = {"role": "system", "content": "Think."}
    (found,), _ = read_file(
        written(tmp_path, [VERL | {"prompt": [system, *VERL["prompt"]]}], file), "data"
    )
    assert found.text == f"Think.\n\n{whole}"
    assert found.messages == (("system", "Think."), ("user", whole))


def test_our_own_format_comes_back_as_it_was(tmp_path):
    rows = [ORZ, VERL, OURS, MATH500]
    before, _ = read_file(written(tmp_path, rows), "data")
    path = written(tmp_path, [example.row() for example in before], "again.jsonl")
    assert read_file(path, "data")[0] == before


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1, max_size=40)), min_size=1))
def test_no_problem_is_lost_or_reordered_whatever_its_text(tmp_path_factory, pairs):
    pairs = [(p, a) for p, a in pairs if p.strip() and a.strip() and "####" not in a]
    rows = [{"problem": p, "answer": a} for p, a in pairs]
    path = written(tmp_path_factory.mktemp("data"), [OURS, *rows], "rows.jsonl")
    examples, dropped = read_file(path, "data")
    assert [example.text for example in examples[1:]] == [p.strip() for p, _ in pairs]
    assert [e.id for e in examples] == ["a", *map(str, range(1, len(rows) + 1))]
    assert not dropped.counts or set(dropped.counts) == {"no answer"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (" 42 ", "42"),
        ("$42$", "42"),
        ("$4$ and $2$", "$4$ and $2$"),
        (["x", "y"], "x"),
        ("x #### 1,234", "1234"),
    ],
)
def test_answers_become_text(tmp_path, value, expected):
    path = written(tmp_path, [{"problem": "?", "answer": value}])
    assert read_file(path, "data")[0][0].answer == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "42"}, "no problem"),
        ({"problem": "  ", "answer": "42"}, "no problem"),
        ({"problem": 5, "answer": "42"}, "no problem"),
        ({"problem": "?"}, "no answer"),
        ({"problem": "?", "answer": None}, "no answer"),
        ({"problem": "?", "answer": []}, "no answer"),
        ({"problem": "?", "answer": True}, "no answer"),
        ({"problem": "?", "answer": "$ $"}, "no answer"),
        ({"problem": "?", "solution": "no box"}, "no answer"),
        ({"problem": "?", "answer": "x" * 1001}, "an answer of over 1000 characters"),
        (VERL | {"reward_model": {}}, "no answer"),
        (
            VERL | {"prompt": [{"role": "assistant", "content": "?"}]},
            "a conversation of several turns",
        ),
        (ORZ * 2, "a conversation of several turns"),
        ([{"value": "?"}, {"ground_truth": "42"}], "no answer"),
        ([{"value": ""}, ORZ[1]], "no problem"),
        ({"problem": "a \ud800 b", "answer": "1"}, "text with half a character"),
        ([{"value": "a"}, {"ground_truth": {"value": "\udfff"}}], "text with half a character"),
        ("text", "neither an object nor a conversation"),
        (None, "neither an object nor a conversation"),
    ],
)
def test_rows_that_are_no_problem_are_counted_by_reason_with_the_first(tmp_path, row, reason):
    _, dropped = read_file(written(tmp_path, [OURS, row, OURS, row]), "data")
    assert dropped.counts == {reason: 2}
    assert dropped.first[reason].startswith("row 1: ")
    with pytest.raises(
        UserError, match=rf"^data: .* has no problem with an answer \({reason}: 1\)$"
    ):
        read_file(written(tmp_path, [row]), "data")


def test_a_broken_line_is_dropped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(OURS)}\n{{broken\n\n{json.dumps(GSM8K)}\n", encoding="utf-8")
    examples, dropped = read_file(path, "data")
    assert [example.source for example in examples] == ["mine", "rows"]
    assert dropped.counts == {"not JSON": 1}
    assert dropped.first == {"not JSON": "row 1: '{broken'"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "can't be read"),
        ("rows.txt", b"[]", r"ends neither in \.json, \.jsonl nor \.parquet"),
        ("rows.json", b"[", "is not JSON: .*; JSON lines end in .jsonl"),
        ("rows.json", b"[" * 10_000, "is not JSON"),
        ("rows.json", b"{}", "is no list of problems"),
        ("rows.json", b"[]", "it is empty"),
        ("rows.jsonl", b"", "it is empty"),
        ("rows.jsonl", b"\xff", r"has no problem with an answer \(not JSON: 1\)"),
        ("rows.parquet", b"PAR1", "is not Parquet"),
        ("rows.parquet", b"", "is not Parquet"),
        ("none.parquet", None, "can't be read"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line_with_the_field(
    tmp_path, name, content, message
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^data: .*{message}") as refused:
        read_file(path, "data")
    assert "\n" not in str(refused.value)
