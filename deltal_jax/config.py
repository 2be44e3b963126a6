"""Experiment configuration: frozen dataclasses, filled from YAML and `key.sub=value` overrides.

Every field is documented here, checked here, and read somewhere (a test fails otherwise). Every
error names the field and the fix.
"""

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from deltal_jax.errors import UserError
from deltal_jax.objective.names import unknown_name

Aggregation = Literal[
    "delta_l",
    "sequence_mean",
    "token_mean",
    "constant_length",
    "prompt_mean",
    "token_sum",
    "sequence_sum",
    "local_token_mean",
    "balanced",
    "inverse_variance",
]
Scope = Literal["batch", "minibatch", "group"]
Advantage = Literal[
    "group_standardize",
    "group_center",
    "leave_one_out",
    "batch_standardize",
    "length_weighted_baseline",
    "max_rl",
]
Surrogate = Literal["clipped", "reinforce", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "dppo"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_mask"]
DType = Literal["float32", "bfloat16"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Aggregations that take a scope; the others have one of their own, or none.
SCOPED = (
    "delta_l",
    "sequence_mean",
    "token_mean",
    "constant_length",
    "sequence_sum",
    "inverse_variance",
)


def _field(default: Any, help_: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A documented field; `low` and `high` are inclusive bounds."""
    metadata = {"help": help_, "low": low, "high": high}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    name: str = _field("run", "name of the experiment; part of the run folder's name")
    dir: str | None = _field(None, "run folder; default: a new time-stamped one under runs/")
    tensorboard: bool = _field(True, "also write TensorBoard events")
    report: bool = _field(True, "write report.html at the end")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    name: Literal["countdown"] = _field("countdown", "which task to train on")
    numbers: int = _field(3, "how many numbers a problem gives", low=2, high=6)
    max_number: int = _field(9, "largest given number", low=2, high=100)
    max_value: int = _field(60, "largest target and intermediate value", low=4, high=1000)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    chat_template: bool = _field(
        False, "put prompts into the tokenizer's chat template, as a user's message"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str | None = _field(
        None, "a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-3B; null: a new model"
    )
    revision: str | None = _field(None, "branch, tag or commit of a hub id; null: its default")
    param_dtype: DType = _field(
        "float32", "type of the trained parameters; bfloat16 is rounded stochastically"
    )
    compute_dtype: DType = _field("bfloat16", "type of activations and of the matrix products")
    attention: Literal["auto", "xla", "cudnn", "splash"] = _field(
        "auto", "kernel of attention: cudnn on GPUs (not with rl.pack), splash on TPUs, else xla"
    )
    layers: int = _field(3, "number of layers", low=1)
    d_model: int = _field(64, "width of the residual stream", low=1)
    heads: int = _field(2, "query heads", low=1)
    kv_heads: int | None = _field(None, "key-value heads; default: as many as heads", low=1)
    head_dim: int | None = _field(None, "size of a head (even); default: d_model / heads", low=2)
    d_ff: int = _field(176, "width of the feed-forward layer", low=1)
    tied_embeddings: bool = _field(False, "share the embedding with the output head")
    rope_theta: float = _field(10_000.0, "base of the rotary frequencies", low=1.0)
    norm_epsilon: float = _field(1e-6, "epsilon of RMSNorm", low=0.0)
    remat: bool = _field(False, "recompute layers in the backward pass: less memory, more work")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = _field(0, "rank of adapters, which alone are trained; 0: train everything", low=0)
    alpha: float = _field(32.0, "numerator of the adapters' factor alpha / rank", low=1e-9)
    targets: tuple[Projection, ...] = _field(
        typing.get_args(Projection), "matrices that have adapters"
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = _field(3e-4, "peak learning rate", low=0.0)
    warmup_steps: int = _field(0, "updates of linear warm-up from 0", low=0)
    schedule: Literal["constant", "cosine"] = _field("constant", "shape after the warm-up")
    final_fraction: float = _field(0.05, "where cosine ends, of the peak", low=0.0, high=1.0)
    b1: float = _field(0.9, "decay of Adam's first moment", low=0.0, high=1 - 1e-9)
    b2: float = _field(0.999, "decay of Adam's second moment", low=0.0, high=1 - 1e-9)
    epsilon: float = _field(1e-8, "Adam's epsilon", low=0.0)
    weight_decay: float = _field(0.0, "decoupled weight decay", low=0.0)
    clip_norm: float | None = _field(1.0, "clip of the global gradient norm; null: none", low=1e-9)
    moment_dtype: DType = _field(
        "float32", "type that Adam's moments are stored in; bfloat16 is rounded stochastically"
    )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    steps: int = _field(0, "updates of supervised warm-up on the task's demonstrations", low=0)
    tokens_per_batch: int = _field(1024, "padded tokens of one update", low=1)
    log_every: int = _field(100, "steps between two lines of metrics", low=1)
    optimizer: OptimizerConfig = _field(OptimizerConfig, "optimizer of the warm-up")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    slots: int = _field(16, "responses that are decoded side by side", low=1)
    max_prompt_length: int = _field(8, "longest prompt in tokens, BOS included", low=1)
    max_response_length: int = _field(192, "longest response in tokens, EOS included", low=1)
    temperature: float = _field(1.0, "sampling temperature of training", low=0.01)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    aggregation: Aggregation = _field("delta_l", "weights of the responses' token sums")
    alpha: float = _field(1.0, "exponent of delta_l", low=-1.0, high=3.0)
    scope: Scope = _field("batch", "what the weights are normalised over")
    normalizer: float | None = _field(
        None, "the constant M; default: rollout.max_response_length", low=1e-9
    )
    rho: tuple[float, ...] | None = _field(
        None, "autocorrelation of token gradients at distances 1, 2, …; for inverse_variance"
    )
    microbatch_size: int = _field(4, "responses that local_token_mean averages over", low=1)
    overlong_filter: bool = _field(False, "give truncated responses the weight 0")
    count_masked: bool = _field(False, "keep filtered responses in the denominators")
    advantage: Advantage = _field("group_standardize", "advantage estimator")
    surrogate: Surrogate = _field("clipped", "per-token loss")
    clip_low: float | None = _field(
        None, "lower clip range of the ratio; default: the surrogate's own", low=0.0
    )
    clip_high: float | None = _field(
        None, "upper clip range of the ratio; default: the surrogate's own", low=0.0
    )
    dual_clip: float | None = _field(
        None, "clipped: bound on the ratio where A < 0; null: none", low=1 + 1e-9
    )
    threshold: float | None = _field(
        None, "dppo: how far a token's probability may move; default: 0.2", low=0.0, high=1.0
    )
    tau_positive: float | None = _field(
        None, "sapo: temperature of the gate where A > 0; default: 1", low=1e-3
    )
    tau_negative: float | None = _field(
        None, "sapo: temperature of the gate where A < 0; default: 1.05", low=1e-3
    )
    old_logprobs: Literal["sampler", "recompute"] = _field(
        "sampler",
        "log-probabilities in the ratio's denominator: the sampler's or the trainer's own",
    )
    importance_correction: Correction = _field(
        "none", "of the sampler's log-probabilities against recomputed ones"
    )
    correction_threshold: float = _field(
        2.0, "largest trainer/sampler ratio that the correction lets pass", low=1.0
    )
    kl_coefficient: float = _field(
        0.0, "of the KL to the model as RL began; 0: no reference model", low=0.0
    )
    kl_estimator: Literal["kl_k2", "kl_k3", "kl_k3_straight_through"] = _field(
        "kl_k3_straight_through", "estimator of the KL in the loss"
    )
    entropy_coefficient: float = _field(0.0, "of the entropy bonus", low=0.0)
    auxiliary_aggregation: Aggregation = _field(
        "token_mean", "aggregation of the KL and entropy terms"
    )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    steps: int = _field(100, "rollouts", low=0)
    prompts_per_step: int = _field(16, "prompts of one rollout", low=1)
    samples_per_prompt: int = _field(8, "responses to each prompt: the group", low=1)
    updates_per_rollout: int = _field(1, "mini-batches, each one optimizer update", low=1)
    epochs_per_rollout: int = _field(1, "passes over the rollout", low=1)
    tokens_per_microbatch: int = _field(1024, "padded tokens at once; memory only", low=1)
    pack: bool = _field(False, "several short responses to a row; speed and memory only")
    optimizer: OptimizerConfig = _field(OptimizerConfig, "optimizer of the updates")

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * self.updates_per_rollout * self.epochs_per_rollout


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    every: int = _field(20, "RL steps between evaluations; 0: only before and after", low=0)
    problems: int = _field(512, "held-out problems", low=1)
    samples_per_problem: int = _field(1, "responses a problem: k of avg@k and pass@k", low=1)
    temperature: float = _field(1.0, "sampling temperature; 0 is greedy", low=0.0)
    rows: int = _field(16, "responses in the readable table of each evaluation", low=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = _field(50, "RL steps between checkpoints; 0: only after each phase", low=0)
    keep_last: int = _field(2, "newest checkpoints that are kept", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    run: RunConfig = _field(RunConfig, "where results go")
    seed: int = _field(0, "root of all randomness", low=0, high=2**31 - 1)
    length_buckets: tuple[int, ...] | None = _field(
        None,
        "padded lengths (prompt + response); default: each a quarter longer, to the longest row",
        low=1,
    )
    task: TaskConfig = _field(TaskConfig, "what is learnt")
    data: DataConfig = _field(DataConfig, "how prompts are written")
    model: ModelConfig = _field(ModelConfig, "the network")
    lora: LoraConfig = _field(LoraConfig, "low-rank adapters")
    sft: SftConfig = _field(SftConfig, "supervised warm-up")
    rollout: RolloutConfig = _field(RolloutConfig, "sampling")
    objective: ObjectiveConfig = _field(ObjectiveConfig, "the loss")
    rl: RlConfig = _field(RlConfig, "reinforcement learning")
    evaluate: EvaluateConfig = _field(EvaluateConfig, "evaluation on held-out problems")
    checkpoint: CheckpointConfig = _field(CheckpointConfig, "checkpoints")

    @property
    def bucket_edges(self) -> tuple[int, ...]:
        """`length_buckets`, or its default: multiples of 8, each about a quarter longer than the
        last, up to the longest prompt with the longest response."""
        if self.length_buckets is not None:
            return self.length_buckets
        longest = self.rollout.max_prompt_length + self.rollout.max_response_length
        edges = [16]
        while edges[-1] < longest:
            edges.append(max(edges[-1] + 8, math.ceil(edges[-1] * 1.25 / 8) * 8))
        return (*(edge for edge in edges if edge < longest), longest)


def config_folder() -> Path:
    """The folder of the experiments that come with the package."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file of a config: a path, or the name of one that comes with the package."""
    for path in (Path(name), config_folder() / f"{name.removesuffix('.yaml')}.yaml"):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name too long, or with a NUL
            break
    folder = config_folder()
    known = [str(p.relative_to(folder).with_suffix("")) for p in sorted(folder.rglob("*.yaml"))]
    raise UserError(
        f"config: no file {name!r} and no config of that name"
        f"{_nearest(name, known)}; `deltal configs` lists them"
    )


def load_config(name: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML config by path or name and apply dotted overrides, `{"rl.steps": 10}`."""
    path = find_config(str(name))
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    config = _build(Config, tree, "")
    _check(config)
    return config


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["rl.steps=10"]` to `{"rl.steps": 10}`; values are YAML."""
    overrides = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise UserError(f"override {item!r}: expected key.sub=value, such as rl.steps=10")
        try:
            overrides[key] = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{key}: {text[:60]!r} is not valid YAML") from error
    return overrides


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    tree = _plain(dataclasses.asdict(config))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100)


def describe_fields(kind: type = Config, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """(dotted name, type, default, help) of every field."""
    rows = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            rows += describe_fields(hints[field.name], f"{name}.")
        else:
            rows.append((name, _spell(hints[field.name]), field.default, field.metadata["help"]))
    return rows


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4) and refuses repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.YAMLError(f"key {repeated!r} appears twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _set(tree: dict, key: str, value: Any) -> None:
    if isinstance(value, dict):  # a whole section: field by field, so that the others stay
        for name, item in value.items():
            _set(tree, f"{key}.{name}", item)
        return
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {parent} is a value, not a section")
    tree[last] = value


def _build(kind: type, tree: Any, prefix: str) -> Any:
    """An instance of a config dataclass from a mapping."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')}: expected a section of fields, got {tree!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise UserError(f"{prefix}{key}: no such field{_suggest(prefix, str(key), fields)}")
    values = {}
    for name, value in tree.items():
        path = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value if value is not None else {}, f"{path}.")
        else:
            values[name] = _convert(hints[name], value, path)
            _bound(values[name], fields[name].metadata, path)
    return kind(**values)


def _suggest(prefix: str, key: str, fields: dict) -> str:
    everywhere = [name for name, *_ in describe_fields()]
    elsewhere = [name for name in everywhere if name.rsplit(".", 1)[-1] == key]
    near = difflib.get_close_matches(key, list(fields), n=1, cutoff=0.5)
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; the fields here are {', '.join(fields)}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the field's type, or an error that names both."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(unknown_name(path, value, args))
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _convert(inner, value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            example = {int: "[32, 64]", float: "[0.2, 0.1]"}.get(args[0], "[q_proj, v_proj]")
            raise UserError(f"{path}: expected a list such as {example}, got {value!r}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise UserError(f"{path}: too large for a float")
        return float(value)
    if isinstance(value, bool) is (hint is bool) and isinstance(value, hint):
        return value
    raise UserError(f"{path}: expected {_spell(hint)}, got {value!r}")


def _bound(value: Any, metadata: Any, path: str) -> None:
    low, high = metadata["low"], metadata["high"]
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{path}: must be finite, got {item}")
        if low is not None and item is not None and item < low:
            raise UserError(f"{path}: must be at least {low}, got {item}")
        if high is not None and item is not None and item > high:
            raise UserError(f"{path}: must be at most {high}, got {item}")


def _check(config: Config) -> None:
    """Rules that span fields."""
    rl, rollout, task = config.rl, config.rollout, config.task
    if task.max_number > task.max_value:
        raise UserError(
            f"task.max_number: {task.max_number} is over task.max_value={task.max_value}"
        )
    _check_model(config)
    buckets = config.bucket_edges
    if list(buckets) != sorted(set(buckets)):
        raise UserError("length_buckets: must increase")
    if rl.prompts_per_step % rl.updates_per_rollout:
        raise UserError(
            f"rl.updates_per_rollout: {rl.updates_per_rollout} does not divide "
            f"rl.prompts_per_step={rl.prompts_per_step}"
        )
    longest = rollout.max_prompt_length + rollout.max_response_length
    if buckets[-1] < longest:
        raise UserError(
            f"length_buckets: the last is {buckets[-1]}, but prompt and response may "
            f"take rollout.max_prompt_length + rollout.max_response_length = {longest} tokens"
        )
    if rl.samples_per_prompt == 1 and config.objective.advantage != "batch_standardize":
        raise UserError(
            "rl.samples_per_prompt: a group of 1 has no spread, so every advantage would be 0; "
            "use at least 2, or objective.advantage=batch_standardize"
        )
    _check_objective(config.objective)


#: Fields of a new model's shape, which a checkpoint brings by itself.
SHAPE = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "tied_embeddings")
SHAPE += ("rope_theta", "norm_epsilon")


def _check_model(config: Config) -> None:
    model, lora = config.model, config.lora
    if model.path is not None:
        for name in SHAPE:
            if getattr(model, name) != getattr(ModelConfig(), name):
                raise UserError(f"model.{name}: comes with the checkpoint of model.path; leave out")
    elif model.revision is not None:
        raise UserError("model.revision: is that of a hub id; set model.path too")
    elif lora.rank:
        raise UserError("lora.rank: adapters need a trained model beside them; set model.path")
    if lora.rank and config.model.param_dtype != "float32":
        raise UserError("model.param_dtype: adapters are trained in float32; leave it out")
    kv_heads = model.heads if model.kv_heads is None else model.kv_heads
    if model.heads % kv_heads:
        raise UserError(f"model.kv_heads: {kv_heads} does not divide model.heads={model.heads}")
    head_dim = model.d_model / model.heads if model.head_dim is None else model.head_dim
    if head_dim % 2:
        raise UserError(
            f"model.head_dim: {head_dim:g} is not an even number; set it, or a model.d_model that "
            f"model.heads={model.heads} divides into even heads"
        )


def _check_objective(objective: ObjectiveConfig) -> None:
    methods = {objective.aggregation}
    if objective.kl_coefficient or objective.entropy_coefficient:
        methods.add(objective.auxiliary_aggregation)
    for method in methods:
        if objective.scope != "batch" and method not in SCOPED:
            raise UserError(f"objective.scope: {method} has no scope to choose; leave it at batch")
        if objective.count_masked and method in ("token_sum", "balanced"):
            raise UserError(
                f"objective.count_masked: {method} has no denominator that keeps filtered "
                "responses; leave it at false"
            )
    low = objective.clip_low
    if low is not None and low > 1 and objective.surrogate != "gmpo":
        raise UserError(f"objective.clip_low: 1 - {low:g} is below every ratio; use at most 1")
    if "inverse_variance" in methods and objective.rho is None:
        raise UserError(
            "objective.rho: inverse_variance needs it, such as [0.2, 0.1]; for a variance of "
            "L^β use delta_l with objective.alpha=β"
        )
    if objective.rho is not None and max(map(abs, objective.rho)) > 1:
        raise UserError(f"objective.rho: an autocorrelation is in -1 … 1, got {objective.rho}")
    if objective.importance_correction != "none" and objective.old_logprobs == "sampler":
        raise UserError(
            "objective.importance_correction: needs the trainer's own log-probabilities; set "
            "objective.old_logprobs=recompute"
        )


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _spell(a) for a in args)
    if origin is tuple:
        return f"list of {_spell(args[0])}"
    return {int: "int", float: "float", str: "text", bool: "true|false"}[hint]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
