"""One program, compiled for devices that need not be here, and what it takes: as plain JSON."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from deltal_jax.errors import UserError
from deltal_jax.model.transformer import abstract_params
from deltal_jax.objective.logprobs import chunk_size
from deltal_jax.parallel.sharding import row_shards
from deltal_jax.planning import counting, hlo
from deltal_jax.planning.programs import Planned, Program

#: Changes where what is counted does, so that older results are not taken for new ones.
VERSION = 1
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one program takes of each chip."""

    name: str
    phase: str
    shape: tuple[int, int]
    held: dict[str, int]
    beside: int
    #: Of the compiler: arguments, outputs, aliased, temporaries, code; where it refuses, what it
    #: would need.
    memory: dict[str, int]
    refused: bool
    flops: float
    hbm_bytes: float
    #: kind, axes, members, bytes, dims, depth, count, sent.
    collectives: list[dict[str, Any]]
    kernels: dict[str, float]
    #: All-gathers of a whole stack outside the scan.
    stacks: list[dict[str, Any]]
    #: That compiling took of all processors together, and by the clock.
    cpu_seconds: float
    seconds: float

    @property
    def needed(self) -> int:
        """Bytes of each chip while it runs, with what the run keeps beside it."""
        m = self.memory
        if self.refused:
            return m["needed"] + self.beside
        own = m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"] + m["code"]
        return own + self.beside

    @property
    def sent(self) -> dict[tuple[str, ...], float]:
        """Bytes that a chip sends, by mesh axes."""
        found: dict[tuple[str, ...], float] = {}
        for own in self.collectives:
            axes = tuple(own["axes"])
            found[axes] = found.get(axes, 0.0) + own["sent"]
        return found


class Cache:
    """Results by a hash of the program, in one JSON file; a file that is not there is made.

    `texts` is a folder for the compiled programs themselves, to be read.
    """

    def __init__(self, path: Path | None = None, texts: Path | None = None):
        self._path, self._texts = path, texts
        self._known: dict[str, Any] = {}
        if path is not None and path.is_file():
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put there."""
        return self._known.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep it, on disk too."""
        self._known[key] = value
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            partial.replace(self._path)

    def keep(self, key: str, text: str) -> None:
        """The text of a compiled program, where someone wants it."""
        if self._texts is not None:
            self._texts.mkdir(parents=True, exist_ok=True)
            (self._texts / f"{key}.hlo.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


@contextlib.contextmanager
def no_compile_cache() -> Iterator[None]:
    """What is compiled for devices that are not there cannot be read back, so it is not kept."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_program(
    planned: Planned,
    program: Program,
    cache: Cache,
    say: Callable[[str], None],
    *,
    layout: bool = False,
) -> tuple[Compiled, Any]:
    """What it takes, from the cache where it is there; with `layout` also how its results lie, for
    which it is compiled all the same (None: not asked for, or refused).

    Raises UserError for what the compiler does not say of memory.
    """
    began, spent = time.monotonic(), time.process_time()
    lowered = program.lower()
    key = _key(lowered, planned)
    known, found_layout = cache.get(key), None
    if known is None or (layout and not known["refused"]):
        rows, width = program.shape
        say(f"compiling {program.name}" + (f" {rows} × {width}" if rows else ""))
        known, found_layout = _compile(
            planned, program, lowered, functools.partial(cache.keep, key)
        )
        known["seconds"] = round(time.monotonic() - began, 1)
        known["cpu_seconds"] = round(time.process_time() - spent, 1)
        known = json.loads(json.dumps(known))  # as another process reads it
        cache.put(key, known)
    found = Compiled(
        name=program.name,
        phase=program.phase,
        shape=program.shape,
        held=program.held,
        beside=program.beside,
        **known,
    )
    return found, found_layout if layout else None


def _key(lowered: jax.stages.Lowered, planned: Planned) -> str:
    device = planned.devices[0]
    version = getattr(device.client, "platform_version", "") if hasattr(device, "client") else ""
    said = f"{VERSION} {jax.__version__} {device.device_kind} {version} {len(planned.devices)}\n"
    return hashlib.sha256((said + lowered.as_text()).encode()).hexdigest()[:32]


def _compile(
    planned: Planned,
    program: Program,
    lowered: jax.stages.Lowered,
    keep: Callable[[str], None],
) -> tuple[dict[str, Any], Any]:
    nothing = {"flops": 0.0, "hbm_bytes": 0.0, "collectives": [], "kernels": {}, "stacks": []}
    try:
        with no_compile_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), sum(program.held.values()) - program.beside)
        if needed is None:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"plan: the compiler refuses {program.name}: {said}") from error
        return {"memory": {"needed": needed}, "refused": True, **nothing}, None
    analysis: Any = compiled.memory_analysis()
    names = {
        "arguments": "argument",
        "outputs": "output",
        "aliased": "alias",
        "code": "generated_code",
    }
    memory = {own: getattr(analysis, f"{name}_size_in_bytes") for own, name in names.items()}
    memory["temporaries"] = analysis.temp_size_in_bytes
    axes = {} if program.mesh is None else dict(program.mesh.shape)
    text = compiled.as_text() or ""
    keep(text)
    found = counting.count(hlo.parse(text), axes, _rounds(planned, program))
    layers = planned.arch.layers
    stacked = [x.shape for x in jax.tree.leaves(abstract_params(planned.arch)["blocks"])]
    stacks = counting.gathered_stacks(found, stacked, layers)
    return {
        "memory": memory,
        "refused": False,
        "flops": found.flops,
        "hbm_bytes": found.hbm_bytes,
        "collectives": [_plain(own) for own in found.collectives],
        "kernels": found.kernels,
        "stacks": [_plain(own) for own in stacks],
    }, compiled.output_shardings


def _plain(own: counting.Collective) -> dict[str, Any]:
    return dataclasses.asdict(own) | {"sent": own.sent}


def _rounds(planned: Planned, program: Program) -> float:
    """How often the loops of a program go round whose number depends on data: the head's over
    chunks, if every token is trained. Of decoding one round, which is one token of each slot."""
    if program.name not in ("add", "logprobs"):
        return 1.0
    shards = 1 if planned.mesh is None else row_shards(planned.mesh)
    tokens = math.prod(program.shape) // shards // (2 if planned.config.halves else 1)
    return math.ceil(tokens / chunk_size(tokens, planned.arch.vocab))


def _needed(said: str, arguments: int) -> int | None:
    """Bytes that a program would need, by the compiler's refusal; None: it says another thing."""
    all_ = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", said)
    temporaries = re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available", said)
    found = all_ or temporaries
    if found is None:
        return None
    return int(float(found[1]) * UNITS[found[2]]) + (0 if all_ else arguments)
