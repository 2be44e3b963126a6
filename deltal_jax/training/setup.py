"""From a config to the parts of a run: task, tokenizer, model definition, engines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from deltal_jax.config import Config, TaskConfig
from deltal_jax.data.prompts import encode_prompts
from deltal_jax.data.tokenizer import Tokenizer, load_tokenizer, train_word_tokenizer
from deltal_jax.model.transformer import Architecture, init_model, make_graphdef, split_model
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.tasks.base import Task
from deltal_jax.tasks.countdown import CountDown
from deltal_jax.training.objective import make_loss


def _countdown(task: TaskConfig) -> Task:
    return CountDown(task.numbers, task.max_number, task.max_value)


#: What `task.name` may name.
TASKS: dict[str, Callable[[TaskConfig], Task]] = {"countdown": _countdown}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    config: Config
    task: Task
    tokenizer: Tokenizer
    architecture: Architecture
    graphdef: nnx.GraphDef


def make_setup(config: Config, tokenizer_model: bytes | None = None) -> Setup:
    """The parts that a config names; the tokenizer comes from its bytes or is trained anew."""
    task = make_task(config)
    if tokenizer_model is None:
        tokenizer = train_word_tokenizer(task.vocabulary())
    else:
        tokenizer = load_tokenizer(tokenizer_model)
    architecture = make_architecture(config, tokenizer.vocab_size)
    return Setup(config, task, tokenizer, architecture, make_graphdef(architecture))


def check_setup(setup: Setup) -> None:
    """Raises UserError for what only the parts can tell: no held-out problem, too long a prompt, an
    option that the surrogate does not take."""
    config = setup.config
    make_loss(config)
    problems = [*setup.task.held_out(config.evaluate.problems), setup.task.problem(config.seed, 0)]
    encode_prompts(problems, setup.tokenizer, config.rollout.max_prompt_length)


def make_task(config: Config) -> Task:
    """The task of a config."""
    return TASKS[config.task.name](config.task)


def make_architecture(config: Config, vocab: int) -> Architecture:
    """The model's shape, defaults filled in."""
    model = dataclasses.asdict(config.model)
    model["kv_heads"] = model["kv_heads"] or model["heads"]
    model["head_dim"] = model["head_dim"] or model["d_model"] // model["heads"]
    return Architecture(vocab=vocab, **model)


def init_params(setup: Setup, key: jax.Array) -> Any:
    """Fresh parameters, in one compiled program."""
    return jax.jit(lambda key: split_model(init_model(setup.architecture, key))[1])(key)


def make_engine(setup: Setup, *, temperature: float, slots: int | None = None) -> Engine:
    """A sampler for this model."""
    rollout = setup.config.rollout
    options = SamplingOptions(
        slots=slots or rollout.slots,
        max_response_length=rollout.max_response_length,
        eos_ids=setup.tokenizer.eos_ids,
        temperature=temperature,
    )
    return Engine(setup.graphdef, options)
