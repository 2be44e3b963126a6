"""Paths: a way from one node of a directed graph to another, each node at most once.

    prompt    a>c c>f a>d f>b d>e ? a b :
    response  a d e x a c f b ok <a> a c f b </a>

A response is a trace of walks and then an answer. A walk follows edges until it reaches the goal
(`ok`) or cannot go on (`x`). The verifier looks at the answer alone, and takes any path.
"""

import dataclasses
import random
import re
import string
import zlib
from collections.abc import Iterator
from itertools import islice, pairwise

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict

#: Longest answer that is read, in characters. The real ones have two a node.
MAX_ANSWER_LENGTH = 400
#: Most problems that are drawn for one that is held out.
MAX_DRAWS = 1000
#: Walks that are drawn for one that was not tried before.
MAX_REPEATS = 20
#: Every tenth class of problems is held out.
HELD_OUT_CLASSES = 10

_OPEN, _CLOSE = "<a>", "</a>"


@dataclasses.dataclass(frozen=True)
class Paths:
    """Graphs of `nodes` nodes and `edges` edges, whose goal is at least `distance` edges away.

    A problem is held out when crc32 of (sorted edges, start, goal) is 0 modulo 10.
    """

    nodes: int = 10
    edges: int = 16
    distance: int = 3
    #: Warm-up traces: share of direct answers, and the chance to give up after a miss.
    direct: float = 0.1
    give_up: float = 0.6
    #: A share of patient traces, so that long traces are seen at all: RL makes them common.
    patient: float = 0.3
    patient_give_up: float = 0.05

    name = "paths"

    def vocabulary(self) -> list[str]:
        names = string.ascii_lowercase[: self.nodes]
        return [
            *names,
            *(f"{a}>{b}" for a in names for b in names if a != b),
            *"? : x ok".split(),
            _OPEN,
            _CLOSE,
        ]

    def problem(self, seed: int, position: int) -> Problem:
        rng = random.Random(f"paths/train/{seed}/{position}")
        return next(p for p in self._problems(rng) if not self.is_held_out(p))

    def held_out(self, count: int) -> list[Problem]:
        stream = self._problems(random.Random("paths/held-out"))
        kept = list(islice(filter(self.is_held_out, islice(stream, MAX_DRAWS * count)), count))
        if len(kept) < count:
            raise UserError(
                f"task.paths: too few graphs of {self.nodes} nodes and {self.edges} edges are held "
                "out; raise task.paths.nodes"
            )
        return kept

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"paths/demonstrations/{seed}")
        for problem in self._problems(rng):
            if not self.is_held_out(problem):
                yield problem.prompt, self._trace(rng, problem)

    def parse_problem(self, text: str) -> Problem:
        match = re.fullmatch(r"\s*((?:[a-z]>[a-z]\s+)+)\?\s+([a-z])\s+([a-z])\s*:?\s*", text)
        if match is None:
            raise UserError(f"problem: {text!r} is not of the form 'a>c c>b a>d ? a b'")
        edges = match.group(1).split()
        allowed = string.ascii_lowercase[: self.nodes]
        for name in {*"".join(edges), *match.group(2, 3)} - {">"}:
            if name not in allowed:
                raise UserError(f"problem: node {name} is not in a … {allowed[-1]}")
        return _problem(edges, match.group(2), match.group(3))

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the last `<a> … </a>` is a path from start to goal along the edges."""
        end = response.rfind(_CLOSE)
        begin = response.rfind(_OPEN, 0, end)
        if begin < 0 or end < 0:
            return Verdict(0.0, False, "no answer")
        text = response[begin + len(_OPEN) : end]
        if len(text) > MAX_ANSWER_LENGTH:
            return Verdict(0.0, False, "answer too long")
        walk = text.split()
        reason = _refusal(walk, answer)
        return Verdict(float(not reason), not reason, reason or "correct", " ".join(walk))

    @staticmethod
    def is_held_out(problem: Problem) -> bool:
        """Whether the problem is kept from training: a property of the graph and of its ends."""
        given = problem.answer
        identity = (sorted(given["edges"]), given["start"], given["goal"])
        return zlib.crc32(repr(identity).encode()) % HELD_OUT_CLASSES == 0

    def _problems(self, rng: random.Random) -> Iterator[Problem]:
        names = string.ascii_lowercase[: self.nodes]
        every = [f"{a}>{b}" for a in names for b in names if a != b]
        while True:
            edges, (start, goal) = rng.sample(every, self.edges), rng.sample(names, 2)
            away = _distances(_neighbours(edges), start).get(goal)
            if away is not None and away >= self.distance:
                yield _problem(edges, start, goal)

    def _trace(self, rng: random.Random, problem: Problem) -> str:
        given = problem.answer
        neighbours = _neighbours(given["edges"])
        direct = rng.random() < self.direct
        give_up = self.patient_give_up if rng.random() < self.patient else self.give_up
        said: list[str] = []
        tried: list[list[str]] = []
        while True:
            draws = (
                _random_walk(rng, neighbours, given["start"], given["goal"])
                for _ in range(MAX_REPEATS)
            )
            walk = next((walk for walk in draws if walk not in tried), None)
            if walk is None:  # there is nothing else to try, as far as one can tell
                walk = tried[-1]
            tried.append(walk)
            hit = walk[-1] == given["goal"]
            if not direct:
                said += [*walk, "ok" if hit else "x"]
            if hit or direct or rng.random() < give_up:
                return " ".join([*said, _OPEN, *walk, _CLOSE])


def _problem(edges: list[str], start: str, goal: str) -> Problem:
    prompt = f"{' '.join(edges)} ? {start} {goal} :"
    return Problem(prompt, {"edges": edges, "start": start, "goal": goal})


def _refusal(walk: list[str], given: dict) -> str:
    """Why this is no path from start to goal; empty where it is one."""
    if not walk or walk[0] != given["start"] or walk[-1] != given["goal"]:
        return "does not lead from start to goal"
    if len(set(walk)) < len(walk):
        return "visits a node twice"
    edges = set(given["edges"])
    for a, b in pairwise(walk):
        if f"{a}>{b}" not in edges:
            return f"has no edge {a}>{b}"
    return ""


def _neighbours(edges: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for edge in edges:
        found.setdefault(edge[0], []).append(edge[2])
    return found


def _distances(neighbours: dict[str, list[str]], start: str) -> dict[str, int]:
    """Edges from `start` to every node that can be reached."""
    found, last = {start: 0}, [start]
    while last:
        last = [b for a in last for b in neighbours.get(a, ()) if b not in found]
        found |= dict.fromkeys(last, max(found.values()) + 1)
    return found


def _random_walk(
    rng: random.Random, neighbours: dict[str, list[str]], start: str, goal: str
) -> list[str]:
    """From start along random edges to unvisited nodes, until the goal or a dead end."""
    walk = [start]
    while walk[-1] != goal:
        onward = [b for b in neighbours.get(walk[-1], ()) if b not in walk]
        if not onward:
            break
        walk.append(rng.choice(onward))
    return walk
