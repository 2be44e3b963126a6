r"""The task Math: problems in a reproducible order, prompts by template, verdicts by workers."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from deltal_jax import train
from deltal_jax.data.prompts import problems_at
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, VerifiesBatches
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.grading import MISSING, Reward, grade
from deltal_jax.tasks.math.task import MAX_RESPONSE, TEMPLATES, Math
from deltal_jax.tasks.workers import Limits
from deltal_jax.training.groups import missing_metrics
from tests.hostile import GOLD, hostile

LIMITS = Limits(timeout=0.5, grace=0.5)
VERIFIERS = ("reference", "math_verify")


def file(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count, start=0):
    return [{"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(start, start + count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("math")
    return file(folder, "train.jsonl", sums(50)), [
        file(folder, "one.jsonl", sums(6, start=47)),
        file(folder, "two.jsonl", sums(4, start=100)),
    ]


@pytest.fixture(scope="module")
def tasks(files):
    made = {name: Math(*files, verifier=name, limits=LIMITS) for name in VERIFIERS}
    yield made
    for task in made.values():
        task.close()


def test_every_problem_comes_once_an_epoch_in_an_order_of_the_seed(tasks):
    task = tasks["reference"]

    def epoch(seed, number):
        """What the file's 50 rows come to, of which 3 are held out."""
        found = [task.problem(seed, 50 * number + n) for n in range(50)]
        return [int(problem.answer["gold"]) for problem in found if problem is not None]

    epochs = [epoch(5, number) for number in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(0, 94, 2))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != epoch(6, 0)
    assert task.problem(5, 10**9) == task.problem(5, 10**9)
    assert task.rows() == 50


def test_no_problem_of_an_evaluation_file_is_trained_on(tasks):
    task = tasks["reference"]
    positions = [n for n in range(50) if task.problem(0, n) is not None]
    trained = {problem.prompt for problem in problems_at(task, 0, positions)}
    assert len(trained) == 47
    held_out = [problem.prompt for problem in task.held_out(100)]
    assert len(held_out) == 10 and trained.isdisjoint(held_out)
    everything = task.held_out(100)
    assert task.held_out(4) == [*everything[:4], *everything[6:]]  # 4 of each data set
    assert [problem.dataset for problem in task.held_out(2)] == ["one", "one", "two", "two"]
    assert task.summary == (
        "task: 47 problems to train on, 10 held out; dropped: 3 also in an evaluation file"
    )


def test_problems_tell_apart_by_where_they_are_from(tasks):
    known = [problem.answer for problem in tasks["reference"].held_out(100)]
    assert known[0] == {"gold": "94", "source": "one", "id": "0"}
    assert len({(answer["source"], answer["id"]) for answer in known}) == 10


def test_templates_have_the_problem_in_its_place(files, tmp_path):
    for name, template in TEMPLATES.items():
        prompt = Math(*files, template=name).held_out(1)[0].prompt
        assert prompt == template.replace("{problem}", "47+47?")
    assert TEMPLATES["user_assistant"].endswith("{problem}\nAssistant: <think>")
    own = tmp_path / "own.txt"
    own.write_text("Q {problem} {braces} A", encoding="utf-8")
    assert Math(*files, template=str(own)).held_out(1)[0].prompt == "Q 47+47? {braces} A"


def test_a_prompt_that_is_whole_has_no_template(files, tmp_path):
    row = {"prompt": "Ask: 1+1?", "data_source": "x", "reward_model": {"ground_truth": "2"}}
    task = Math(file(tmp_path, "verl.jsonl", [row]), files[1], template="user_assistant")
    assert task.problem(0, 0).prompt == "Ask: 1+1?"


def test_a_parquet_file_of_verl_is_trained_on_as_it_is(files, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "data_source": "orz",
            "prompt": [
                {"role": "system", "content": "Think."},
                {"role": "user", "content": f"{n}+{n}?"},
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"split": "train", "index": 1000 + n},
        }
        for n in range(200)
    ]
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    task = Math(str(path), files[1], verifier="reference")
    found = [task.problem(2, position) for position in range(200)]
    numbers = [int(problem.answer["id"]) - 1000 for problem in found if problem is not None]
    assert sorted(numbers) == list(range(200)) != numbers
    for number, problem in zip(numbers, found, strict=True):
        assert problem is not None
        assert problem.prompt == f"Think.\n\n{number}+{number}?"
        assert problem.messages == (("system", "Think."), ("user", f"{number}+{number}?"))
        assert problem.answer["gold"] == str(2 * number)
        assert problem.answer["source"] == "orz"


def test_of_a_large_file_the_first_rows_are_looked_at(files, tmp_path, monkeypatch):
    monkeypatch.setattr("deltal_jax.data.training_rows.LOOKED_AT", 20)
    none = [{"problem": "?"}] * 5
    task = Math(file(tmp_path, "large.jsonl", [*none, *sums(50)]), files[1], verifier="reference")
    assert task.summary == (
        "task: 55 rows to train on, 10 held out; of the first 20 dropped: 5 no answer"
    )
    late = Math(
        file(tmp_path, "late.jsonl", [*none * 6, *sums(50)]), files[1], verifier="reference"
    )
    assert "of the first 31 dropped: 30 no answer" in late.summary
    with pytest.raises(UserError, match=r"^task\.math\.train: .* \(no answer: 30\)$"):
        Math(file(tmp_path, "bad.jsonl", none * 6), files[1], verifier="reference")


def test_a_fingerprint_is_of_the_data_the_template_and_the_order(files, tmp_path):
    first = Math(*files, verifier="reference").fingerprint()
    assert Math(files[0], files[1][::-1], verifier="reference").fingerprint() == first

    def changed(*arguments, **options):
        found = Math(*arguments, verifier="reference", **options).fingerprint()
        return {name for name in first if first[name] != found[name]}

    assert changed(*files, template="plain") == {"task.math.template"}
    assert changed(files[0], files[1][:1]) == {"task.math.eval"}
    longer = file(tmp_path, "longer.jsonl", sums(51))
    assert changed(longer, files[1]) == {"task.math.train"}


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_demonstrations_are_right(tasks, verifier):
    task = tasks[verifier]
    assert task.vocabulary() is None
    stream = task.demonstrations(3)
    found = [task.problem(3, n) for n in range(50)]
    problems = [problem for problem in found if problem is not None]
    pairs = [next(stream) for _ in problems]
    assert [prompt for prompt, _ in pairs] == [problem.prompt for problem in problems]
    verdicts = task.verify_batch(
        [(said, problem.answer) for (_, said), problem in zip(pairs, problems, strict=True)]
    )
    assert all(verdict.correct for verdict in verdicts)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_grading_asks_the_workers_and_keeps_missing_rewards_apart(tasks, verifier):
    task = tasks[verifier]
    assert isinstance(task, VerifiesBatches) and not isinstance(CountDown(), VerifiesBatches)
    said = ["\\boxed{4.0}", "\\boxed{5}", "\\boxed{9^{9^{9^9}}}", "\\boxed{4}"]
    problems = [Problem("2+2?", {"gold": "4"})] * 3 + [task.parse_problem("2+2?")]
    grades = grade(task, problems, said)
    unread = 0.0 if verifier == "reference" else np.nan
    np.testing.assert_array_equal(grades.rewards, np.float32([1, 0, unread, np.nan]))
    np.testing.assert_array_equal(grades.correct, [True, False, False, False])
    assert [verdict.answer for verdict in grades.verdicts] == ["4.0", "5", "9^{9^{9^9}}", ""]
    kinds = [None, None, None if verifier == "reference" else "unparsed", None]
    assert [MISSING[number] for number in grades.missing] == kinds


def test_a_verifier_that_runs_out_of_time_leaves_the_reward_missing(tasks):
    task = tasks["math_verify"]
    slow = "\\boxed{\\int_0^1 x^{x^{x}} dx}"
    known = {"gold": "4"}
    verdicts = task.verify_batch([(slow, known), ("\\boxed{4}", known), (slow, known)])
    assert [(x.reward, x.missing) for x in verdicts] == [
        (None, "timeout"),
        (1.0, None),
        (None, "timeout"),
    ]
    numbers = np.asarray([0, *[MISSING.index(x.missing) for x in verdicts]], np.int8)
    assert missing_metrics(numbers) == {"reward/missing_timeout": 2.0}


def test_what_is_judged_is_the_end_of_a_response(tasks):
    known, filler = {"gold": "4"}, "x" * (MAX_RESPONSE - 9)
    for task in tasks.values():
        verdicts = task.verify_batch(
            [
                ("\\boxed{5} " * 1_000_000 + "\\boxed{4}", known),
                (f"\\boxed{{4}}{filler}", known),
                (f"\\boxed{{4}}{filler}xx", known),
            ]
        )
        assert [x.correct for x in verdicts] == [True, True, False]


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_hostile_responses_execute_nothing_stall_nothing_and_are_never_right(
    tasks, verifier, tmp_path
):
    task, known, canary = tasks[verifier], {"gold": GOLD}, tmp_path / "executed"
    responses = list(hostile(1, 500, canary))
    pairs = [pair for text in responses for pair in ((text, known), (f"\\boxed{{{GOLD}}}", known))]
    verdicts = task.verify_batch(pairs)
    assert all(verdict.reward == 1.0 for verdict in verdicts[1::2])
    assert not any(verdict.correct for verdict in verdicts[::2])
    assert {verdict.reward for verdict in verdicts[::2]} <= {0.0, None}
    for verdict in verdicts:
        assert (verdict.reward is None) is (verdict.missing is not None)
    if verifier == "reference":
        assert all(verdict.reward == 0.0 for verdict in verdicts[::2])
    assert not canary.exists()


def test_any_text_is_a_problem_without_a_known_answer(tasks):
    task = tasks["reference"]
    problem = task.parse_problem(" 1+1? ")
    assert problem.prompt == TEMPLATES["boxed"].replace("{problem}", "1+1?")
    verdict = task.verify("\\boxed{2}", problem.answer)
    assert (verdict.reward, verdict.correct, verdict.reason) == (None, False, "no known answer")
    with pytest.raises(UserError, match=r"^problem: is empty"):
        task.parse_problem(" ")


def test_workers_start_again_after_they_were_closed(files):
    task = Math(*files, verifier="reference")
    for _ in range(2):
        assert task.verify("\\boxed{4}", {"gold": "4"}).correct
        task.close()
        task.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "none.jsonl"}, r"^task\.math\.train: none\.jsonl can't be read"),
        ({"held_out_files": ["none.json"]}, r"^task\.math\.eval: none\.json can't be read"),
        (
            {"template": "nothing"},
            r"^task\.math\.template: 'nothing' is neither one of plain, boxed",
        ),
    ],
)
def test_what_does_not_exist_is_refused_by_field(files, change, message):
    options = {"train": files[0], "held_out_files": files[1]} | change
    with pytest.raises(UserError, match=message):
        Math(**options)


def test_a_template_without_a_place_and_a_training_file_that_is_held_out_are_refused(
    files, tmp_path
):
    bad = tmp_path / "bad.txt"
    bad.write_text("no place", encoding="utf-8")
    with pytest.raises(UserError, match=r"^task\.math\.template: .* lacks \{problem\}"):
        Math(*files, template=str(bad))
    with pytest.raises(UserError, match=r"^task\.math\.train: .*\(also in an evaluation file: "):
        Math(files[1][0], files[1])


def children():
    """Processes that this one has started and not ended."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {child for listed in tasks for child in listed.read_text().split()}


TINY = {
    "sft.steps": 0,
    "rl.steps": 1,
    "rl.prompts_per_step": 2,
    "rl.samples_per_prompt": 2,
    "rl.updates_per_rollout": 1,
    "rollout.slots": 4,
    "rollout.max_response_length": 8,
    "rollout.max_prompt_length": 64,
    "length_buckets": [72],
    "evaluate.every": 0,
    "evaluate.problems": 2,
    "checkpoint.every": 0,
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "run.report": False,
    "task.name": "math",
    "task.math.verifier": "reference",
    "task.math.template": "plain",
}


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_run_leaves_no_worker_behind_however_it_ends(error, files, tmp_path):
    before, during = children(), set()

    def reward(prompts, responses, answers):
        during.update(children() - before)
        if error is not None:
            raise error
        return [0.0] * len(responses)

    data = {"task.math.train": files[0], "task.math.eval": files[1]}
    options = TINY | data | {"run.dir": str(tmp_path / "run")}
    with nullcontext() if error is None else pytest.raises(error):
        train("countdown-tiny", options, rewards=[Reward(reward)], quiet=True)
    assert during and not during & children()
