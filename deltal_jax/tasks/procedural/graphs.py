"""Graphs: paths, colourings, islands and orders."""

import json
from collections.abc import Iterator

from deltal_jax.tasks.procedural.reading import Kind, Wrong, choice, given, integer, integers, plain

_STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
INFEASIBLE = "infeasible"


def read_directions(text: str, facts: dict) -> list[str]:
    """Directions, separated by spaces; or that there is no way."""
    del facts
    words = text.lower().replace(",", " ").split()
    if words != [INFEASIBLE] and (not words or set(words) - set(_STEPS)):
        raise Wrong("not a sequence of up, down, left and right")
    return words


def is_shortest(words: list[str], facts: dict) -> bool:
    """Whether they lead from * to # through open cells, and no way is shorter."""
    rows = facts["matrix"]
    cells = {(r, c): cell for r, row in enumerate(rows) for c, cell in enumerate(row)}
    at, goal = (next(k for k, cell in cells.items() if cell == sign) for sign in "*#")
    away = _distance(cells, at, goal)
    if words == [INFEASIBLE] or away is None:
        return words == [INFEASIBLE] and away is None
    for word in words:
        at = (at[0] + _STEPS[word][0], at[1] + _STEPS[word][1])
        if cells.get(at, "X") == "X":
            return False
    return at == goal and len(words) == away


def _distance(cells: dict[tuple[int, int], str], start: tuple, goal: tuple) -> int | None:
    seen, last, steps = {start}, [start], 0
    while last and goal not in seen:
        last = [
            at for at in dict.fromkeys(_next(last)) if at not in seen and cells.get(at, "X") != "X"
        ]
        seen |= set(last)
        steps += 1
    return steps if goal in seen else None


def _next(places: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((r + down, c + right) for r, c in places for down, right in _STEPS.values())


def read_colours(text: str, facts: dict) -> dict[str, int]:
    """The colour of each vertex as an object in JSON."""
    del facts
    colours = plain(text)
    if not isinstance(colours, dict) or not all(type(c) is int for c in colours.values()):
        raise Wrong("not a map of vertices to colours")
    return colours


def is_proper(colours: dict[str, int], facts: dict) -> bool:
    """Whether every vertex has a possible colour and no edge joins equal ones."""
    puzzle = facts["puzzle"]
    if set(colours) != {str(vertex) for vertex in puzzle["vertices"]}:
        return False
    if not set(colours.values()) <= set(puzzle["color_options"]):
        return False
    return all(colours[str(a)] != colours[str(b)] for a, b in puzzle["edges"])


KINDS: dict[str, Kind] = {
    "shortest_path": Kind(read_directions, is_shortest, given("matrix")),
    "graph_color": Kind(
        read_colours,
        is_proper,
        given("puzzle"),
        lambda entry: json.dumps(entry["metadata"]["possible_answer"]),
    ),
    "largest_island": Kind(integer, facts=given("grid")),
    "course_schedule": Kind(choice("true", "false"), facts=given("prerequisites")),
    "path_star": Kind(integers),
    "rotten_oranges": Kind(integer, facts=given("matrix")),
}
