"""Config files and overrides: what is read, what is not, and what is written back."""

import dataclasses
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.config import (
    Config,
    OptimizerConfig,
    config_files,
    config_folder,
    dump_config,
    files,
    find_config,
    load_config,
    parse_overrides,
    shipped_configs,
)
from deltal_jax.config.fields import build
from deltal_jax.errors import UserError

TINY = "countdown-tiny"
SHIPPED = sorted(shipped_configs().values())


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "trial.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


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


def test_a_section_as_an_override_leaves_its_other_fields_and_takes_names_whole(write):
    path = write(
        "rl: {steps: 7, optimizer: {b2: 0.5}}\ntask: {name: mixture, mixture: {paths: 1}}\n"
    )
    weights = "task.mixture={./mine.py:Echo: 2}"
    config = load_config(path, parse_overrides(["rl={steps: 9, optimizer: {b1: 0.25}}", weights]))
    assert (config.rl.steps, config.rl.optimizer.b1, config.rl.optimizer.b2) == (9, 0.25, 0.5)
    assert config.task.mixture == {"paths": 1.0, "./mine.py:Echo": 2.0}


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


def test_an_unknown_field_in_a_file_is_refused_like_an_override(write):
    with pytest.raises(UserError, match=r"^rl.step: no such field; did you mean rl.steps\?$"):
        load_config(write("rl: {step: 3}"))
    with pytest.raises(UserError, match=r"^5: no such field; the fields here are run, seed,"):
        load_config(write("5: 3"))


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


def test_shipped_configs_lie_beside_the_package_or_inside_an_installed_one(tmp_path, monkeypatch):
    package = tmp_path / "deltal_jax"
    monkeypatch.setattr(files, "__file__", str(package / "config" / "files.py"))
    assert config_folder() == tmp_path / "configs"
    (package / "configs").mkdir(parents=True)
    assert config_folder() == package / "configs"


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


def test_a_file_is_laid_over_its_bases_field_by_field(write):
    write("seed: 1\nrl: {steps: 5, prompts_per_step: 8, optimizer: {b1: 0.5, b2: 0.5}}\n", "a.yaml")
    write("rl: {steps: 6, optimizer: {b2: 0.6}}\nsft: {steps: 3}\nrun: null\n", "b.yaml")
    path = write("base: [a.yaml, b.yaml]\nrl: {optimizer: {epsilon: 1}}\nsft:\n", "c.yaml")
    config = load_config(path, {"rl.prompts_per_step": 4})
    assert (config.seed, config.rl.steps, config.rl.prompts_per_step) == (1, 6, 4)
    adam = config.rl.optimizer
    assert (adam.b1, adam.b2, adam.epsilon) == (0.5, 0.6, 1)
    assert config.sft.steps == 3  # a section that is null changes nothing
    assert config.run.name == "c"
    assert load_config(write(dump_config(config), "d.yaml")) == config


def test_a_lists_value_and_a_fields_null_are_taken_as_they_are(write):
    write("length_buckets: [64, 300]\nobjective: {dual_clip: 3}\n", "a.yaml")
    path = write("base: a.yaml\nlength_buckets: [400]\nobjective: {dual_clip: null}\n")
    config = load_config(path)
    assert config.length_buckets == (400,) and config.objective.dual_clip is None


def test_bases_lie_beside_the_file_that_names_them_and_the_chain_is_known(write, tmp_path):
    (tmp_path / "below").mkdir()
    first = write("seed: 1\nrl: {steps: 1}\n", "below/first.yaml")
    second = write("base: first.yaml\nseed: 2\n", "below/second.yaml")
    top = write("base: [below/second.yaml, below/first.yaml]\n", "top.yaml")
    assert config_files(top) == [first, second, top]  # a file reached twice has its first place
    assert (load_config(top).seed, load_config(top).rl.steps) == (2, 1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "base: [c.yaml]", "c.yaml": "base: a.yaml"},
            r"a.yaml: base: the files name each other in a circle, a.yaml → b.yaml → c.yaml → "
            r"a.yaml$",
        ),
        ({"a.yaml": "base: a.yaml"}, r"a.yaml: base: the files name .* circle, a.yaml → a.yaml$"),
        ({"a.yaml": "base: no.yaml"}, r"a.yaml: base: no file \S*no.yaml$"),
        ({"a.yaml": f"base: {'x' * 300}"}, r"a.yaml: base: no file "),
        ({"a.yaml": "base: {b: 1}"}, r"a.yaml: base: expected a file or a list of files, got {'b"),
        ({"a.yaml": "base: [1]"}, r"a.yaml: base: expected a file or a list of files, got \[1\]$"),
        ({"a.yaml": "base: false"}, r"a.yaml: base: expected a file or a list of files, got Fal"),
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "rl: {step: 3}"},
            r"^rl.step: no such field; did you mean rl.steps\? \(in \S*b.yaml\)$",
        ),
        (
            {"a.yaml": "base: b.yaml\nrl: {steps: x}", "b.yaml": "seed: 1"},
            r"^rl.steps: expected int, got 'x' \(in \S*a.yaml\)$",
        ),
        ({"a.yaml": "base: b.yaml", "b.yaml": "[1"}, r"b.yaml: not valid YAML: "),
        ({"a.yaml": "base: b.yaml", "b.yaml": "[1]"}, r"b.yaml: expected a mapping of sections"),
    ],
)
def test_what_is_wrong_with_a_base_is_one_line_that_names_the_file(write, files, said):
    paths = [write(text, name) for name, text in files.items()]
    with pytest.raises(UserError, match=said) as refused:
        load_config(paths[0])
    assert "\n" not in str(refused.value)


def test_an_override_is_no_base():
    with pytest.raises(UserError, match=r"^base: no such field"):
        load_config(TINY, {"base": "x.yaml"})


#: Of a mixture.
WEIGHTS = st.dictionaries(st.text(max_size=8), st.floats(0, 9), max_size=3)


def values(hint: type, field: dataclasses.Field) -> st.SearchStrategy:
    """Every value that the field's type and bounds allow."""
    low, high = field.metadata["low"], field.metadata["high"]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(args)
    if type(None) in args:
        return st.none() | values(next(a for a in args if a is not type(None)), field)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(*(values(arg, field) for arg in args))
    if args and typing.get_origin(args[0]) is typing.Literal:
        choices = st.sampled_from(typing.get_args(args[0]))
        return st.lists(choices, min_size=1, max_size=4).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        str: st.text(max_size=30),
        tuple[int, ...]: st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(tuple),
        tuple[str, ...]: st.lists(st.text(max_size=30), min_size=1, max_size=4).map(tuple),
        tuple[float, ...]: st.lists(st.floats(-1, 1), min_size=1, max_size=4).map(tuple),
        tuple[str, ...]: st.lists(st.text(max_size=8), min_size=1, max_size=3).map(tuple),
        dict[str, float]: WEIGHTS,
        dict[str, dict[str, float]]: st.dictionaries(st.text(max_size=8), WEIGHTS, max_size=2),
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
    tree = yaml.load(dump_config(config), files._Loader)
    assert build(Config, tree) == config


@pytest.mark.parametrize("name", ["3e-4", "1e5", "-2e3", "007", "null", "yes", "1.5", "2024-01-02"])
def test_a_name_that_looks_like_another_type_survives_dump_and_load(name, write):
    config = load_config(write("seed: 1", f"{name}.yaml"))
    assert config.run.name == name
    assert load_config(write(dump_config(config))) == config


def test_defaults_are_a_config_that_loads(write):
    assert dataclasses.replace(load_config(write("")), run=Config().run) == Config()
