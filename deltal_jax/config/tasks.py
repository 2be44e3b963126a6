"""The fields of the tasks: a section for each that has any."""

import dataclasses
from typing import Literal

from deltal_jax.config.declare import field


@dataclasses.dataclass(frozen=True)
class CountDownConfig:
    form: Literal["trace", "text"] = field(
        "trace", "trace: short, in a small vocabulary; text: the paper's, with <think> and <answer>"
    )
    numbers: int = field(3, "how many numbers a problem gives", low=2, high=6)
    most_numbers: int | None = field(
        None, "where that varies, how many at most; null: always task.countdown.numbers", high=6
    )
    max_number: int = field(9, "largest given number", low=2, high=100)
    max_value: int = field(
        60, "largest target, and in traces largest intermediate value", low=4, high=1000
    )
    direct: float = field(
        0.1, "share of the warm-up's demonstrations that answer at once", low=0.0, high=1.0
    )
    grammar: Literal["strict", "reference"] = field(
        "strict", "who judges text: exact arithmetic, or the rules of the paper's code"
    )
    train: str | None = field(
        None, "file of problems in text form: .json, .jsonl or .parquet; null: they are generated"
    )
    eval: str | None = field(None, "file to evaluate on; null: the rows behind those to train on")
    rows: tuple[int, ...] = field(
        (32768, 1024), "how many rows to train on, the file's first, and to evaluate on"
    )


@dataclasses.dataclass(frozen=True)
class MathConfig:
    train: str | None = field(
        None, "file of problems to train on: .json, .jsonl or .parquet in a published format"
    )
    eval: tuple[str, ...] | None = field(None, "files of problems to evaluate on")
    verifier: Literal["math_verify", "reference"] = field(
        "math_verify", "who judges: the math-verify package, or the rules of the paper's code"
    )
    template: str = field(
        "boxed", "prompt: plain, boxed, user_assistant, or a text file that has {problem}"
    )
    workers: int = field(2, "processes that judge", low=1)


@dataclasses.dataclass(frozen=True)
class PathsConfig:
    nodes: int = field(10, "nodes of a graph", low=3, high=26)
    edges: int = field(16, "directed edges of a graph", low=2, high=100)
    distance: int = field(3, "edges between start and goal at least", low=1, high=8)


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    steps: int = field(120, "steps of a chain at most; lengths grow with them", low=4, high=999)
    modulus: int = field(7, "values are below it", low=3, high=100)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    name: str = field(
        "countdown",
        "which task to train on: countdown, math, paths, chain, mixture, one of reasoning-gym's "
        "such as knights_knaves, or file.py:Class",
    )
    countdown: CountDownConfig = field(CountDownConfig, "where task.name is countdown")
    math: MathConfig = field(MathConfig, "where task.name is math")
    paths: PathsConfig = field(PathsConfig, "where task.name is paths")
    chain: ChainConfig = field(ChainConfig, "where task.name is chain")
    procedural: dict[str, dict[str, float]] | None = field(
        None, "options of reasoning-gym's generators, such as {sudoku: {max_empty: 40}}"
    )
    mixture: dict[str, float] | None = field(
        None, "where task.name is mixture: weights, such as {countdown: 0.7, paths: 0.3}"
    )
    rewards: tuple[str, ...] | None = field(
        None, "what is maximised: task, file.py:function, 0.1 * file.py:function; null: [task]"
    )
    overlong_buffer: int | None = field(
        None,
        "soft overlong punishment: over the last so many tokens before the length limit the reward "
        "falls by up to overlong_factor; null: none",
        low=1,
    )
    overlong_factor: float = field(1.0, "what a response of the length limit loses", low=1e-9)


#: Sections of tasks, by the name of the task.
SECTIONS = tuple(
    f.name for f in dataclasses.fields(TaskConfig) if dataclasses.is_dataclass(f.default_factory)
)
