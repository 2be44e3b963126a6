"""Every field of an experiment: type, default, bounds and meaning. `tasks.py` has those of tasks.

To add one is to add a line here and to read it where it acts: a test fails on a field that nothing
reads. A rule across fields belongs to `rules.py`.
"""

import dataclasses
import math
import typing
from typing import Literal

from deltal_jax.config.declare import field
from deltal_jax.config.tasks import TaskConfig

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
Remat = Literal["none", "layer", "attention", "dots", "offload"]
Tracker = Literal["wandb", "trackio"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    name: str = field("run", "name of the experiment; part of the run folder's name")
    dir: str | None = field(None, "run folder; default: a new time-stamped one under runs/")
    trackers: tuple[Tracker, ...] = field(
        (), "who else is shown the metrics, each an extra of its name; TensorBoard always is"
    )
    report: bool = field(True, "write report.html at the end")
    grace_seconds: float | None = field(
        30.0,
        "from SIGTERM or SIGINT to the end; a rollout or evaluation that would take longer is left "
        "to the resumed run; null: the step is finished",
        low=0.0,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    chat_template: bool = field(
        False,
        "put prompts into the tokenizer's chat template: messages of the data as they are, text as "
        "a user's message",
    )
    overlong_prompts: Literal["drop", "error"] = field(
        "drop", "training prompts over rollout.max_prompt_length: leave out and count, or stop"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str | None = field(
        None, "a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-3B; null: a new model"
    )
    revision: str | None = field(None, "branch, tag or commit of a hub id; null: its default")
    param_dtype: DType = field(
        "float32", "type of the trained parameters; bfloat16 is rounded stochastically"
    )
    compute_dtype: DType = field("bfloat16", "type of activations and of the matrix products")
    attention: Literal["auto", "xla", "cudnn", "splash"] = field(
        "auto", "kernel of attention: cudnn on GPUs (not with rl.pack), splash on TPUs, else xla"
    )
    layers: int = field(3, "number of layers", low=1)
    d_model: int = field(64, "width of the residual stream", low=1)
    heads: int = field(2, "query heads", low=1)
    kv_heads: int | None = field(None, "key-value heads; default: as many as heads", low=1)
    head_dim: int | None = field(None, "size of a head (even); default: d_model / heads", low=2)
    d_ff: int = field(176, "width of the feed-forward layer", low=1)
    tied_embeddings: bool = field(False, "share the embedding with the output head")
    rope_theta: float = field(10_000.0, "base of the rotary frequencies", low=1.0)
    norm_epsilon: float = field(1e-6, "epsilon of RMSNorm", low=0.0)
    remat: Remat = field(
        "none",
        "what the backward pass computes anew, for less memory: none; layer: all of each layer; "
        "attention: all but attention; dots: only what is between matrix products; offload: as "
        "layer, with the layers' inputs in the host's memory",
        former={False: "none", True: "layer"},
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = field(0, "rank of adapters, which alone are trained; 0: train everything", low=0)
    alpha: float = field(32.0, "numerator of the adapters' factor alpha / rank", low=1e-9)
    targets: tuple[Projection, ...] = field(
        typing.get_args(Projection), "matrices that have adapters"
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    rule: Literal["adamw", "sgd"] = field(
        "adamw", "the step from the gradient; sgd has no momentum, and no use for Adam's fields"
    )
    learning_rate: float = field(3e-4, "peak learning rate", low=0.0)
    warmup_steps: int = field(0, "updates of linear warm-up from 0", low=0)
    schedule: Literal["constant", "cosine"] = field("constant", "shape after the warm-up")
    final_fraction: float = field(0.05, "where cosine ends, of the peak", low=0.0, high=1.0)
    b1: float = field(0.9, "decay of Adam's first moment", low=0.0, high=1 - 1e-9)
    b2: float = field(0.999, "decay of Adam's second moment", low=0.0, high=1 - 1e-9)
    epsilon: float = field(1e-8, "Adam's epsilon", low=0.0)
    weight_decay: float = field(0.0, "decoupled weight decay", low=0.0)
    clip_norm: float | None = field(1.0, "clip of the global gradient norm; null: none", low=1e-9)
    normalize: bool = field(
        False, "divide the gradient by its global norm, in the place of the clip"
    )
    moment_dtype: DType = field(
        "float32", "type that Adam's moments are stored in; bfloat16 is rounded stochastically"
    )
    offload: bool = field(
        False, "keep them in the host's memory, and on the devices only for the step itself"
    )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    steps: int = field(0, "updates of supervised warm-up on the task's demonstrations", low=0)
    tokens_per_batch: int = field(1024, "padded tokens of one update", low=1)
    log_every: int = field(100, "steps between two lines of metrics", low=1)
    optimizer: OptimizerConfig = field(OptimizerConfig, "optimizer of the warm-up")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    url: str | None = field(None, "its address, such as http://localhost:8000")
    dialect: Literal["vllm", "sglang"] = field("vllm", "what it is and speaks")
    weights_dir: str | None = field(
        None,
        "folder for new weights, of this run alone, that the server sees under the same path; "
        "default: served/ in the run folder",
    )
    timeout: float = field(600.0, "seconds that one request may take", low=0.01)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["jax", "http"] = field(
        "jax", "what samples for training: this process, or a server"
    )
    server: ServerConfig = field(ServerConfig, "where rollout.engine is http")
    slots: int = field(
        16, "responses that are decoded side by side; of a server, requests at once", low=1
    )
    max_prompt_length: int = field(8, "longest prompt in tokens, BOS included", low=1)
    max_response_length: int = field(192, "longest response in tokens, EOS included", low=1)
    temperature: float = field(1.0, "sampling temperature of training", low=0.01)
    top_k: int | None = field(None, "sample among so many best tokens; null: all", low=1)
    top_p: float = field(
        1.0, "sample among the best tokens that have this probability", low=1e-6, high=1.0
    )
    min_p: float = field(
        0.0, "sample among tokens of this part of the best one's probability", low=0.0, high=1.0
    )
    dynamic_sampling: Literal["none", "reward", "accuracy"] = field(
        "none", "train on groups in which this varies, and sample until there are enough"
    )
    max_rounds: int = field(10, "dynamic sampling: rounds at most, to find enough groups", low=1)
    fill_up: bool = field(
        True, "dynamic sampling: too few groups are filled up with others; false: the run stops"
    )
    oversampling: float = field(
        1.0, "prompts that a round may begin for each group that it needs", low=1.0, high=100.0
    )
    partial: bool = field(
        False, "carry what oversampling has begun over to the next step, finished or not"
    )
    ahead: int = field(
        0,
        "1: sample the next rollout, by the parameters before the update, while it runs",
        low=0,
        high=1,
    )
    devices: int | None = field(
        None,
        "so many, from the last on, sample only, so that ahead pays; null: those that train",
        low=1,
    )

    @property
    def filtered(self) -> bool:
        """Whether training samples among fewer tokens than the policy has."""
        return self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    start: int = field(8, "steps with an exponent of 1, before it first follows", low=1)
    every: int = field(5, "steps between two changes of the exponent", low=1)
    range: tuple[float, ...] = field((0.5, 1.25), "lowest and highest exponent, in -1 … 3")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    aggregation: Aggregation = field("delta_l", "weights of the responses' token sums")
    alpha: float | Literal["beta", "mse"] = field(
        1.0,
        "exponent of delta_l: a number; beta: it follows the measured growth of the gradient's "
        "variance with length; mse (experimental): it seeks the best agreement with past gradients",
        low=-1.0,
        high=3.0,
    )
    adaptive: AdaptiveConfig = field(AdaptiveConfig, "where objective.alpha is beta or mse")
    scope: Scope = field("batch", "what the weights are normalised over")
    normalizer: float | None = field(
        None, "the constant M; default: rollout.max_response_length", low=1e-9
    )
    rho: tuple[float, ...] | None = field(
        None, "autocorrelation of token gradients at distances 1, 2, …; for inverse_variance"
    )
    microbatch_size: int = field(4, "responses that local_token_mean averages over", low=1)
    overlong_filter: Literal["none", "truncated", "at_limit"] = field(
        "none",
        "responses of weight 0: those cut off, or all of max_response_length, ended there or not",
    )
    count_masked: bool = field(False, "keep filtered responses in the denominators")
    advantage: Advantage = field("group_standardize", "advantage estimator")
    surrogate: Surrogate = field("clipped", "per-token loss")
    clip_low: float | None = field(
        None, "lower clip range of the ratio; default: the surrogate's own", low=0.0
    )
    clip_high: float | None = field(
        None, "upper clip range of the ratio; default: the surrogate's own", low=0.0
    )
    dual_clip: float | None = field(
        None, "clipped: bound on the ratio where A < 0; null: none", low=1 + 1e-9
    )
    threshold: float | None = field(
        None, "dppo: how far a token's probability may move; default: 0.2", low=0.0, high=1.0
    )
    tau_positive: float | None = field(
        None, "sapo: temperature of the gate where A > 0; default: 1", low=1e-3
    )
    tau_negative: float | None = field(
        None, "sapo: temperature of the gate where A < 0; default: 1.05", low=1e-3
    )
    old_logprobs: Literal["sampler", "recompute"] = field(
        "sampler",
        "log-probabilities in the ratio's denominator: the sampler's or the trainer's own",
    )
    importance_correction: Correction = field(
        "none", "of the sampler's log-probabilities against recomputed ones"
    )
    correction_threshold: float = field(
        2.0, "largest trainer/sampler ratio that the correction lets pass", low=1.0
    )
    kl_coefficient: float = field(
        0.0, "of the KL to the model as RL began; 0: no reference model", low=0.0
    )
    kl_estimator: Literal["kl_k2", "kl_k3", "kl_k3_straight_through"] = field(
        "kl_k3_straight_through", "estimator of the KL in the loss"
    )
    entropy_coefficient: float = field(0.0, "of the entropy bonus", low=0.0)
    auxiliary_aggregation: Aggregation = field(
        "token_mean", "aggregation of the KL and entropy terms"
    )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    steps: int = field(100, "rollouts", low=0)
    prompts_per_step: int = field(16, "prompts of one rollout", low=1)
    samples_per_prompt: int = field(8, "responses to each prompt: the group", low=1)
    updates_per_rollout: int = field(1, "mini-batches, each one optimizer update", low=1)
    epochs_per_rollout: int = field(1, "passes over the rollout", low=1)
    tokens_per_microbatch: int = field(1024, "padded tokens at once; memory only", low=1)
    pack: bool = field(False, "several short responses to a row; speed and memory only")
    optimizer: OptimizerConfig = field(OptimizerConfig, "optimizer of the updates")

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * self.updates_per_rollout * self.epochs_per_rollout


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    every: int = field(20, "RL steps between evaluations; 0: only before and after", low=0)
    problems: int = field(512, "held-out problems, of each data set at most", low=1)
    samples_per_problem: int = field(1, "responses a problem: k of avg@k, pass@k and maj@k", low=1)
    temperature: float = field(1.0, "sampling temperature; 0 is greedy", low=0.0)
    rows: int = field(16, "responses in the readable table of each evaluation", low=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(50, "RL steps between checkpoints; 0: only after each phase", low=0)
    dir: str | None = field(
        None, "where they go, such as gs://bucket/run; null: checkpoints/ in the run folder"
    )
    keep_last: int = field(2, "newest checkpoints that are kept", low=1)
    keep_every: int = field(0, "and those after every so many RL steps; 0: none", low=0)
    keep_best: int = field(
        0, "and the best evaluations', which are saved at once, so many; 0: none", low=0
    )
    best_metric: str | None = field(
        None, "what the best have most of; default: eval/<task>/avg_at_k"
    )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    max_skipped: int = field(
        3, "updates in a row that are left out as not finite; one more stops the run", low=0
    )
    dumps: int = field(
        2, "steps with a left-out update that are kept in dumps/, for `deltal debug replay`", low=0
    )
    dump_steps: tuple[int, ...] | None = field(
        None, "RL steps that are kept so though nothing is wrong", low=1
    )
    mismatch_warn: float | None = field(
        0.03,
        "mean |Δ log p| of a token between sampler and trainer that warns; null: none",
        low=0.0,
    )
    mismatch_stop: float | None = field(
        0.5, "the same, that stops the run after the step; null: none", low=0.0
    )
    entropy_floor: float = field(
        0.2, "warn below this part of the highest entropy (means of 10 steps)", low=0.0, high=1.0
    )
    truncation_surge: float = field(
        0.25,
        "warn where the share of truncated responses is over its lowest by so much (means of 10 "
        "steps)",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class MetersConfig:
    variance: bool = field(
        False,
        "take the gradient of each micro-batch in two halves, whose difference tells its variance; "
        "objective.alpha=beta does so whatever this says",
    )
    every: int = field(
        0,
        "RL steps between two comparisons with the unweighted gradient, for which a third gradient "
        "is held; 0: none",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    seconds: float | None = field(
        900.0, "without a sign of life, compiling included, before it says so; null: never", low=0.1
    )
    action: Literal["warn", "stop"] = field(
        "warn", "then: say so and go on, or end the process with exit code 1"
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of 1 or more, or -1: the rest of the devices. Where none is given, one process uses one
    device, and several use all of theirs, over fsdp: then nothing is held twice."""

    auto: bool = field(
        False, "choose the sizes by the model, the longest row and the memory of the devices"
    )
    data: int | None = field(None, "devices that hold whole copies; rows are split", low=-1)
    fsdp: int | None = field(None, "devices that split parameters and moments, and rows", low=-1)
    tensor: int | None = field(None, "devices that split heads and the vocabulary", low=-1)
    context: int | None = field(None, "devices that split the tokens of long rows", low=-1)

    @property
    def sizes(self) -> dict[str, int | None]:
        """The size of each axis, as it is given."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "tensor": self.tensor,
            "context": self.context,
        }


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    run: RunConfig = field(RunConfig, "where results go")
    seed: int = field(0, "root of all randomness", low=0, high=2**31 - 1)
    length_buckets: tuple[int, ...] | None = field(
        None,
        "padded lengths (prompt + response); default: each a quarter longer, to the longest row",
        low=1,
    )
    task: TaskConfig = field(TaskConfig, "what is learnt")
    data: DataConfig = field(DataConfig, "how prompts are written")
    model: ModelConfig = field(ModelConfig, "the network")
    lora: LoraConfig = field(LoraConfig, "low-rank adapters")
    sft: SftConfig = field(SftConfig, "supervised warm-up")
    rollout: RolloutConfig = field(RolloutConfig, "sampling")
    objective: ObjectiveConfig = field(ObjectiveConfig, "the loss")
    rl: RlConfig = field(RlConfig, "reinforcement learning")
    evaluate: EvaluateConfig = field(EvaluateConfig, "evaluation on held-out problems")
    checkpoint: CheckpointConfig = field(CheckpointConfig, "checkpoints")
    meters: MetersConfig = field(MetersConfig, "what is measured of the gradients")
    guard: GuardConfig = field(GuardConfig, "when a run warns, leaves out an update, or stops")
    watchdog: WatchdogConfig = field(WatchdogConfig, "what notices that a run hangs")
    mesh: MeshConfig = field(MeshConfig, "devices that train; -1: the rest of them")

    @property
    def halves(self) -> bool:
        """Whether the gradient of each micro-batch is taken in two halves."""
        return self.meters.variance or self.objective.alpha == "beta"

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
