"""The plan of a comparison: a YAML file of methods, seeds and controls, resolved to cells.

A cell is one training run: a method with a seed, from a warm-up checkpoint.
"""

import dataclasses
import operator
import re
from pathlib import Path
from typing import Any

import yaml

from deltal_jax.config import Config, describe_fields, find_config, load_config, read_tree
from deltal_jax.config.files import METHODS
from deltal_jax.errors import UserError
from deltal_jax.laboratory.measure import FEWEST, FEWEST_GROUPS
from deltal_jax.objective.names import unknown_name

#: What a plan says, and what a method says where it says more than fields of the config.
KEYS = ("experiment", "set", "seeds", "warmups", "reference", METHODS, "controls", "frozen")
METHOD_KEYS = ("set", "weights", "seeds", "of", "kind", "expect")
#: Sections that a method may set; a dot at the end means all below.
FREE = ("objective.", "rl.", "rollout.", "task.overlong_buffer", "task.overlong_factor")
#: And what of them it may not: curves of two methods have the same steps, problems and places.
COMMON = (
    "rl.steps",
    "rollout.max_prompt_length",
    "rollout.max_response_length",
    "rollout.engine",
    "rollout.devices",
)
MAX_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: fields of the config over those of the plan."""

    name: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    #: Whether the weights of each batch are permuted among its responses.
    permuted: bool = False
    control: bool = False
    #: Of a control: what it is compared with, how it is read (see `controls.py`), and what it
    #: should show, in words; empty where the plan does not say.
    of: str = ""
    kind: str = ""
    expect: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run."""

    method: Method
    seed: int
    #: The number of the warm-up that it starts from.
    warmup: int
    config: Config

    @property
    def name(self) -> str:
        """Where its result lies below the folder of cells, without the suffix."""
        return f"{self.method.name}/seed-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole comparison, checked."""

    name: str
    experiment: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    #: How many are made, or the run folders whose newest checkpoints they are; 0: every cell starts
    #: from `model.path`.
    warmups: int | tuple[str, ...]
    reference: str
    #: Methods, then controls, as the file has them.
    methods: tuple[Method, ...]
    #: Prompts that the laboratory measures the methods on, at each warm-up; None: it does not.
    frozen: int | None = None

    def config(self, method: Method | None = None) -> Config:
        """The resolved config of a method's cells, or without one what all cells share; with the
        experiment's own seed."""
        over = {} if method is None else method.overrides
        return load_config(self.experiment, {**self.overrides, **over})

    def method(self, name: str) -> Method:
        """The method or control of this name, which is one of them."""
        return next(method for method in self.methods if method.name == name)

    def cells(self) -> list[Cell]:
        """In the order in which they are run: every method with its first seed, then with its
        second, so that what is done of a comparison is made of whole pairs."""
        most = max(len(method.seeds) for method in self.methods)
        count = self.warmups if isinstance(self.warmups, int) else len(self.warmups)
        configs = {method.name: self.config(method) for method in self.methods}
        return [
            Cell(
                method,
                seed,
                # A seed of the plan starts from one warm-up, whichever of them a method has.
                (self.seeds.index(seed) if seed in self.seeds else number) % max(count, 1),
                dataclasses.replace(configs[method.name], seed=seed),
            )
            for number in range(most)
            for method in self.methods
            for seed in method.seeds[number : number + 1]
        ]

    def dump(self) -> str:
        """The plan as YAML that `load_plan` reads back to an equal one."""
        tree = {
            "experiment": self.experiment,
            "set": self.overrides,
            "seeds": list(self.seeds),
            "warmups": self.warmups if isinstance(self.warmups, int) else list(self.warmups),
            "reference": self.reference,
            METHODS: {m.name: self._dumped(m) for m in self.methods if not m.control},
            "controls": {m.name: self._dumped(m) for m in self.methods if m.control},
        }
        if self.frozen is not None:
            tree["frozen"] = {"groups": self.frozen}
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)

    def _dumped(self, method: Method) -> dict[str, Any]:
        found: dict[str, Any] = {"set": method.overrides}
        if method.permuted:
            found["weights"] = "permuted"
        if method.seeds != self.seeds:
            found["seeds"] = list(method.seeds)
        said = {"of": method.of, "kind": method.kind, "expect": method.expect}
        return found | {key: text for key, text in said.items() if text}


def chosen(config: Config) -> dict[str, Any]:
    """The fields whose value is not the default, by name: a field that a later version adds does
    not change what a config says."""
    found = {}
    for name, _, default, _ in describe_fields():
        if (value := operator.attrgetter(name)(config)) != default:
            found[name] = value
    return found


def load_plan(name: str | Path, overrides: dict[str, Any] | None = None) -> Plan:
    """Read a plan by path or name. Overrides are fields of the config for all cells, or one of
    `KEYS`, such as `seeds`.

    Raises UserError for a field that is missing, unknown or contradicts another.
    """
    path = find_config(str(name))
    tree = read_tree(path)
    if METHODS not in tree:
        raise UserError(f"{METHODS}: {path} names none; `deltal train` runs an experiment")
    given = {k: v for k, v in (overrides or {}).items() if k.split(".")[0] not in KEYS}
    for key, value in (overrides or {}).items():
        if key in given:
            continue
        if key not in KEYS:
            raise UserError(f"{key}: of a plan {key.split('.')[0]} is set as a whole")
        tree[key] = value
    for key in tree:
        if key not in KEYS:
            raise UserError(unknown_name("plan", key, KEYS))
    shared = _mapping("set", tree.get("set")) | given
    experiment = _experiment(path, tree.get("experiment"))
    if "seed" in shared:
        raise UserError("set.seed: the plan's seeds take its place; set seeds")
    seeds = _seeds("seeds", tree.get("seeds"))
    methods = tuple(
        _method(f"{section}.{key}", str(key), value, seeds, control=section == "controls")
        for section in (METHODS, "controls")
        for key, value in _mapping(section, tree.get(section)).items()
    )
    reference = _reference(tree.get("reference"), methods)
    config = load_config(experiment, shared)
    plan = Plan(
        path.stem,
        experiment,
        shared,
        seeds,
        _warmups(tree.get("warmups"), config),
        reference,
        methods,
        _frozen(tree.get("frozen")),
    )
    for method in methods:
        _check_method(plan, method, config)
    _check_frozen(plan)
    return plan


def _mapping(field: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{field}: expected fields by name, got {value!r}")
    return value


def _experiment(plan: Path, value: Any) -> str:
    """A config's name, or its path where it is a file beside the plan or below this folder."""
    if not isinstance(value, str):
        raise UserError("experiment: name a config, such as countdown-tiny")
    beside = plan.parent / value
    if value.endswith(".yaml") and beside.is_file():
        return str(beside.resolve())
    found = find_config(value)
    return str(found.resolve()) if Path(value).is_file() else value


def _seeds(field: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(type(seed) is int for seed in value)
    if not good or min(value) < 0 or max(value) > MAX_SEED or len(set(value)) < len(value):
        raise UserError(f"{field}: expected different whole numbers such as [0, 1], got {value!r}")
    return tuple(value)


def _method(field: str, name: str, value: Any, seeds: tuple[int, ...], *, control: bool) -> Method:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) is None:
        raise UserError(f"{field}: a name is made of letters, digits, '-', '_', '+' and '.'")
    tree = _mapping(field, value)
    known = [key for key in tree if key in METHOD_KEYS]
    if not known:
        tree = {"set": tree}
    elif len(known) < len(tree):
        other = next(key for key in tree if key not in METHOD_KEYS)
        raise UserError(f"{field}.{other}: beside {known[0]}, fields stand under {field}.set")
    for key in () if control else ("of", "kind"):
        if key in tree:
            raise UserError(f"{field}.{key}: of controls alone; move {name} there, or drop {key}")
    weights = tree.get("weights")
    if weights not in (None, "permuted"):
        raise UserError(f"{field}.weights: expected permuted, or nothing, got {weights!r}")
    return Method(
        name,
        _mapping(f"{field}.set", tree.get("set")),
        _seeds(f"{field}.seeds", tree["seeds"]) if "seeds" in tree else seeds,
        permuted=weights == "permuted",
        control=control,
        of=_text(f"{field}.of", tree.get("of", "")),
        kind=_text(f"{field}.kind", tree.get("kind", "") or "null" * ("kind" in tree)),
        expect=_text(f"{field}.expect", tree.get("expect", "")),
    )


def _reference(value: Any, methods: tuple[Method, ...]) -> str:
    """What the others are compared with. Raises UserError for names that no two or none have."""
    names = [method.name for method in methods]
    if len(names) == sum(method.control for method in methods):
        raise UserError(f"{METHODS}: name at least one")
    for method in methods:
        if names.count(method.name) > 1:
            raise UserError(f"controls.{method.name}: a method has that name; choose another")
        if method.of and method.of not in names:
            raise UserError(unknown_name(f"controls.{method.name}.of", method.of, names))
    reference = names[0] if value is None else value
    candidates = [method.name for method in methods if not method.control]
    if reference not in candidates:
        raise UserError(unknown_name("reference", reference, candidates))
    return reference


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{field}: expected text, got {value!r}")
    return value


def _warmups(value: Any, config: Config) -> int | tuple[str, ...]:
    pretrained = config.model.path is not None
    if value is None:
        value = 0 if pretrained and not config.sft.steps else 1
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        if pretrained:
            raise UserError("warmups: model.path is what cells start from; leave out one of them")
        return tuple(value)
    if type(value) is not int or value < 0:
        raise UserError(f"warmups: expected a number of them or run folders, got {value!r}")
    if value and config.lora.rank:
        raise UserError("warmups: adapters are not warmed up; set warmups and sft.steps to 0")
    if not value and (config.sft.steps or not pretrained):
        why = "sft.steps asks for one" if config.sft.steps else "a new model needs one"
        raise UserError(f"warmups: {why}; set it to 1 or more")
    return value


def _frozen(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"groups"} or type(value["groups"]) is not int:
        raise UserError(f"frozen: expected {{groups: N}}, or null, got {value!r}")
    return value["groups"]


def _check_frozen(plan: Plan) -> None:
    """Raises UserError for too few groups for what the laboratory measures."""
    rl = plan.config(plan.method(plan.reference)).rl
    least = max(FEWEST_GROUPS, 2 * rl.prompts_per_step, -(-FEWEST // rl.samples_per_prompt))
    if plan.frozen is not None and plan.frozen < least:
        raise UserError(
            f"frozen.groups: {plan.frozen} are fewer than {least}, what two batches of "
            f"rl.prompts_per_step={rl.prompts_per_step} and the fits need; raise it, or set "
            "frozen=null"
        )


def _check_method(plan: Plan, method: Method, shared: Config) -> None:
    """Raises UserError, naming the method, for what a method may not set."""
    where = f"{'controls' if method.control else METHODS}.{method.name}"
    try:
        config = plan.config(method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for name, *_ in describe_fields():
        value = operator.attrgetter(name)
        free = name.startswith(FREE) and name not in COMMON
        if not free and value(config) != value(shared):
            raise UserError(f"{where}: {name} is common to all cells; set it in the plan's set")
