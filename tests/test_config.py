"""Configs: what is read, what is refused and in which words, and that every field is used."""

import ast
import dataclasses
import inspect
import itertools
import math
import re
import textwrap
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltal_jax
from deltal_jax import config as module
from deltal_jax.config import (
    SCOPED,
    Config,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    config_folder,
    describe_fields,
    dump_config,
    find_config,
    load_config,
    parse_overrides,
)
from deltal_jax.errors import UserError
from deltal_jax.model.transformer import Architecture
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.names import FOREIGN_NAMES
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.training.objective import SURROGATE_OPTIONS

SHIPPED = sorted(config_folder().rglob("*.yaml"))
TINY = "countdown-tiny"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "trial.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(**overrides) -> str:
    """The message on `countdown-tiny` with overrides, whose dots are written as `__`."""
    return message({key.replace("__", "."): value for key, value in overrides.items()})


def message(overrides: dict) -> str:
    with pytest.raises(UserError) as refused:
        load_config(TINY, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_empty_file_gives_the_defaults_and_its_own_name(write):
    for text in ("", "# nothing\n", "{}", "null"):
        config = load_config(write(text))
        assert config.run.name == "trial"
        assert dataclasses.replace(config, run=Config().run) == Config()


def test_yaml_values_and_overrides_reach_their_fields(write):
    path = write("seed: 3\nlength_buckets: [64, 300]\nrl:\n  steps: 7\n  optimizer: {b2: 0.5}\n")
    config = load_config(path, {"rl.steps": 9, "sft.optimizer.b1": 0.25, "run.dir": "here"})
    assert (config.seed, config.length_buckets, config.rl.steps) == (3, (64, 300), 9)
    assert (config.rl.optimizer.b2, config.sft.optimizer.b1) == (0.5, 0.25)
    assert config.sft.optimizer.b2 == OptimizerConfig().b2
    assert config.run.dir == "here"


def test_a_name_in_the_file_wins_over_the_files_name(write):
    assert load_config(write("run: {name: mine}")).run.name == "mine"
    assert load_config(write("run: {name: mine}"), {"run.name": "typed"}).run.name == "typed"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("1e-6", 1e-6),
        ("1.e-3", 1e-3),
        ("2.5e-5", 2.5e-5),
        ("1e+0", 1.0),
        ("3.0e-4", 3e-4),
        ("0.001", 0.001),
        ("1", 1.0),
    ],
)
def test_numbers_are_read_in_every_usual_notation(write, text, value):
    for config in (
        load_config(write(f"rl:\n  optimizer:\n    learning_rate: {text}\n")),
        load_config(TINY, parse_overrides([f"rl.optimizer.learning_rate={text}"])),
    ):
        rate = config.rl.optimizer.learning_rate
        assert rate == value
        assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("rl.steps=10", {"rl.steps": 10}),
        ("rollout.temperature=0.5", {"rollout.temperature": 0.5}),
        ("rl.optimizer.learning_rate=-1e-3", {"rl.optimizer.learning_rate": -1e-3}),
        ("run.report=false", {"run.report": False}),
        ("objective.dual_clip=null", {"objective.dual_clip": None}),
        ("run.dir=runs/a=b", {"run.dir": "runs/a=b"}),
        ("length_buckets=[32, 64]", {"length_buckets": [32, 64]}),
        ("objective.scope=group", {"objective.scope": "group"}),
        ("run.name='3'", {"run.name": "3"}),
        ("run.dir=", {"run.dir": None}),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(item, expected):
    assert parse_overrides([item]) == expected


def test_the_last_of_repeated_overrides_wins():
    assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("item", ["rl.steps", "=3", "", "--steps"])
def test_what_is_no_override_is_refused_with_the_form(item):
    with pytest.raises(UserError, match=r"expected key.sub=value, such as rl.steps=10$") as refused:
        parse_overrides([item])
    assert repr(item) in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[1, 2", "{a", "'open", "{a: 1, a: 2}", "@x", "!!python/name:os.system", "a: b: c"]
)
def test_an_override_that_is_not_yaml_is_refused_by_field(text):
    with pytest.raises(UserError) as refused:
        parse_overrides([f"rl.steps={text}"])
    assert str(refused.value) == f"rl.steps: {text!r} is not valid YAML"


@pytest.mark.parametrize("text", ["2024-13-45", "9" * 5000, "2024-01-01T99:00:00"])
def test_a_value_that_yaml_cannot_construct_is_refused_by_field(text):
    with pytest.raises(UserError, match=r"^run.name: "):
        load_config(TINY, parse_overrides([f"run.name={text}"]))


def test_a_value_that_yaml_cannot_construct_is_refused_in_a_file_too(write):
    with pytest.raises(UserError, match=r"trial\.yaml"):
        load_config(write("run: {name: 2024-13-45}"))


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("rl.step", "; did you mean rl.steps?"),
        ("rl.stpes", "; did you mean rl.steps?"),
        ("objective.clip_hi", "; did you mean objective.clip_high?"),
        ("sft.optimizer.weight_deacy", "; did you mean sft.optimizer.weight_decay?"),
        ("objectiv.alpha", "; did you mean objective?"),
        ("alpha", "; did you mean lora.alpha or objective.alpha?"),
        ("rl.temperature", "; did you mean rollout.temperature or evaluate.temperature?"),
        ("rl.learning_rate", "did you mean sft.optimizer.learning_rate or rl.optimizer."),
        ("task.zzz", "; the fields here are name, numbers, max_number, max_value"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_one(key, suggestion):
    said = message({key: 1})
    unknown = key.split(".")[0] if key.startswith("objectiv.") else key
    assert said.startswith(f"{unknown}: no such field")
    assert suggestion in said


def test_an_unknown_field_in_a_file_is_refused_like_an_override(write):
    with pytest.raises(UserError, match=r"^rl.step: no such field; did you mean rl.steps\?$"):
        load_config(write("rl: {step: 3}"))
    with pytest.raises(UserError, match=r"^5: no such field; the fields here are run, seed,"):
        load_config(write("5: 3"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rl.steps", "ten", "rl.steps: expected int, got 'ten'"),
        ("rl.steps", 1.5, "rl.steps: expected int, got 1.5"),
        ("rl.steps", True, "rl.steps: expected int, got True"),
        ("rl.steps", None, "rl.steps: expected int, got None"),
        ("rl.steps", [1], "rl.steps: expected int, got [1]"),
        ("objective.alpha", "1", "objective.alpha: expected float, got '1'"),
        ("objective.alpha", False, "objective.alpha: expected float, got False"),
        ("objective.dual_clip", "x", "objective.dual_clip: expected float, got 'x'"),
        ("model.tied_embeddings", 1, "model.tied_embeddings: expected true|false, got 1"),
        ("model.tied_embeddings", "yes!", "model.tied_embeddings: expected true|false, got 'yes!'"),
        ("run.name", 5, "run.name: expected text, got 5"),
        ("run.dir", 5, "run.dir: expected text, got 5"),
        ("run.name", "two\nlines", None),
        ("length_buckets", 64, "length_buckets: expected a list such as [32, 64], got 64"),
        ("length_buckets", [], "length_buckets: expected a list such as [32, 64], got []"),
        ("length_buckets", [32, "x"], "length_buckets[1]: expected int, got 'x'"),
        ("length_buckets", [32, 2.5], "length_buckets[1]: expected int, got 2.5"),
        ("rl", 5, "rl: expected a section of fields, got 5"),
        ("rl.optimizer", "adam", "rl.optimizer: expected a section of fields, got 'adam'"),
        ("seed.x", 5, "seed.x: seed is a value, not a section"),
        ("rl.steps.x", 5, "rl.steps.x: steps is a value, not a section"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_and_the_value(key, value, expected):
    if expected is None:
        assert load_config(TINY, {key: value}).run.name == value
    else:
        assert message({key: value}) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "objective.aggregation",
            "deltal",
            "'deltal' is not one of delta_l, sequence_mean, token_mean, constant_length, "
            "prompt_mean, token_sum, sequence_sum, local_token_mean, balanced, inverse_variance; "
            "did you mean 'delta_l'?",
        ),
        (
            "objective.scope",
            "everything",
            "'everything' is not one of batch, minibatch, group",
        ),
        (
            "objective.surrogate",
            "clip",
            "'clip' is not one of clipped, reinforce, gspo, gspo_token, cispo, gmpo, sapo, dppo; "
            "did you mean 'clipped'?",
        ),
        ("rl.optimizer.schedule", ["x"], "['x'] is not one of constant, cosine"),
        ("task.name", None, "None is not one of countdown"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_choices(key, value, expected):
    assert message({key: value}) == f"{key}: {expected}"


def leaves() -> list[tuple[str, dataclasses.Field, type]]:
    """(dotted name, field, type) of every field."""

    def walk(kind: type, prefix: str):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from walk(hints[field.name], f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, field, hints[field.name]

    return list(walk(Config, ""))


def bounded(side: str) -> list:
    return [
        pytest.param(name, field.metadata[side], hint, id=f"{name}-{side}")
        for name, field, hint in leaves()
        if field.metadata[side] is not None
    ]


@pytest.mark.parametrize(("name", "low", "hint"), bounded("low"))
def test_a_value_below_its_bound_is_refused_with_the_bound(name, low, hint):
    below = low - 1 if isinstance(low, int) else low - 1e-3
    below = [int(below)] if hint == tuple[int, ...] | None else below
    shown = below[0] if isinstance(below, list) else below
    assert message({name: below}) == f"{name}: must be at least {low}, got {shown}"


@pytest.mark.parametrize(("name", "high", "hint"), bounded("high"))
def test_a_value_above_its_bound_is_refused_with_the_bound(name, high, hint):
    above = high + 1 if isinstance(high, int) else high + 1e-3
    assert message({name: above}) == f"{name}: must be at most {high}, got {above}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [n for n, _, hint in leaves() if hint in (float, float | None)])
def test_a_float_that_is_not_finite_is_refused(name, value):
    assert message({name: value}) == f"{name}: must be finite, got {value}"


def test_a_number_beyond_floating_point_is_refused_by_field():
    assert refusal(model__rope_theta=10**400).startswith("model.rope_theta: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"model.heads": 4, "model.kv_heads": 3},
            "model.kv_heads: 3 does not divide model.heads=4",
        ),
        ({"model.head_dim": 3}, "model.head_dim: 3 is not an even number"),
        ({"model.head_dim": None, "model.heads": 3}, "model.head_dim: 21.3333 is not an even"),
        ({"model.head_dim": None, "model.d_model": 12}, "model.head_dim: 3 is not an even number"),
        ({"length_buckets": [64, 32, 200]}, "length_buckets: must increase"),
        ({"length_buckets": [64, 64, 200]}, "length_buckets: must increase"),
        (
            {"rl.updates_per_rollout": 3},
            "rl.updates_per_rollout: 3 does not divide rl.prompts_per_step=16",
        ),
        (
            {"rollout.max_response_length": 193},
            "length_buckets: the last is 200, but prompt and response may take "
            "rollout.max_prompt_length + rollout.max_response_length = 201 tokens",
        ),
        ({"rl.samples_per_prompt": 1}, "rl.samples_per_prompt: a group of 1 has no spread"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, expected):
    assert message(overrides).startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.heads": 4, "model.kv_heads": 2},
        {"model.head_dim": None, "model.d_model": 12, "model.heads": 3},
        {"length_buckets": [200]},
        {"rl.updates_per_rollout": 16},
        {"rl.samples_per_prompt": 2},
    ],
)
def test_fields_that_agree_at_the_edge_are_accepted(overrides):
    load_config(TINY, overrides)


def test_given_numbers_that_the_vocabulary_lacks_are_refused_before_a_run_starts():
    """Over max_value a number has no token, and two of them may have no legal operation at all."""
    said = message({"task.max_number": 61})
    assert "task.max_number" in said
    assert "task.max_value" in said
    load_config(TINY, {"task.max_number": 60})


def test_a_null_section_is_an_empty_one_also_under_an_override(write):
    path = write("rl:\nsft: null\n")
    assert load_config(path).rl == Config().rl
    assert load_config(path, {"rl.steps": 3}).rl.steps == 3


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: 1\nseed: 2\n", "seed"),
        ("rl: {steps: 1, steps: 2}\n", "steps"),
        ("rl:\n  steps: 1\nrl:\n  steps: 2\n", "rl"),
    ],
)
def test_a_repeated_key_is_refused_by_name(write, text, key):
    with pytest.raises(UserError, match=rf"trial.yaml: not valid YAML: key '{key}' appears twice$"):
        load_config(write(text))


@pytest.mark.parametrize(
    "text", ["seed: [1", "\tseed: 1", "seed: 1: 2", "!!python/object/apply:os.getcwd []", "\x00"]
)
def test_a_file_that_is_not_yaml_is_refused_in_one_line(write, text):
    path = write(text)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: not valid YAML: ")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(UserError, match=r"trial.yaml: not valid YAML: .*utf-8"):
        load_config(path)


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("just words", "str"), ("3", "int")])
def test_a_file_that_is_no_mapping_is_refused(write, text, kind):
    with pytest.raises(UserError, match=f"expected a mapping of sections, got {kind}$"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("countdown-tinny", "; did you mean 'countdown-tiny'?"),
        ("countdown", "; did you mean 'countdown-tiny'?"),
        ("zzzzzz", "; `deltal configs` lists them"),
        ("", "; `deltal configs` lists them"),
        ("q" * 300, "; `deltal configs` lists them"),
    ],
)
def test_an_unknown_config_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(UserError) as refused:
        load_config(name)
    assert str(refused.value).startswith(f"config: no file {name!r} and no config of that name")
    assert nearest in str(refused.value)


def test_a_config_is_found_by_name_with_or_without_its_suffix_or_by_path():
    by_name = load_config(TINY)
    assert load_config(f"{TINY}.yaml") == by_name
    assert load_config(config_folder() / f"{TINY}.yaml") == by_name
    assert find_config(TINY) == config_folder() / f"{TINY}.yaml"


def test_a_file_wins_over_a_shipped_config_of_the_same_name(write, monkeypatch):
    path = write("seed: 99", TINY)
    monkeypatch.chdir(path.parent)
    assert load_config(TINY).seed == 99


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_says_what_it_needs_and_what_to_expect(path):
    config = load_config(path)
    name = path.relative_to(config_folder()).with_suffix("").as_posix()
    assert load_config(name) == config
    header = [line for line in path.read_text(encoding="utf-8").split("\n") if line[:1] == "#"]
    assert any("Needs:" in line for line in header)
    assert any("Expect:" in line for line in header)


def test_some_config_is_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_dumped_shipped_config_loads_to_an_equal_one(path, write):
    config = load_config(path, {"run.dir": "runs/ä: #1"})
    assert load_config(write(dump_config(config))) == config


def values(hint: type, field: dataclasses.Field) -> st.SearchStrategy:
    """Every value that the field's type and bounds allow."""
    low, high = field.metadata["low"], field.metadata["high"]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(args)
    if type(None) in args:
        return st.none() | values(next(a for a in args if a is not type(None)), field)
    if args and typing.get_origin(args[0]) is typing.Literal:
        choices = st.sampled_from(typing.get_args(args[0]))
        return st.lists(choices, min_size=1, max_size=4).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        str: st.text(max_size=30),
        tuple[int, ...]: st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(tuple),
        tuple[float, ...]: st.lists(st.floats(-1, 1), min_size=1, max_size=4).map(tuple),
    }[hint]


def configs(kind: type = Config) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    fields = {
        f.name: configs(hints[f.name])
        if dataclasses.is_dataclass(hints[f.name])
        else values(hints[f.name], f)
        for f in dataclasses.fields(kind)
    }
    return st.builds(kind, **fields)


@given(configs())
def test_any_config_survives_dump_and_parse(config):
    """Parsed without the rules across fields, which random values would break."""
    tree = module.yaml.load(dump_config(config), module._Loader)
    assert module._build(Config, tree, "") == config


@pytest.mark.parametrize("name", ["3e-4", "1e5", "-2e3", "007", "null", "yes", "1.5", "2024-01-02"])
def test_a_name_that_looks_like_another_type_survives_dump_and_load(name, write):
    config = load_config(write("seed: 1", f"{name}.yaml"))
    assert config.run.name == name
    assert load_config(write(dump_config(config))) == config


def test_described_fields_are_those_of_the_config_with_their_defaults_and_a_help_each():
    rows = {name: (kind, default, help_) for name, kind, default, help_ in describe_fields()}
    assert list(rows) == [name for name, *_ in leaves()]
    assert rows["rl.steps"][:2] == ("int", 100)
    assert rows["run.dir"][:2] == ("text or null", None)
    assert rows["objective.scope"][:2] == ("batch|minibatch|group", "batch")
    assert rows["length_buckets"][:2] == ("list of int or null", None)
    assert rows["objective.rho"][:2] == ("list of float or null", None)
    assert rows["model.remat"][:2] == ("true|false", False)
    assert all(help_.strip() for _, _, help_ in rows.values())
    assert len(rows) <= 120


def test_defaults_are_a_config_that_loads(write):
    assert dataclasses.replace(load_config(write("")), run=Config().run) == Config()


CONFIGS = {
    kind.__name__: kind
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}
#: Attributes that hold one of these wherever they occur.
HOLDERS = {"config": Config, "arch": Architecture, "architecture": Architecture}


class Readers(ast.NodeVisitor):
    """Collects (class, field) of every attribute read from something known to be a config.

    Known are parameters annotated so, attributes called `config`, names assigned from either, and
    the name `config` where nothing says what it is.
    """

    def __init__(self) -> None:
        self.read: set[tuple[type, str]] = set()
        self.known: dict[str, type | None] = {}

    def kind(self, node: ast.expr) -> type | None:
        """The config class of an expression, None for anything else."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id) or (Config if node.id == "config" else None)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return {"load_config": Config, "make_architecture": Architecture}.get(node.func.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.kind(node.value)
        if owner is not None:
            hint = typing.get_type_hints(owner).get(node.attr)
            return hint if hint in CONFIGS.values() else None
        return HOLDERS.get(node.attr)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            self.read.add((owner, node.attr))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            sources = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, source in zip(names, sources, strict=False):
                if isinstance(name, ast.Name):
                    self.known[name.id] = self.kind(source)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.known = self.known, dict(self.known)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            named = {**CONFIGS, "Architecture": Architecture}.get(annotation)
            self.known[argument.arg] = named
        self.generic_visit(node)
        self.known = outer

    def visit_property(self, kind: type, name: str) -> None:
        """The body of a config's property, whose `self` is that config."""
        source = textwrap.dedent(inspect.getsource(getattr(kind, name).fget))
        self.known["self"] = kind
        for statement in ast.parse(source).body[0].body:
            self.visit(statement)


def fields_read() -> set[tuple[type, str]]:
    """(class, field) of every config field that the package reads.

    The model's are read as those of the Architecture that they are copied into by name, and a
    property is read for the fields that it is made of. The surrogates' options are read in a loop
    over their names, which tests/test_objective.py checks one by one.
    """
    reading = {(ObjectiveConfig, name) for name in SURROGATE_OPTIONS}
    for path in Path(deltal_jax.__file__).parent.rglob("*.py"):
        if path.name != "config.py":
            readers = Readers()
            readers.visit(ast.parse(path.read_text(encoding="utf-8")))
            reading |= readers.read
    for kind, name in sorted(reading, key=str):
        if isinstance(getattr(kind, name, None), property):
            readers = Readers()
            readers.visit_property(kind, name)
            reading |= readers.read
    if (Config, "model") in reading:
        reading |= {(module.ModelConfig, name) for kind, name in reading if kind is Architecture}
    return reading


def test_every_field_is_read_somewhere_in_the_package():
    reading, unread = fields_read(), []

    def walk(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if (kind, field.name) not in reading:
                unread.append(prefix + field.name)
            if dataclasses.is_dataclass(hints[field.name]):
                walk(hints[field.name], f"{prefix}{field.name}.")

    walk(Config, "")
    assert not unread, f"no attribute access reads {', '.join(unread)}"


def test_the_search_for_readers_knows_a_config_from_a_namesake():
    readers = Readers()
    readers.visit(
        ast.parse(
            "def f(config: Config, run: Other, arch: Architecture):\n"
            "    o, rl = config.objective, config.rl\n"
            "    run.tensorboard, rl.steps, o.alpha, arch.layers\n"
            "    def g(rl): return rl.epochs_per_rollout, self.setup.config.evaluate.rows\n"
            "    task = make(config); task.name\n"
        )
    )
    read = {(kind.__name__, name) for kind, name in readers.read}
    assert read == {
        ("Config", "objective"),
        ("Config", "rl"),
        ("RlConfig", "steps"),
        ("ObjectiveConfig", "alpha"),
        ("Architecture", "layers"),
        ("Config", "evaluate"),
        ("EvaluateConfig", "rows"),
    }
    of_property = Readers()
    of_property.visit_property(module.RlConfig, "updates")
    names = {"steps", "updates_per_rollout", "epochs_per_rollout"}
    assert of_property.read == {(module.RlConfig, name) for name in names}


def test_every_error_is_one_line_that_starts_with_the_field():
    for name, _, hint in leaves():
        if hint is not str and hint != str | None:
            said = message({name: "not this"})
            assert re.match(rf"{re.escape(name)}: ", said), said


#: Field of the objective → the functions that it chooses among.
TABLES = {
    "aggregation": AGGREGATIONS,
    "auxiliary_aggregation": AGGREGATIONS,
    "advantage": ADVANTAGES,
    "surrogate": SURROGATES,
    "importance_correction": CORRECTIONS,
}


@pytest.mark.parametrize(("field", "table"), TABLES.items(), ids=list(TABLES))
def test_the_choices_of_the_objective_are_the_functions_that_there_are(field, table):
    choices = typing.get_args(typing.get_type_hints(ObjectiveConfig)[field])
    assert sorted(choices) == sorted(table)
    for name in choices:
        options = {"objective.rho": [0.2], "objective.old_logprobs": "recompute"}
        config = load_config(TINY, options | {f"objective.{field}": name})
        assert getattr(config.objective, field) == name


def test_every_divergence_but_k1_may_be_a_loss():
    choices = typing.get_args(typing.get_type_hints(ObjectiveConfig)["kl_estimator"])
    assert set(choices) == set(DIVERGENCES) - {"kl_k1"}


@pytest.mark.parametrize(
    ("field", "theirs", "ours"),
    [
        (field, theirs, ours)
        for theirs, meanings in sorted(FOREIGN_NAMES.items())
        for ours in meanings
        for field, table in (TABLES | {"kl_estimator": set(DIVERGENCES) - {"kl_k1"}}).items()
        if ours in table and field != "auxiliary_aggregation"
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(field, theirs, ours):
    said = message({f"objective.{field}": theirs})
    assert said.startswith(f"objective.{field}: {theirs!r} is not one of ")
    assert said.endswith(f"; its name here is {ours!r}")


SCOPELESS = ["balanced", "local_token_mean", "prompt_mean", "token_sum"]


def test_aggregations_are_those_with_a_scope_to_choose_and_those_without():
    assert sorted([*SCOPED, *SCOPELESS]) == sorted(AGGREGATIONS)


@pytest.mark.parametrize("scope", ["minibatch", "group"])
@pytest.mark.parametrize("name", SCOPELESS)
def test_a_scope_for_an_aggregation_that_has_none_is_refused(name, scope):
    expected = f"objective.scope: {name} has no scope to choose; leave it at batch"
    scoped = {"objective.scope": scope}
    assert message(scoped | {"objective.aggregation": name}) == expected
    other = scoped | {"objective.auxiliary_aggregation": name}
    load_config(TINY, other)  # without a KL or entropy term it weighs nothing
    for term in ("kl_coefficient", "entropy_coefficient"):
        assert message(other | {f"objective.{term}": 0.1}) == expected


@pytest.mark.parametrize("scope", ["batch", "minibatch", "group"])
@pytest.mark.parametrize("name", SCOPED)
def test_every_scope_is_accepted_for_an_aggregation_that_has_one(name, scope):
    options = {"objective.aggregation": name, "objective.scope": scope, "objective.rho": [0.1]}
    assert load_config(TINY, options).objective.scope == scope


def test_inverse_variance_without_an_autocorrelation_is_refused_with_the_way_out():
    expected = (
        "objective.rho: inverse_variance needs it, such as [0.2, 0.1]; for a variance of L^β use "
        "delta_l with objective.alpha=β"
    )
    assert message({"objective.aggregation": "inverse_variance"}) == expected
    auxiliary = {"objective.auxiliary_aggregation": "inverse_variance"}
    load_config(TINY, auxiliary)
    assert message(auxiliary | {"objective.kl_coefficient": 0.1}) == expected


@pytest.mark.parametrize("rho", [[1.01], [0.2, -1.5]])
def test_an_autocorrelation_beyond_one_is_refused(rho):
    expected = f"objective.rho: an autocorrelation is in -1 … 1, got {tuple(rho)}"
    assert message({"objective.rho": rho}) == expected
    load_config(TINY, {"objective.rho": [1.0, -1.0]})


@pytest.mark.parametrize("name", sorted(set(CORRECTIONS) - {"none"}))
def test_a_correction_of_the_samplers_logprobs_against_themselves_is_refused(name):
    correction = {"objective.importance_correction": name}
    assert message(correction) == (
        "objective.importance_correction: needs the trainer's own log-probabilities; set "
        "objective.old_logprobs=recompute"
    )
    load_config(TINY, correction | {"objective.old_logprobs": "recompute"})


def test_a_group_of_one_needs_an_advantage_over_the_batch():
    alone = {"rl.samples_per_prompt": 1}
    for name in sorted(set(ADVANTAGES) - {"batch_standardize"}):
        said = message(alone | {"objective.advantage": name})
        assert said.startswith("rl.samples_per_prompt: a group of 1 has no spread")
    load_config(TINY, alone | {"objective.advantage": "batch_standardize"})


def test_default_buckets_by_hand():
    assert Config().bucket_edges == (16, 24, 32, 40, 56, 72, 96, 120, 152, 192, 200)
    long = RolloutConfig(max_prompt_length=8, max_response_length=1016)
    edges = dataclasses.replace(Config(), rollout=long).bucket_edges
    assert edges[-5:] == (480, 600, 752, 944, 1024)
    given = dataclasses.replace(Config(), length_buckets=(64, 200))
    assert given.bucket_edges == (64, 200)


@given(st.integers(1, 200), st.integers(1, 40_000))
def test_default_buckets_grow_by_a_quarter_up_to_the_longest_row(prompt, response):
    """So padding to the next edge adds at most a quarter, or 8 tokens where rows are short."""
    longest = prompt + response
    rollout = RolloutConfig(max_prompt_length=prompt, max_response_length=response)
    edges = dataclasses.replace(Config(), rollout=rollout).bucket_edges
    assert edges[-1] == longest
    assert edges[0] == min(16, longest)
    for low, high in itertools.pairwise(edges):
        assert 0 < high - low <= 0.25 * low + 8
    assert all(edge % 8 == 0 for edge in edges[:-1])
    assert len(edges) <= 40
