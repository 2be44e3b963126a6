"""Judgements of answers to procedural problems by other means than the verifiers': enumeration,
another formula, or another simulation. A value is as `procedural_cases` reads it."""

import itertools
import math
import re
import string
from collections import Counter
from fractions import Fraction
from typing import Any

from reasoning_gym.data import read_data_file

Facts = dict[str, Any]


def integers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"-?\d+", text)]


def fits(rows: list[list], puzzle: list[list]) -> bool:
    """The same size, and the cells that are given."""
    if [len(r) for r in rows] != [len(r) for r in puzzle]:
        return False
    pairs = zip(cells(rows), cells(puzzle), strict=True)
    return all(clue in (0, "_", cell) for cell, clue in pairs)


def cells(rows: list[list]) -> list:
    return [cell for row in rows for cell in row]


def is_square(rows: list[list[int]], box: int | None) -> bool:
    n = len(rows)
    groups = [[(r, c) for c in range(n)] for r in range(n)]
    groups += [[(r, c) for r in range(n)] for c in range(n)]
    if box:
        at = itertools.product(range(0, n, box), repeat=2)
        groups += [[(a + r, b + c) for r in range(box) for c in range(box)] for a, b in at]
    return all(sorted(rows[r][c] for r, c in g) == list(range(1, n + 1)) for g in groups)


def sudoku(rows: list[list[int]], facts: Facts) -> bool:
    return fits(rows, facts["puzzle"]) and is_square(rows, math.isqrt(len(facts["puzzle"])))


def futoshiki(rows: list[list[int]], facts: Facts) -> bool:
    if not fits(rows, facts["puzzle"]) or not is_square(rows, None):
        return False
    signs = {"<": int.__lt__, ">": int.__gt__}
    return all(signs[s](rows[a][b], rows[c][d]) for a, b, c, d, s in facts["constraints"])


def kakurasu(rows: list[list[int]], facts: Facts) -> bool:
    height, width = len(facts["row_sums"]), len(facts["col_sums"])
    if [len(r) for r in rows] != [width] * height or not set(cells(rows)) <= {0, 1}:
        return False
    across = [sum((c + 1) * row[c] for c in range(width)) for row in rows]
    down = [sum((r + 1) * rows[r][c] for r in range(height)) for c in range(width)]
    return across == facts["row_sums"] and down == facts["col_sums"]


def survo(rows: list[list[int]], facts: Facts) -> bool:
    puzzle, n = facts["puzzle"], len(facts["puzzle"])
    if not fits(rows, puzzle):
        return False
    placed = [rows[r][c] for r in range(n) for c in range(n) if puzzle[r][c] == 0]
    across = all(2 * row[-1] == sum(row) for row in rows)
    down = all(2 * rows[-1][c] == sum(row[c] for row in rows) for c in range(n))
    return across and down and sorted(placed) == sorted(facts["candidate_numbers"])


def says(said: list, truth: tuple[bool, ...]) -> bool:
    match said:
        case ["telling-truth" | "lying" as role, who]:
            return truth[who] is (role == "telling-truth")
        case ["not", inner]:
            return not says(inner, truth)
        case ["and", *inner]:
            return min(says(part, truth) for part in inner)
        case ["or", *inner]:
            return max(says(part, truth) for part in inner)
        case ["->", a, b]:
            return says(a, truth) <= says(b, truth)
        case ["<=>", a, b]:
            return says(a, truth) is says(b, truth)
    raise AssertionError(said)


def knights(value: dict[str, str], facts: Facts) -> bool:
    """Among all consistent assignments, written out."""
    names, every = facts["names"], itertools.product([True, False], repeat=len(facts["names"]))
    roles = {True: facts["knight"], False: facts["knave"]}
    consistent = [
        dict(zip(names, map(roles.__getitem__, truth), strict=True))
        for truth in every
        if all(says(s, truth) == truth[i] for i, s in enumerate(facts["statements"]))
    ]
    return value in consistent


def circuit(facts: Facts) -> int:
    """Gates of the terms, then the gate of all: by counting ones."""
    terms, values = re.findall(r"\(([^)]*)\)", facts["expression"]), []
    for term in terms:
        bits = [
            facts["assignments"][name] ^ bool(negated)
            for name, negated in re.findall(r"([A-Z]+)('?)", term)
        ]
        ones, gate = sum(bits), (re.findall(r"[&↑⊕]", term) or "&")[0]
        values.append({"&": ones == len(bits), "↑": ones < len(bits), "⊕": ones % 2 == 1}[gate])
    ones, gates = sum(values), re.findall(r"\)(.)\(", facts["expression"])
    gate = gates[0]
    return int({"+": ones > 0, "↓": ones == 0, "⊕": ones % 2 == 1, "&": ones == len(values)}[gate])


def self_reference(facts: Facts) -> int:
    """Every assignment of the seven statements, by the numbers in their text."""
    a, b, c, d = (int(n) for n in re.findall(r"(?:least|most|Exactly) (\d+)", facts["question"]))
    found = 0
    for truth in itertools.product([False, True], repeat=7):
        t = sum(truth)
        claims = (t >= a, 7 - t <= b, t == c, 7 - t == d, truth[2] != truth[3])
        found += truth == (*claims, t in (2, 3, 5, 7), 7 - t in (4, 6))
    return found


def spiral(value: list[int], facts: Facts) -> bool:
    """Take the first row, then turn the rest to the left."""
    rows, found = [list(row) for row in facts["matrix"]], []
    while rows:
        found += rows.pop(0)
        rows = [list(row) for row in zip(*rows, strict=True)][::-1]
    return value == found


def sorting(value: list[str], facts: Facts) -> bool:
    if not all(re.fullmatch(r"-?\d+(\.\d+)?", v) for v in value):
        return False
    numbers = [Fraction(n) for n in facts["original_numbers"]]
    signs = {"ascending": 1, "descending": -1}
    return [Fraction(v) for v in value] == sorted(
        numbers, key=lambda n: signs[facts["direction"]] * n
    )


def anagrams(value: list[list[str]], facts: Facts) -> bool:
    words = Counter(word for group in value for word in group)
    keys = [{"".join(sorted(word)) for word in group} for group in value]
    apart = len({frozenset(key) for key in keys}) == len(keys)
    return words == Counter(facts["words"]) and apart and all(len(key) == 1 for key in keys)


def alternation(facts: Facts) -> int:
    """The misplaced ones of either pattern that has as many ones; each swap places two."""
    said, found = facts["string"], []
    for first in "01":
        pattern = "".join("01"[(i + int(first)) % 2] for i in range(len(said)))
        if pattern.count("1") == said.count("1"):
            found.append(sum(x != y for x, y in zip(said, pattern, strict=True)) // 2)
    return min(found, default=-1)


def jugs(value: list[str], facts: Facts) -> bool:
    sizes = facts["puzzle"]["jug_capacities"]
    size = dict(zip("ABCDEFGH", sizes, strict=False))
    held = dict.fromkeys(size, 0)
    for move in value:
        verb, _, what = move.partition(" ")
        if verb in ("fill", "empty") and what in held:
            held[what] = size[what] if verb == "fill" else 0
        elif verb == "pour" and re.fullmatch("[A-H]->[A-H]", what) and {*what} - {*"->"} <= {*held}:
            a, b = what[0], what[-1]
            while a != b and held[a] and held[b] < size[b]:
                held[a] -= 1
                held[b] += 1
        else:
            return False
    return facts["puzzle"]["target"] in held.values()


def ladder(value: list[str], facts: Facts) -> bool:
    known = set(read_data_file("words.csv").upper().replace("\n", ",").split(","))
    if value[:1] != [facts["start_word"]] or value[-1:] != [facts["end_word"]]:
        return False
    near = [
        len(a) == len(b) and sum(map(str.__ne__, a, b)) == 1 for a, b in itertools.pairwise(value)
    ]
    return all(near) and set(value) <= known


def cryptarithm(value: dict[str, int], facts: Facts) -> bool:
    """By the weight of each letter in the sum."""
    weights: Counter[str] = Counter()
    words = [(word, 1) for word in facts["words_letters"]] + [(facts["result_letters"], -1)]
    for word, sign in words:
        for place, letter in enumerate(reversed(word)):
            weights[letter] += sign * 10**place
    digits = list(value.values())
    return (
        set(value) == set(weights)
        and set(digits) <= set(range(10))
        and len(set(digits)) == len(digits)
        and all(value[word[0]] for word, _ in words)
        and sum(weights[letter] * digit for letter, digit in value.items()) == 0
    )


def queens(rows: list[list[str]], facts: Facts) -> bool:
    if not fits(rows, facts["puzzle"]) or not set(cells(rows)) <= {"_", "Q"}:
        return False
    at = [(r, c) for r, row in enumerate(rows) for c, x in enumerate(row) if x == "Q"]
    peace = all(
        a != c and b != d and abs(a - c) != abs(b - d)
        for (a, b), (c, d) in itertools.combinations(at, 2)
    )
    return peace and len(at) == len(rows)


def hanoi(value: list[list[int]], facts: Facts) -> bool:
    """By where each disk is: the smaller ones must be on neither peg of a move."""
    at = dict.fromkeys(range(1, facts["num_disks"] + 1), facts["start_peg"])
    if any(len(move) != 3 for move in value):
        return False
    for disk, a, b in value:
        if disk not in at or at[disk] != a or not 1 <= b <= facts["num_pegs"]:
            return False
        if any(at[smaller] in (a, b) for smaller in range(1, disk)):
            return False
        at[disk] = b
    return set(at.values()) == {facts["target_peg"]}


def twenty_four(value: list[str], facts: Facts) -> bool:
    """By Python's own reading of the tests' own text; signs only where a term begins."""
    said = " ".join(value)
    if re.search(
        r"[-+*/]\s*[-+]|^\s*\+|\(\s*\+|\d\s+\d|\*\s*\*|/\s*/|\(\s*\)|\d\s*\(|\)\s*[\d(]", said
    ):
        return False
    exact = re.sub(r"\d+", lambda m: f"Fraction({int(m[0])})", said)
    try:
        result = eval(exact, {"Fraction": Fraction, "__builtins__": {}})
    except (SyntaxError, ZeroDivisionError):
        return False
    return result == 24 and sorted(integers(re.sub("-", " ", said))) == sorted(facts["numbers"])


def sokoban(value: str, facts: Facts) -> bool:
    """On the characters of the board, which say what lies under them."""
    cells = {
        r + 1j * c: cell
        for r, line in enumerate(facts["gamestr"].splitlines())
        for c, cell in enumerate(line.split())
    }
    under = {at: "X" if cell in "X$%" else "-" for at, cell in cells.items()}
    on = {
        at: {"*": "P", "%": "P", "@": "B", "$": "B", "+": "#"}.get(x, "") for at, x in cells.items()
    }
    for key in value:
        step = {"U": -1, "D": 1, "L": -1j, "R": 1j}.get(key)
        if step is None:
            return False
        me = next(at for at, what in on.items() if what == "P")
        if on[me + step] == "B" and on[me + 2 * step] == "":
            on[me + 2 * step], on[me + step] = "B", ""
        if on[me + step] == "":
            on[me + step], on[me] = "P", ""
    return bool(value) and all(under[at] == "X" for at, what in on.items() if what == "B")


def shortest(value: list[str], facts: Facts) -> bool:
    """Each step comes one nearer to the goal, by distances that relaxation finds."""
    rows = facts["matrix"]
    open_ = {r + 1j * c: x for r, row in enumerate(rows) for c, x in enumerate(row) if x != "X"}
    steps = {"up": -1, "down": 1, "left": -1j, "right": 1j}
    away = {at: 0.0 if x == "#" else math.inf for at, x in open_.items()}
    for _ in open_:
        away = {
            at: min([d, *(1 + away[at + s] for s in steps.values() if at + s in away)])
            for at, d in away.items()
        }
    at = next(at for at, x in open_.items() if x == "*")
    if away[at] == math.inf or value == ["infeasible"]:
        return away[at] == math.inf and value == ["infeasible"]
    for word in value:
        before, at = away[at], at + steps.get(word, 99)
        if away.get(at) != before - 1:
            return False
    return away[at] == 0


def colouring(value: dict[str, int], facts: Facts) -> bool:
    puzzle = facts["puzzle"]
    wrong = sum(value.get(str(a)) == value.get(str(b)) for a, b in puzzle["edges"])
    allowed = all(value.get(str(v)) in puzzle["color_options"] for v in puzzle["vertices"])
    return not wrong and allowed and len(value) == len(puzzle["vertices"])


def island(facts: Facts) -> int:
    """By labels that spread: neighbours take the smaller one until nothing changes."""
    label = {
        (r, c): (r, c) for r, row in enumerate(facts["grid"]) for c, x in enumerate(row) if x == 1
    }
    for _ in label:
        for r, c in list(label):
            near = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
            label[r, c] = min([label[r, c], *(label[at] for at in near if at in label)])
    return max(Counter(label.values()).values(), default=0)


def schedule(value: str, facts: Facts) -> bool:
    """Courses without an open prerequisite are taken until none is left, or none can be."""
    needed = {course for pair in facts["prerequisites"] for course in pair}
    open_ = [tuple(pair) for pair in facts["prerequisites"]]
    while free := needed - {a for a, _ in open_}:
        needed -= free
        open_ = [(a, b) for a, b in open_ if b not in free]
    return value == str(not needed)


def star(value: list[int], facts: Facts) -> bool:
    said = facts["question"].strip().splitlines()[-1]
    edges = {(int(a), int(b)) for a, b in re.findall(r"\|(\d+) (\d+)", said)}
    start, goal = integers(said.rpartition("/")[2])
    ends = value[:1] == [start] and value[-1:] == [goal]
    return ends and set(itertools.pairwise(value)) <= edges


def oranges(facts: Facts) -> int:
    cells = {r + 1j * c: x for r, row in enumerate(facts["matrix"]) for c, x in enumerate(row)}
    for minute in itertools.count():
        if 1 not in cells.values():
            return minute
        rotten = {at + s for at, x in cells.items() if x == 2 for s in (1, -1, 1j, -1j)}
        new = {at: 2 if x == 1 and at in rotten else x for at, x in cells.items()}
        if new == cells:
            return -1
        cells = new
    raise AssertionError


def needle(value: str, facts: Facts) -> bool:
    story, _, asked = facts["question"].rpartition("\nWho ")
    what = asked.partition("?")[0]
    sentences = [s.strip() for s in story.split(".")]
    return any(sentence == f"{value} {what}" for sentence in sentences)


def caesar(value: str, facts: Facts) -> bool:
    """A shift of the cipher whose words are all of the book that the generator quotes."""
    book = {w.upper() for w in re.findall(r"[A-Za-z]+", read_data_file("in_the_year_2889.txt"))}
    cipher, ways = facts["cipher_text"], []
    letters = string.ascii_uppercase
    for shift in range(26):
        plain = cipher.translate(str.maketrans(letters, letters[shift:] + letters[:shift]))
        if set(plain.split()) <= book:
            ways.append(plain)
    return value in ways


def chain(facts: Facts) -> int:
    return sum(
        int(n) for n in re.sub(r"\s+", "", facts["expression"]).replace("-", "+-").split("+")
    )


def factors(value: list[int], facts: Facts) -> bool:
    prime = all(n > 1 and all(n % d for d in range(2, n)) for n in value)
    return prime and math.prod(value) == facts["number"]


def lowest(value: list[int], exact: Fraction) -> bool:
    return len(value) == 2 and value == [exact.numerator, exact.denominator]


def odds(facts: Facts) -> Fraction:
    dice = [range(1, int(n) + 1) for n in re.findall(r"1d(\d+)", facts["puzzle"]["dice_str"])]
    rolls = [sum(roll) >= facts["puzzle"]["target"] for roll in itertools.product(*dice)]
    return Fraction(sum(rolls), len(rolls))


def based(value: str, facts: Facts) -> bool:
    try:
        return int(value, facts["target_base"]) == facts["decimal_value"] and value[0] not in "+-"
    except ValueError:
        return False
