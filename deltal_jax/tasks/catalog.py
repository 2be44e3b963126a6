"""Every task by its name in a config."""

from collections.abc import Callable

from deltal_jax.config import TaskConfig
from deltal_jax.errors import UserError
from deltal_jax.objective.names import unknown_name
from deltal_jax.tasks.base import Task
from deltal_jax.tasks.chain import Chain
from deltal_jax.tasks.countdown.data import Given
from deltal_jax.tasks.countdown.text import CountDownRows, CountDownText
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.files import find_data, load_task
from deltal_jax.tasks.math.task import Math
from deltal_jax.tasks.mixture import Mixture
from deltal_jax.tasks.paths import Paths
from deltal_jax.tasks.procedural import KINDS
from deltal_jax.tasks.procedural.generated import Generated


def make_task(config: TaskConfig) -> Task:
    """The task that the config names. Raises UserError if there is none."""
    for name in config.procedural or ():
        if name not in KINDS:
            raise UserError(unknown_name("task.procedural", name, KINDS))
        if name not in (config.name, *(config.mixture or ())):
            raise UserError(f"task.procedural.{name}: set task.name={name}, or leave it out")
    return _named(config.name, config)


def _named(name: str, config: TaskConfig) -> Task:
    if name in TASKS:
        return TASKS[name](config)
    if name in KINDS:
        options = (config.procedural or {}).get(name, {})
        return Generated(
            name, {k: int(v) if float(v).is_integer() else v for k, v in options.items()}
        )
    if ".py:" in name:
        return load_task(name)
    raise UserError(unknown_name("task.name", name, [*TASKS, *KINDS]))


def _countdown(config: TaskConfig) -> Task:
    options = config.countdown
    size = {
        "numbers": options.numbers,
        "most_numbers": options.most_numbers,
        "max_number": options.max_number,
        "max_value": options.max_value,
        "direct": options.direct,
    }
    if options.form == "trace":
        return CountDown(**size)
    if options.train is None:
        return CountDownText(**size, grammar=options.grammar)
    held_out = None if options.eval is None else find_data(options.eval)
    train_rows, eval_rows = options.rows
    given = Given(find_data(options.train), train_rows, eval_rows, held_out)
    return CountDownRows(**size, grammar=options.grammar, given=given)


def _math(config: TaskConfig) -> Task:
    options = config.math
    assert options.train is not None and options.eval is not None  # by the config's rules
    return Math(
        str(find_data(options.train)),
        [str(find_data(name)) for name in options.eval],
        verifier=options.verifier,
        template=options.template,
        workers=options.workers,
    )


def _paths(config: TaskConfig) -> Task:
    options = config.paths
    return Paths(options.nodes, options.edges, options.distance)


def _chain(config: TaskConfig) -> Task:
    return Chain(config.chain.steps, config.chain.modulus)


def _mixture(config: TaskConfig) -> Task:
    weights = config.mixture or {}  # by the config's rules one is over 0
    return Mixture([(_named(name, config), weight) for name, weight in weights.items() if weight])


#: What `task.name` may name, beside the procedural `KINDS` and file.py:Class.
TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "countdown": _countdown,
    "math": _math,
    "paths": _paths,
    "chain": _chain,
    "mixture": _mixture,
}
