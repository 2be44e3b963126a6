"""Rules that span fields. The bounds of a single field are where it is declared."""

import dataclasses
from urllib.parse import urlsplit

from deltal_jax.config.schema import (
    AdaptiveConfig,
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    ServerConfig,
)
from deltal_jax.config.tasks import SECTIONS, CountDownConfig, TaskConfig
from deltal_jax.errors import UserError

#: Aggregations that take a scope; the others have one of their own, or none.
SCOPED = (
    "delta_l",
    "sequence_mean",
    "token_mean",
    "constant_length",
    "sequence_sum",
    "inverse_variance",
)
#: Fields of a new model's shape, which a checkpoint brings by itself.
SHAPE = (
    "layers",
    "d_model",
    "heads",
    "kv_heads",
    "head_dim",
    "d_ff",
    "tied_embeddings",
    "rope_theta",
    "norm_epsilon",
)


def check(config: Config) -> None:
    """Raise a UserError if fields contradict each other."""
    rl, rollout = config.rl, config.rollout
    _check_task(config.task)
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
    if rollout.filtered and config.objective.old_logprobs == "sampler":
        raise UserError(
            "objective.old_logprobs: with rollout.top_k, top_p or min_p the sampler's are of fewer "
            "tokens than the trained policy has; set it to recompute"
        )
    if rollout.filtered and config.objective.importance_correction != "none":
        raise UserError(
            "objective.importance_correction: with rollout.top_k, top_p or min_p the sampler's "
            "log-probabilities are of fewer tokens than the trainer's; set it to none"
        )
    for phase in ("sft", "rl"):
        _check_optimizer(f"{phase}.optimizer", getattr(config, phase).optimizer)
    _check_server(rollout)
    _check_overlong(config)
    _check_objective(config.objective)
    _check_rollout(config)
    if config.checkpoint.keep_best and not config.evaluate.every:
        raise UserError("checkpoint.keep_best: nothing is evaluated on the way; set evaluate.every")
    folder = config.checkpoint.dir or ""
    if "://" in folder and not folder.startswith("gs://"):
        raise UserError(
            f"checkpoint.dir: {folder}: Orbax writes arrays to folders and to gs:// alone; mount "
            "the bucket as a folder"
        )
    warn, stop = config.guard.mismatch_warn, config.guard.mismatch_stop
    if warn is not None and stop is not None and stop < warn:
        raise UserError(f"guard.mismatch_stop: {stop:g} is below guard.mismatch_warn={warn:g}")
    _check_mesh(config)


def _check_optimizer(section: str, options: OptimizerConfig) -> None:
    default = OptimizerConfig()
    if options.normalize and options.clip_norm not in (None, default.clip_norm):
        raise UserError(
            f"{section}.clip_norm: {section}.normalize takes its place; leave out one of the two"
        )
    for name in ("b1", "b2", "epsilon") if options.rule == "sgd" else ():
        if getattr(options, name) != getattr(default, name):
            usual = getattr(default, name)
            raise UserError(
                f"{section}.{name}: is Adam's; set it to its default {usual:g}, as {section}.rule "
                "is sgd"
            )


def _check_task(task: TaskConfig) -> None:
    _check_mixture(task)
    used = {task.name, *(task.mixture or {})}
    for name in SECTIONS:
        section = getattr(task, name)
        for field in dataclasses.fields(section) if name not in used else ():
            if getattr(section, field.name) != field.default:
                missing = f"add {name} to task.mixture" if task.mixture else f"set task.name={name}"
                raise UserError(f"task.{name}.{field.name}: {missing}, or leave it out")
    _check_countdown(task.countdown)
    paths = task.paths
    most = paths.nodes * (paths.nodes - 1)
    if paths.edges > most or paths.distance >= paths.nodes:
        raise UserError(
            f"task.paths.nodes: {paths.nodes} have at most {most} edges and a distance of "
            f"{paths.nodes - 1}; raise it"
        )
    for name in ("train", "eval") if "math" in used else ():
        if getattr(task.math, name) is None:
            raise UserError(
                f"task.math.{name}: the task math needs files; `deltal prepare` converts them"
            )


def _check_mixture(task: TaskConfig) -> None:
    weights = task.mixture or {}
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"task.mixture.{name}: a weight is not below 0, got {weight:g}")
    if task.name != "mixture":
        if weights:
            raise UserError("task.mixture: set task.name=mixture, or leave it out")
    elif not any(weights.values()) or "mixture" in weights:
        raise UserError(
            "task.mixture: name tasks with their weights, such as {countdown: 0.7, paths: 0.3}"
        )


def _check_countdown(task: CountDownConfig) -> None:
    if task.most_numbers is not None and task.most_numbers < task.numbers:
        raise UserError(
            f"task.countdown.most_numbers: {task.most_numbers} is below "
            f"task.countdown.numbers={task.numbers}"
        )
    if len(task.rows) != 2 or min(task.rows) < 1:
        raise UserError(
            f"task.countdown.rows: give two numbers over 0, such as [32768, 1024], got {task.rows}"
        )
    if task.form == "text":
        if task.max_number > 10 * task.max_value:  # then some numbers can't be joined at all
            raise UserError(
                f"task.countdown.max_number: {task.max_number} is over 10 · "
                f"task.countdown.max_value={task.max_value}"
            )
        if task.eval is not None and task.train is None:
            raise UserError("task.countdown.eval: set task.countdown.train too, or leave it out")
        return
    for name in ("grammar", "train", "eval", "rows"):
        if getattr(task, name) != getattr(CountDownConfig(), name):
            raise UserError(f"task.countdown.{name}: is of text; set task.countdown.form=text")
    if task.max_number > task.max_value:
        raise UserError(
            f"task.countdown.max_number: {task.max_number} is over "
            f"task.countdown.max_value={task.max_value}"
        )


def _check_rollout(config: Config) -> None:
    rollout, objective = config.rollout, config.objective
    if rollout.devices is not None and rollout.slots % rollout.devices:
        raise UserError(
            f"rollout.slots: {rollout.slots} do not split over rollout.devices={rollout.devices}"
        )
    for name in ("fill_up", "max_rounds") if rollout.dynamic_sampling == "none" else ():
        if getattr(rollout, name) != getattr(RolloutConfig(), name):
            raise UserError(f"rollout.{name}: set rollout.dynamic_sampling too, or leave it out")
    if rollout.dynamic_sampling != "none" and config.rl.samples_per_prompt == 1:
        raise UserError(
            "rollout.dynamic_sampling: nothing varies in a group of 1; leave it at none, or set "
            "rl.samples_per_prompt to at least 2"
        )
    for name in ("partial", "devices"):
        if rollout.engine == "http" and getattr(rollout, name):
            raise UserError(
                f"rollout.{name}: not with a server; leave it out, or use the jax engine"
            )
    if rollout.oversampling > 1 and not rollout.partial and rollout.dynamic_sampling == "none":
        raise UserError(
            "rollout.oversampling: all that it samples beyond the batch would be thrown away; set "
            "rollout.dynamic_sampling or rollout.partial, or leave it at 1"
        )
    if rollout.partial and rollout.oversampling == 1:
        raise UserError(
            "rollout.partial: nothing beyond the batch begins that could be carried over; set "
            "rollout.oversampling to more than 1, such as 1.5"
        )
    if objective.old_logprobs == "sampler":
        corrected = objective.surrogate != "reinforce"  # the ratio is to the sampler's
    else:
        corrected = objective.importance_correction != "none"
    for name in ("ahead", "partial"):
        if getattr(rollout, name) and not corrected:
            raise UserError(
                f"rollout.{name}: trains on what older parameters sampled, which needs a "
                "correction; set objective.old_logprobs=recompute and "
                "objective.importance_correction=token_truncate, or objective.old_logprobs=sampler "
                "and a surrogate with a ratio"
            )


def _check_mesh(config: Config) -> None:
    given = config.mesh.sizes
    if config.mesh.auto and (named := [name for name in given if given[name] is not None]):
        raise UserError(f"mesh.auto: chooses all sizes; leave out mesh.{named[0]}, or this")
    for name, size in given.items():
        if size == 0:
            raise UserError(f"mesh.{name}: a size is 1 or more, or -1 for the rest, got 0")
    if list(given.values()).count(-1) > 1:
        raise UserError(
            "mesh: only one of data, fsdp, tensor and context may be -1, the rest of the devices"
        )
    several = config.mesh.auto or any(size not in (None, 1) for size in given.values())
    if config.rollout.ahead and config.rollout.devices is None and several:
        raise UserError(
            "rollout.ahead: sampler and update would wait for each other on the same mesh; give "
            "the sampler rollout.devices of its own, or set it to 0"
        )


def _check_overlong(config: Config) -> None:
    task, limit = config.task, config.rollout.max_response_length
    if task.overlong_buffer is None:
        if task.overlong_factor != TaskConfig().overlong_factor:
            raise UserError("task.overlong_factor: set task.overlong_buffer too, or leave it out")
        return
    if task.overlong_buffer > limit:
        raise UserError(
            f"task.overlong_buffer: {task.overlong_buffer} is over "
            f"rollout.max_response_length={limit}"
        )
    if config.objective.advantage == "max_rl":
        raise UserError(
            "task.overlong_buffer: makes rewards negative, which objective.advantage=max_rl does "
            "not take; leave it out, or choose another advantage"
        )


def _check_server(rollout: RolloutConfig) -> None:
    server = rollout.server
    if rollout.engine == "jax":
        for field in dataclasses.fields(ServerConfig):
            if getattr(server, field.name) != field.default:
                raise UserError(
                    f"rollout.server.{field.name}: only a server has one; set rollout.engine=http"
                )
        return
    if server.url is None:
        raise UserError(
            "rollout.server.url: rollout.engine=http needs one, such as http://localhost:8000"
        )
    if not _is_address(server.url):
        raise UserError(
            f"rollout.server.url: {server.url!r} is no address such as http://localhost:8000 "
            "(without /v1 or anything behind it)"
        )
    if rollout.filtered and server.dialect == "sglang":
        raise UserError(
            "rollout.server.dialect: sglang gives log-probabilities from before top_k, top_p and "
            "min_p; leave them out, or use vllm"
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    beyond = parts.query or parts.fragment or parts.username or url.endswith(("/", "/v1"))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not beyond


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
    if len(set(lora.targets)) < len(lora.targets):
        raise UserError("lora.targets: names a matrix twice")
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
    _check_exponent(objective)
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


def _check_exponent(objective: ObjectiveConfig) -> None:
    adaptive = objective.adaptive
    if not isinstance(objective.alpha, str):
        for field in dataclasses.fields(AdaptiveConfig):
            if getattr(adaptive, field.name) != field.default:
                raise UserError(
                    f"objective.adaptive.{field.name}: set objective.alpha=beta too, or leave it "
                    "out"
                )
        return
    if objective.aggregation != "delta_l":
        raise UserError(
            f"objective.alpha: {objective.alpha} is an exponent of delta_l; set "
            "objective.aggregation=delta_l, or leave it out"
        )
    ends = adaptive.range
    if len(ends) != 2 or not -1 <= ends[0] <= ends[1] <= 3:
        raise UserError(
            "objective.adaptive.range: give the lowest and the highest exponent, both in -1 … 3, "
            f"such as [0.5, 1.25], got {list(ends)}"
        )
