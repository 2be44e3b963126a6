"""Plans of comparisons: what they resolve to, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.compare.plan import load_plan
from deltal_jax.config import load_config, shipped_plans
from deltal_jax.errors import UserError

PLAN = """
experiment: countdown-tiny
set: {rl.steps: 3, evaluate.problems: 4}
seeds: [3, 1]
warmups: 2
methods:
  one: {objective.alpha: 0.5}
  two: {set: {objective.aggregation: token_mean}, seeds: [7, 8, 9]}
controls:
  shuffled: {weights: permuted, of: two, kind: null, expect: as bad as two}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "trial.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_cells_are_whole_pairs_first_and_differ_by_seed_and_method_alone(write):
    plan = load_plan(write(PLAN))
    cells = plan.cells()
    names = ["one/seed-3", "two/seed-7", "shuffled/seed-3", "one/seed-1", "two/seed-8"]
    assert [cell.name for cell in cells] == [*names, "shuffled/seed-1", "two/seed-9"]
    assert [cell.warmup for cell in cells] == [0, 0, 0, 1, 1, 1, 0]
    assert plan.reference == "one"
    shared = {"rl.steps": 3, "evaluate.problems": 4}
    assert cells[0].config == load_config(
        "countdown-tiny", shared | {"objective.alpha": 0.5, "seed": 3}
    )
    assert cells[2].config == load_config("countdown-tiny", shared | {"seed": 3})
    assert [m.control for m in plan.methods] == [False, False, True]
    assert (plan.methods[2].of, plan.methods[2].kind) == ("two", "null")  # YAML reads nothing
    assert [m.permuted for m in plan.methods] == [False, False, True]


def test_a_seed_of_the_plan_starts_from_one_warm_up_for_all_that_have_it(write):
    plan = load_plan(write(PLAN.replace("[7, 8, 9]", "[1, 7]")))
    found = {cell.name: cell.warmup for cell in plan.cells()}
    assert (found["one/seed-3"], found["one/seed-1"]) == (0, 1)
    assert (found["two/seed-1"], found["two/seed-7"]) == (1, 1)


@settings(max_examples=6)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    warmups=st.integers(1, 3),
    steps=st.integers(0, 9),
)
def test_a_plan_written_is_the_plan_read(tmp_path_factory, seeds, warmups, steps):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.yaml").write_text(PLAN)
    given = {"seeds": seeds, "warmups": warmups, "rl.steps": steps, "reference": "two"}
    plan = load_plan(folder / "plan.yaml", given)
    assert all(cell.config.rl.steps == steps for cell in plan.cells())
    (folder / "plan.yaml").write_text(plan.dump())
    assert load_plan(folder / "plan.yaml") == plan


def test_a_plan_may_lie_over_a_base_and_name_an_experiment_beside_it(write):
    write("base: below.yaml\nrl: {steps: 7}", "mine.yaml")
    write("rl: {prompts_per_step: 4}", "below.yaml")
    write("experiment: mine.yaml\nseeds: [0]\nwarmups: 1", "shared.yaml")
    plan = load_plan(write("base: shared.yaml\nseeds: [4]\nmethods: {a: {}}"))
    (cell,) = plan.cells()
    assert (cell.seed, cell.config.rl.steps, cell.config.rl.prompts_per_step) == (4, 7, 4)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("seeds: [3, 1]", "", "seeds: expected different whole numbers such as [0, 1], got None"),
        ("[3, 1]", "[3, 3]", "seeds: expected different whole numbers such as [0, 1], got [3, 3]"),
        ("[7, 8, 9]", "[-1]", "methods.two.seeds: expected different whole numbers such as"),
        ("methods:", "method:", "methods: "),
        ("warmups: 2", "warmup: 2", "plan: 'warmup' is not one of"),
        ("warmups: 2", "warmups: 0", "warmups: sft.steps asks for one; set it to 1 or more"),
        ("warmups: 2", "warmups: x", "warmups: expected a number of them or run folders, got 'x'"),
        ("seeds: [3, 1]", "seeds: [3]\nreference: three", "reference: 'three' is not one of"),
        ("seeds: [3, 1]", "seeds: [3]\nreference: shuffled", "reference: 'shuffled' is not one of"),
        ("  one:", "  shuffled:", "controls.shuffled: a method has that name; choose another"),
        ("  one:", "  a/b:", "methods.a/b: a name is made of letters, digits"),
        ("of: two", "of: nobody", "controls.shuffled.of: 'nobody' is not one of"),
        ("kind: null", "kind: [1]", "controls.shuffled.kind: expected text, got [1]"),
        ("{objective.alpha: 0.5}", "{of: two, set: {}}", "methods.one.of: of controls alone; move"),
        ("{objective.alpha: 0.5}", "{kind: lr}", "methods.one.kind: of controls alone; move one"),
        ("permuted", "same", "controls.shuffled.weights: expected permuted, or nothing"),
        ("{objective.alpha: 0.5}", "{objective.alpha: 9}", "methods.one: objective.alpha: must be"),
        ("{objective.alpha: 0.5}", "5", "methods.one: expected fields by name, got 5"),
        ("{objective.alpha: 0.5}", "{rl.steps: 9}", "methods.one: rl.steps is common to all cells"),
        ("{objective.alpha: 0.5}", "{seed: 9}", "methods.one: seed is common to all cells"),
        ("weights: permuted,", "weights: permuted, rl.steps: 3,", "controls.shuffled.rl.steps: be"),
        ("rl.steps: 3,", "seed: 3,", "set.seed: the plan's seeds take its place; set seeds"),
        ("countdown-tiny", "countdown-tinny", "config: no file 'countdown-tinny'"),
        ("experiment: countdown-tiny", "", "experiment: name a config, such as countdown-tiny"),
    ],
)
def test_what_no_plan_may_say_is_refused_in_one_line_that_names_it(write, before, after, said):
    assert before in PLAN
    with pytest.raises(UserError) as refused:
        load_plan(write(PLAN.replace(before, after)))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_plan_is_no_experiment_and_an_experiment_no_plan(write):
    path = write(PLAN)
    with pytest.raises(UserError, match=f"^config: {path} is a plan; run it with `deltal compare"):
        load_config(path)
    with pytest.raises(UserError, match=r"^config: \S*compare-study-chain.yaml is a plan; run it"):
        load_config("compare-study-chain")
    with pytest.raises(UserError, match=r"^methods: \S*countdown-tiny.yaml names none; `deltal tr"):
        load_plan("countdown-tiny")


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_loads_and_says_what_it_needs_and_what_to_expect(name):
    plan = load_plan(name)
    assert plan.name == name and plan.cells()
    header = [x for x in shipped_plans()[name].read_text().split("\n") if x[:1] == "#"]
    assert any("Needs:" in line for line in header)
    assert any("Expect:" in line for line in header)
