"""People's own tasks and rewards, from their files."""

import dataclasses

import pytest

from deltal_jax import train
from deltal_jax.config import Config, TaskConfig, load_config
from deltal_jax.config.tasks import CountDownConfig, MathConfig
from deltal_jax.errors import UserError
from deltal_jax.metrics import load_metrics
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.files import absolute, load_object, load_rewards, pin_files
from deltal_jax.tasks.grading import Reward
from deltal_jax.training.opening import choose_rewards
from deltal_jax.training.run_folder import load_run_config
from deltal_jax.training.setup import check_setup, make_setup
from tests.test_loop import SMALL

SOURCE = '''
import dataclasses
from deltal_jax.tasks.base import Problem, Verdict

def length(prompts, responses, answers):
    """In words."""
    return [float(len(response.split())) for response in responses]

@dataclasses.dataclass(frozen=True)
class Echo:
    name: str = "echo"

    def vocabulary(self):
        return ["a", "b"]

    def problem(self, seed, position):
        return Problem("ab"[position % 2], position)

    held_out = demonstrations = parse_problem = problem

    def verify(self, response, answer):
        right = response == "ab"[answer % 2]
        return Verdict(float(right), right, "")

three = 3
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_task_is_a_class_in_a_file(file):
    task = make_task(load_config("countdown-tiny", {"task.name": f"{file}:Echo"}).task)
    assert (task.name, task.vocabulary()) == ("echo", ["a", "b"])
    assert (problem := task.problem(0, 1)) and task.verify("b", problem.answer).correct
    config = TaskConfig(name="mixture", mixture={"mine.py:Echo": 1.0, "paths": 1.0})
    names = make_task(config).vocabulary()
    assert names is not None
    assert {"a", "b", "a>b"} <= set(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", "mine.py:length() fails: TypeError: length() missing 3 required"),
        ("Verdict", "mine.py:Verdict() fails: TypeError: "),
        ("Half", "mine.py:Half has no held_out; see deltal_jax/tasks/base.py"),
        ("Nameless", "mine.py:Nameless has no name; see deltal_jax/tasks/base.py"),
        ("Loud", "mine.py:Loud() fails: ValueError: two lines"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(file, name, expected):
    more = "class Nameless: ...\nclass Half:\n    name = 'half'\n"
    more += "    def vocabulary(self): ...\n    def problem(self): ...\n"
    more += "class Loud:\n    def __init__(self):\n        raise ValueError('two\\nlines')\n"
    file.write_text(SOURCE + more, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        make_task(TaskConfig(name=f"mine.py:{name}"))
    assert str(refused.value).startswith(f"task.name: {expected}")
    assert "\n" not in str(refused.value)


def test_options_of_a_task_that_does_not_exist_are_refused():
    config = TaskConfig(name="gcd", procedural={"gdc": {"max_value": 9}})
    with pytest.raises(UserError, match=r"^task\.procedural: 'gdc' is not one of .* 'gcd'\?$"):
        make_task(config)
    unused = TaskConfig(name="gcd", procedural={"lcm": {"max_value": 9}})
    with pytest.raises(UserError, match=r"^task\.procedural\.lcm: set task\.name=lcm, or"):
        make_task(unused)


@pytest.mark.parametrize("weight", ["0.5", "+0.5", ".5", "5e-1", "50E-2"])
def test_a_weight_is_written_as_numbers_are(file, weight):
    (reward,) = load_rewards([f"{weight} * mine.py:length"])
    assert not isinstance(reward, str) and reward.weight == 0.5


def test_rewards_are_functions_in_files_with_weights(file):
    task, plain, weighted = load_rewards(["task", f"{file}:length", "-0.5 * mine.py:length"])
    assert task == "task"
    assert not isinstance(plain, str) and not isinstance(weighted, str)
    assert (plain.name, plain.weight, weighted.weight) == ("length", 1.0, -0.5)
    assert plain.fn(["p"], ["a b c"], [None]) == [3.0]
    assert load_rewards(None) == ["task"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tusk", "'tusk' is not task, file.py:function or 0.1 * file.py:function"),
        ("0.5 * task", "'0.5 * task' is not task"),
        ("none.py:length", "no file none.py"),
        ("mine.py:missing", "mine.py has no function or class 'missing'"),
        ("mine.py:three", "mine.py has no function or class 'three'"),
        ("broken.py:length", "broken.py fails: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(file, name, expected):
    file.with_name("broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_rewards([name])
    assert str(refused.value).startswith(f"task.rewards: {expected}")
    assert "\n" not in str(refused.value)


def test_paths_are_whole_in_what_is_saved(file):
    assert absolute("task") == "task"
    assert absolute("mine.py:length") == f"{file}:length"
    assert absolute("0.5*mine.py:length") == f"0.5 * {file}:length"
    config = TaskConfig(name="mine.py:Echo", rewards=("task", "mine.py:length"))
    pinned = pin_files(config)
    assert (pinned.name, pinned.rewards) == (f"{file}:Echo", ("task", f"{file}:length"))
    assert pin_files(pinned) == pinned
    assert pin_files(TaskConfig()) == TaskConfig()
    math = MathConfig(train="a.jsonl", eval=("b.jsonl", "/c.jsonl"), template="t.txt")
    given = pin_files(TaskConfig(math=math, countdown=CountDownConfig(train="a.jsonl")))
    here = file.parent
    assert given.math.template == f"{here}/t.txt"
    assert given.math.train == given.countdown.train == f"{here}/a.jsonl"
    assert (given.math.eval, given.countdown.eval) == ((f"{here}/b.jsonl", "/c.jsonl"), None)
    assert load_object(pinned.name, "task.name")().name == "echo"


def test_a_run_maximises_what_its_config_names_and_resumes_with_it(file, monkeypatch):
    folder = file.parent / "run"
    small = {"sft.steps": 0, "rl.steps": 1, "rl.prompts_per_step": 2, "rl.samples_per_prompt": 2}
    small |= {"rollout.max_response_length": 8, "rollout.slots": 4, "length_buckets": [16]}
    rewards = {"task.rewards": ["task", "0.5 * mine.py:length"]}
    options = SMALL | small | rewards | {"run.dir": str(folder), "evaluate.problems": 4}
    train("countdown-tiny", options | {"run.report": False}, quiet=True)
    assert load_run_config(folder).task.rewards == ("task", f"0.5 * {file}:length")
    monkeypatch.chdir("/")
    train(None, {"run.dir": str(folder), "rl.steps": 2}, resume=True, quiet=True)
    lines = [line for line in load_metrics(folder / "metrics.jsonl") if line["phase"] == "rl"]
    assert len(lines) == 2
    for line in lines:
        whole = line["reward/countdown/mean"] + 0.5 * line["reward/length/mean"]
        assert line["reward/mean"] == pytest.approx(whole, rel=1e-5)
    with pytest.raises(UserError, match=r"^rewards: task\.rewards names some, too"):
        choose_rewards(load_run_config(folder), ["task"])


def test_a_reward_is_not_called_as_the_punishment_is():
    config, reward = Config(), Reward(lambda *_: [], name="overlong")
    assert choose_rewards(config, [reward]) == [reward]
    task = dataclasses.replace(config.task, overlong_buffer=8)
    with pytest.raises(UserError, match=r"^rewards: 'overlong' is the punishment's own name"):
        choose_rewards(dataclasses.replace(config, task=task), [reward])


def test_a_setup_whose_rewards_cannot_be_loaded_is_refused(file):
    config = load_config("countdown-tiny", SMALL | {"task.rewards": ["none.py:length"]})
    with pytest.raises(UserError, match=r"^task\.rewards: no file none\.py$"):
        check_setup(make_setup(config))
