"""Algorithms: sequences of steps on lists, strings, jugs and words."""

import collections
import functools
import itertools
import re
import string
from typing import Any

from deltal_jax.tasks.procedural.reading import (
    Kind,
    Wrong,
    decimals,
    given,
    integer,
    integers,
    plain,
    reasoning_gym,
)

_MOVE = re.compile(r"(fill|empty) ([A-Z])|pour ([A-Z]) ?-> ?([A-Z])", re.ASCII)
_LETTER = re.compile(r"([A-Z])\s*[=:]\s*(\d)", re.ASCII)


def read_groups(text: str, facts: dict) -> list[list[str]]:
    """Groups of words as lists in JSON; neither order matters."""
    del facts
    groups = plain(text)
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise Wrong("not a list of lists")
    if not all(isinstance(word, str) for group in groups for word in group):
        raise Wrong("not lists of words")
    return sorted(sorted(word.lower() for word in group) for group in groups)


def read_letters(text: str, facts: dict) -> str:
    """A single word, perhaps in quotes."""
    del facts
    return text.strip().strip("\"'").lower()


def is_palindrome(word: str, facts: dict) -> bool:
    """Whether it reads the same backwards and uses the letters, each once."""
    return word == word[::-1] and sorted(word) == sorted(facts["letters"])


def read_moves(text: str, facts: dict) -> list[str]:
    """Moves of jugs as a list in JSON."""
    jugs = [chr(ord("A") + i) for i in range(len(facts["puzzle"]["jug_capacities"]))]
    moves = plain(text)
    if not isinstance(moves, list) or not all(isinstance(move, str) for move in moves):
        raise Wrong("not a list of moves")
    for move in moves:
        match = _MOVE.fullmatch(move.strip())
        if match is None or any(jug not in jugs for jug in match.groups()[1:] if jug):
            raise Wrong("not a move: fill A, empty A or pour A->B")
    return [move.strip() for move in moves]


def reaches_target(moves: list[str], facts: dict) -> bool:
    """Whether a jug holds the target after the last move."""
    capacities, target = facts["puzzle"]["jug_capacities"], facts["puzzle"]["target"]
    held = [0] * len(capacities)
    for move in moves:
        match = _MOVE.fullmatch(move)
        assert match is not None  # read_moves
        verb, jug, source, sink = match.groups()
        if verb:
            at = ord(jug) - ord("A")
            held[at] = capacities[at] if verb == "fill" else 0
            continue
        i, j = ord(source) - ord("A"), ord(sink) - ord("A")
        if i != j:
            poured = min(held[i], capacities[j] - held[j])
            held[i], held[j] = held[i] - poured, held[j] + poured
    return target in held


def read_ladder(text: str, facts: dict) -> list[str]:
    """Words that are separated by commas."""
    del facts
    return [word.strip().upper() for word in text.split(",")]


def is_ladder(words: list[str], facts: dict) -> bool:
    """Whether known words lead from start to end, each one letter from the one before."""
    if (words[0], words[-1]) != (facts["start_word"], facts["end_word"]):
        return False
    known = dictionary(len(facts["start_word"]))
    if not all(word in known for word in words):
        return False
    pairs = itertools.pairwise(words)
    return all(sum(x != y for x, y in zip(a, b, strict=True)) == 1 for a, b in pairs)


@functools.cache
def dictionary(length: int) -> frozenset[str]:
    """The words of this length, in capitals, that the generator makes its ladders of."""
    bounds = {"min_word_length": length, "max_word_length": length}
    return frozenset(reasoning_gym().create_dataset("word_ladder", **bounds).word_sets[length])


def shortest_ladder(start: str, end: str) -> list[str]:
    """A shortest ladder, always the same: the generator's own depends on the order of a set."""
    known = dictionary(len(start))
    before: dict[str, str] = {start: ""}
    waiting = collections.deque([start])
    while end not in before:
        word = waiting.popleft()
        for i, letter in itertools.product(range(len(word)), string.ascii_uppercase):
            near = word[:i] + letter + word[i + 1 :]
            if near in known and near not in before:
                before[near] = word
                waiting.append(near)
    ladder = [end]
    while before[ladder[-1]]:
        ladder.append(before[ladder[-1]])
    return ladder[::-1]


def read_digits(text: str, facts: dict) -> dict[str, int]:
    """The digit of each letter, from 'A=1,B=2'."""
    found: dict[str, int] = {}
    for part in text.strip().rstrip(".").split(","):
        match = _LETTER.fullmatch(part.strip())
        if match is None or match[1] in found:
            raise Wrong("not of the form A=1,B=2, each letter once")
        found[match[1]] = int(match[2])
    if set(found) != set("".join([*facts["words_letters"], facts["result_letters"]])):
        raise Wrong("not the letters of the puzzle")
    return found


def adds_up(digits: dict[str, int], facts: dict) -> bool:
    """Whether different digits for the letters make the sum true, no number starting with 0."""
    *words, result = [*facts["words_letters"], facts["result_letters"]]
    if len(set(digits.values())) < len(digits):
        return False
    if not facts["allow_leading_zero"] and any(digits[w[0]] == 0 for w in (*words, result)):
        return False

    def value(word: str) -> int:
        return int("".join(str(digits[letter]) for letter in word))

    return sum(map(value, words)) == value(result)


def _letters(entry: dict) -> dict[str, Any]:
    return {"letters": sorted(entry["metadata"]["letters"])}


def _ladder(entry: dict) -> str:
    metadata = entry["metadata"]
    return ",".join(shortest_ladder(metadata["start_word"], metadata["end_word"]))


KINDS: dict[str, Kind] = {
    "spiral_matrix": Kind(integers, facts=given("matrix")),
    "number_sorting": Kind(decimals, facts=given("original_numbers", "direction")),
    "group_anagrams": Kind(read_groups, facts=given("words")),
    "palindrome_generation": Kind(read_letters, is_palindrome, _letters),
    "binary_alternation": Kind(integer, facts=given("string")),
    "jugs": Kind(read_moves, reaches_target, given("puzzle")),
    "word_ladder": Kind(read_ladder, is_ladder, given("start_word", "end_word"), _ladder),
    "cryptarithm": Kind(
        read_digits, adds_up, given("words_letters", "result_letters", "allow_leading_zero")
    ),
}
