"""Tasks of many domains from reasoning-gym's generators, verified by ourselves.

reasoning-gym's own scorers execute what a model wrote, so they are never called. To add a task is
to add an entry to the `KINDS` of its domain.
"""

from deltal_jax.tasks.procedural import algorithms, arithmetic, cognition, games, graphs, logic
from deltal_jax.tasks.procedural.reading import Kind

DOMAINS: dict[str, dict[str, Kind]] = {
    "logic": logic.KINDS,
    "algorithms": algorithms.KINDS,
    "games": games.KINDS,
    "graphs": graphs.KINDS,
    "cognition": cognition.KINDS,
    "arithmetic": arithmetic.KINDS,
}
#: Every task by its name, which is its data set's in reasoning-gym.
KINDS: dict[str, Kind] = {
    name: kind for domain in DOMAINS.values() for name, kind in domain.items()
}
