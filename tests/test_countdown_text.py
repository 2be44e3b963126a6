"""CountDown in text, at the paper's size: problems, prompts, demonstrations, files."""

import collections
import itertools
import json
import random
import re

import pytest

from deltal_jax.config import load_config
from deltal_jax.data.prompts import prompt_ids, train_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import files_of
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.countdown.problems import identity
from deltal_jax.tasks.countdown.rules import TURN, find_on_last_line, judge_reference, judge_strict
from deltal_jax.tasks.countdown.text import CountDownRows, CountDownText
from deltal_jax.tasks.countdown.trace import CountDown
from tests.fakes import config_refusal

PAPER = {
    "task.countdown.form": "text",
    "task.countdown.most_numbers": 4,
    "task.countdown.max_number": 100,
    "task.countdown.max_value": 100,
    "task.countdown.grammar": "reference",
}


def made(**options) -> CountDownText:
    config = load_config(
        "countdown-tiny", PAPER | {f"task.countdown.{k}": v for k, v in options.items()}
    )
    task = make_task(config.task)
    assert isinstance(task, CountDownText)
    return task


TASK = made()
PROBLEMS = [TASK.problem(0, position) for position in range(600)]


def known(problem) -> tuple:
    return identity(problem.answer["numbers"], problem.answer["target"])


def test_the_problems_are_of_the_papers_size():
    counts = collections.Counter(len(p.answer["numbers"]) for p in PROBLEMS)
    assert set(counts) == {3, 4}
    assert abs(counts[3] / 600 - 0.5) < 4 * 0.5 / 600**0.5
    for problem in PROBLEMS:
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        assert all(1 <= number <= 100 for number in numbers)
        assert 1 <= target <= 100
        assert target not in numbers
    assert max(max(p.answer["numbers"]) for p in PROBLEMS) == 100
    tens = collections.Counter((p.answer["target"] - 1) // 10 for p in PROBLEMS)
    assert min(tens.values()) > 25, "no part of the targets is rare"


def test_a_problem_depends_on_seed_and_position_alone():
    again = [made().problem(0, position) for position in reversed(range(40))][::-1]
    assert again == PROBLEMS[:40]
    assert TASK.problem(0, 10**9) == TASK.problem(0, 10**9)
    assert [TASK.problem(1, position) for position in range(40)] != again


def test_no_training_problem_or_demonstration_is_held_out():
    held_out = TASK.held_out(200)
    assert held_out == TASK.held_out(250)[:200]
    kept = {known(problem) for problem in held_out}
    assert len(kept) > 190
    assert kept.isdisjoint(map(known, PROBLEMS))
    assert all(TASK.is_held_out(problem) for problem in held_out)
    small = CountDownText(numbers=2, max_number=4, max_value=9)
    kept = {known(problem) for problem in small.held_out(50)}
    assert kept.isdisjoint(known(small.problem(0, position)) for position in range(500))


@pytest.mark.parametrize("operators", ["+-**//", "-"])
def test_every_solution_that_a_problem_is_made_from_is_right_by_both_grammars(operators):
    task = CountDownText(most_numbers=4, max_number=100, max_value=100, operators=operators)
    seen = collections.Counter()
    for problem, (value, text, steps) in itertools.islice(task.problems(random.Random(1)), 150):
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        assert value == target
        seen.update(step.split()[1] for step in steps)
        for judge in (judge_strict, judge_reference):
            assert judge(text, numbers, target).correct
            assert not judge(text, numbers, target + 1).correct
            assert not judge(text, [*numbers[1:], numbers[0] + 1], target).correct
    assert set(seen) == set(operators)


def test_a_prompt_has_the_facts_and_ends_in_the_assistants_thought():
    problem = TASK.parse_problem("7 1 5 -> 40")
    assert problem.answer == {"numbers": [7, 1, 5], "target": 40}
    assert "Reach 40 with the numbers [7, 1, 5]" in problem.prompt
    for fact in ("+ - * /", "exactly once", "<think> </think>", "<answer> (9 - 1) / 4 </answer>"):
        assert fact in problem.prompt
    assert problem.prompt.endswith("<think>")
    assert problem.prompt.count(TURN) == 1, "the reference strips up to the first"
    assert problem.prompt.count("Assistant: ") == 1


@pytest.mark.parametrize(
    "response",
    [
        " 8 * 5 </think>\n<answer> (7 + 1) * 5 </answer>",
        "<answer> (7 + 1) * 5 </answer>",
        "Assistant: <answer> (7 + 1) * 5 </answer> Assistant: so",
        "<answer> (7 + 1) * 5 </answer>\n",
        "",
    ],
)
def test_a_response_is_judged_as_the_transcript_with_its_prompt(response):
    problem = TASK.parse_problem("7 1 5 -> 40")
    found = find_on_last_line(problem.prompt + response)
    verdict = TASK.verify(response, problem.answer)
    if found is None:
        assert (verdict.reward, verdict.reason) == (0.0, "no answer")
    else:
        assert verdict == judge_reference(found, [7, 1, 5], 40)
        assert verdict.correct


def test_the_grammars_differ_where_they_should():
    answer = {"numbers": [1, 5, 2], "target": 3}
    said = "<answer> 1.5 * 2 </answer>"
    assert TASK.verify(said, answer).correct
    assert made(grammar="strict").verify(said, answer).reason == "unexpected '.'"


STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def test_demonstrations_say_nothing_false_and_end_in_an_answer():
    kinds = collections.Counter()
    for prompt, response in itertools.islice(TASK.demonstrations(1), 400):
        numbers = list(map(int, re.search(r"\[([\d, ]+)\]", prompt).group(1).split(", ")))
        target = int(re.search(r"Reach (\d+)", prompt).group(1))
        assert not TASK.is_held_out(TASK.make_problem(numbers, target))
        verdict = TASK.verify(response, {"numbers": numbers, "target": target})
        said, _, answer = response.partition(" </think>\n")
        assert answer == f"<answer> {verdict.answer} </answer>"
        assert verdict.correct or verdict.reason.startswith("gives ")
        value = target
        for line in said.strip().split("\n") if said.strip() else []:
            steps, _, sign = line.strip().rpartition(": ")
            for step in steps.split(", "):
                left, symbol, right, value = STEP.fullmatch(step).groups()
                assert judge_strict(
                    f"{left} {symbol} {right}", [int(left), int(right)], int(value)
                ).correct
            value = int(value)
            expected = "right" if value == target else "too low" if value < target else "too high"
            assert sign == expected
        kinds["right" if verdict.correct else "direct" if not said.strip() else "gave up"] += 1
    assert kinds["right"] > 160
    assert kinds["gave up"] > 40


def test_a_new_models_tokenizer_takes_prompts_and_responses_within_the_papers_length():
    tokenizer = train_tokenizer(TASK)
    for problem in [*PROBLEMS[:50], *TASK.held_out(50)]:
        ids = prompt_ids(problem.prompt, tokenizer)
        assert len(ids) <= 256
        assert tokenizer.decode(ids) == problem.prompt
    assert TASK.vocabulary() is None


def test_traces_may_vary_in_numbers_too():
    task = CountDown(numbers=2, most_numbers=4)
    counts = collections.Counter(len(task.problem(0, n).answer["numbers"]) for n in range(90))
    assert set(counts) == {2, 3, 4}
    for prompt, response in itertools.islice(task.demonstrations(0), 50):
        assert set(f"{prompt} {response}".split()) <= set(task.vocabulary())


ROWS = [{"target": 7 + n, "nums": [n, 5, 2]} for n in range(1, 41)]


def verl(row: dict) -> dict:
    return {
        "data_source": "countdown",
        "prompt": [
            {"role": "user", "content": f"A prompt for {row['target']}. Assistant: <think>"}
        ],
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": {"target": row["target"], "numbers": row["nums"]},
        },
        "extra_info": {"split": "train", "index": 0},
    }


def written(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("form", [lambda row: row, verl], ids=["published", "verl"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_the_first_rows_are_trained_on_and_the_next_are_held_out(tmp_path, name, form):
    path = written(tmp_path / name, [form(row) for row in ROWS])
    task = made(train=path, rows=[30, 6])
    assert [p.answer["target"] for p in task.held_out(100)] == [38, 39, 40, 41, 42, 43]
    assert task.held_out(2) == task.held_out(100)[:2]
    for epoch in (0, 1):
        problems = [task.problem(3, 30 * epoch + at) for at in range(30)]
        assert sorted(p.answer["target"] for p in problems) == list(range(8, 38))
        assert problems != [task.problem(4, 30 * epoch + at) for at in range(30)]
    assert task.problem(3, 0) != task.problem(3, 30) or task.problem(3, 1) != task.problem(3, 31)
    problem = task.problem(3, 5)
    target = problem.answer["target"]
    assert problem.answer["numbers"] == [target - 7, 5, 2]
    if form is verl:
        assert problem.prompt == f"A prompt for {target}. Assistant: <think>"
        assert problem.messages == (("user", problem.prompt),)
    else:
        assert problem == task.parse_problem(f"{target - 7} 5 2 -> {target}")
    assert task.summary == "task: 30 problems to train on, 6 held out"
    assert task.rows() == 30
    assert list(task.fingerprint()) == ["task.countdown.train", "order"]
    assert task.fingerprint() == made(train=path, rows=[30, 6]).fingerprint()
    assert task.verify(f"<answer> {target - 7} + 5 + 2 </answer>", problem.answer).correct


def test_a_file_of_its_own_may_be_held_out_and_is_never_trained_on(tmp_path):
    train = written(tmp_path / "train.jsonl", ROWS)
    shuffled = [{"target": row["target"], "nums": row["nums"][::-1]} for row in ROWS[:3]]
    held_out = written(tmp_path / "test.jsonl", [*shuffled, *ROWS[35:]])
    task = made(train=train, eval=held_out, rows=[30, 4])
    assert len(task.held_out(100)) == 4
    problems = [task.problem(0, at) for at in range(30)]
    assert problems.count(None) == 3
    assert {p.answer["target"] for p in problems if p} == set(range(11, 38))
    assert task.summary == ("task: 27 problems to train on, 4 held out; dropped: 3 also held out")
    shown = itertools.islice(task.demonstrations(0), 20)
    assert all(prompt.endswith("<think>") for prompt, _ in shown)
    assert files_of(task)["countdown"].rows() == 30 and files_of(CountDownText()) == {}
    before = task.fingerprint()
    written(tmp_path / "test.jsonl", [*shuffled, *ROWS[34:]])
    after = made(train=train, eval=held_out, rows=[30, 4]).fingerprint()
    assert set(before) == {"task.countdown.train", "task.countdown.eval", "order"}
    assert {name for name in before if before[name] != after[name]} == {"task.countdown.eval"}


def test_rows_that_are_no_problem_are_dropped_and_said(tmp_path):
    bad = [
        [1, 2],
        {"target": 3},
        {"nums": [1, 2]},
        {"nums": [1], "target": 1},
        {"nums": [1, "2"], "target": 1},
        {"nums": [1, True], "target": 1},
        {"nums": [1, -2], "target": 1},
        {"nums": [1, 2], "target": 1.5},
        {"nums": [1, 2], "target": 3, "prompt": 7},
        {"nums": [1, 2], "target": 3, "prompt": "half a \ud800"},
        {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "42"}},
        {"nums": [1, 2], "target": 3, "prompt": [{"role": "assistant", "content": "a"}]},
    ]
    good = [{"nums": [1.0, 2.0], "target": 3.0}, *ROWS[:4]]
    path = tmp_path / "rows.jsonl"
    written(path, [*bad, *good])
    path.write_text("no\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    task = made(train=str(path), rows=[15, 3])
    assert isinstance(task, CountDownRows)
    found = task.given
    assert found.train.dropped.counts == {
        "not JSON": 1,
        "not an object": 1,
        "not two numbers or more": 2,
        "a number or target that is no whole number from 0 to 999,999,999": 5,
        "a prompt that is no text": 1,
        "text with half a character": 1,
        "no numbers and target": 1,
        "a conversation of several turns": 1,
    }
    assert found.train.dropped.first["not JSON"] == "row 0: 'no'"
    assert task.summary.startswith("task: 2 problems to train on, 3 held out; dropped: 5 a n")
    problems = [task.problem(0, at) for at in range(15)]
    assert {known(p) for p in problems if p} == {((1, 2), 3), ((1, 2, 5), 8)}
    assert problems.count(None) == 13


def test_a_file_that_does_not_do_is_refused_by_name(tmp_path):
    few = written(tmp_path / "few.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"^task.countdown.train: .*few.jsonl has no problem to evaluate on after"
    ):
        made(train=few)
    with pytest.raises(UserError, match=r"^task.countdown.train: .*none.jsonl can't be read"):
        made(train=str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"^task.countdown.eval: .*none.json can't be read"):
        made(train=few, eval=str(tmp_path / "none.json"))
    with pytest.raises(
        UserError, match=r"^task.countdown.train: .* no problem .*\(also held out: 40\)"
    ):
        made(train=few, eval=few)


def test_fields_that_contradict_each_other_are_refused():
    key = "task.countdown."
    for values, expected in [
        ({"numbers": 4, "most_numbers": 3}, "most_numbers: 3 is below task.countdown.numbers=4"),
        ({"grammar": "reference"}, "grammar: is of text; set task.countdown.form=text"),
        ({"train": "a.json"}, "train: is of text; set task.countdown.form=text"),
        ({"rows": [5, 5]}, "rows: is of text; set task.countdown.form=text"),
        (
            {"form": "text", "rows": [5]},
            "rows: give two numbers over 0, such as [32768, 1024], got (5,)",
        ),
        (
            {"form": "text", "eval": "a.json"},
            "eval: set task.countdown.train too, or leave it out",
        ),
    ]:
        assert config_refusal({key + k: v for k, v in values.items()}) == key + expected
