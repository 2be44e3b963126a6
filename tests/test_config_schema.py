"""The schema: default buckets, choices that are the functions there are, every field is read."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltal_jax
from deltal_jax.config import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    RlConfig,
    RolloutConfig,
    load_config,
    schema,
    tasks,
)
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.kernels import Kernel
from deltal_jax.model.lora import TARGETS
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.names import FOREIGN_NAMES
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.training.objective import SURROGATE_OPTIONS
from tests.fakes import config_refusal

TINY = "countdown-tiny"


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


def test_targets_and_kernels_are_those_that_the_model_has():
    assert typing.get_args(schema.Projection) == tuple(TARGETS)
    kernels = typing.get_args(typing.get_type_hints(ModelConfig)["attention"])
    assert kernels == ("auto", *typing.get_args(Kernel))


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
    said = config_refusal({f"objective.{field}": theirs})
    assert said.startswith(f"objective.{field}: {theirs!r} is not one of ")
    assert said.endswith(f"; its name here is {ours!r}")


CONFIGS = {
    kind.__name__: kind
    for kind in (vars(schema) | vars(tasks)).values()
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
        if path.parent.name != "config":
            readers = Readers()
            readers.visit(ast.parse(path.read_text(encoding="utf-8")))
            reading |= readers.read
    for kind, name in sorted(reading, key=str):
        if isinstance(getattr(kind, name, None), property):
            readers = Readers()
            readers.visit_property(kind, name)
            reading |= readers.read
    if (Config, "model") in reading:
        reading |= {(ModelConfig, name) for kind, name in reading if kind is Architecture}
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
            "    run.trackers, rl.steps, o.alpha, arch.layers\n"
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
    of_property.visit_property(RlConfig, "updates")
    names = {"steps", "updates_per_rollout", "epochs_per_rollout"}
    assert of_property.read == {(RlConfig, name) for name in names}
