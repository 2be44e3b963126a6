"""CountDown's two grammars of an answer: against Python's own `eval`, a table of answers by hand,
and text that was made to execute, stall or confuse."""

import random
import re
import warnings

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from deltal_jax.tasks.countdown.rules import (
    CLOSE,
    GRAMMARS,
    MAX_SYMBOLS,
    OPEN,
    PYTHON_DEPTH,
    ParseError,
    evaluate,
    find_last,
    find_on_last_line,
    judge_reference,
    judge_strict,
)
from tests.countdown_answers import agreement, read_table, verdicts
from tests.hostile import hostile


def python(text: str) -> complex | float | int | None:
    """What Python makes of text of digits, + - * / ( ) . and white space that a test made; None
    where that is an error or no number."""
    assert re.fullmatch(r"[\d+\-*/().\s]*", text)
    try:
        with warnings.catch_warnings(action="ignore"):
            value = eval(text, {"__builtins__": None}, {})
    except (SyntaxError, TypeError, ArithmeticError):
        return None
    return value if isinstance(value, int | float | complex) else None


def ours(text: str) -> complex | float | int | None:
    try:
        return evaluate(text)
    except ParseError as error:
        assume("too large" not in str(error))  # Python itself might not end
        return None


def same(left, right) -> bool:
    return type(left) is type(right) and (left == right or repr(left) == repr(right))


SYMBOLS = [*"123456789+-*/()", "**", "//", "1.5", ".5", "2.", "0", "007", "0.5", "(-8)", " ", "\r"]


@given(st.lists(st.sampled_from(SYMBOLS), max_size=9))
@settings(max_examples=500, deadline=None)
@example(["-", "2", "**", "2"])
@example(["2", "**", "-", "3", "**", "2"])
@example(["(-8)", "**", "(", "1", "/", "3", ")"])
@example(["2", "-", "-", "+", "-", "3", "*", "4"])
def test_any_row_of_symbols_has_pythons_value_or_none(symbols):
    for joined in (" ".join(symbols), "".join(symbols)):
        if "\r" in joined and joined.strip(" ").startswith("\r"):
            continue  # the reference strips an answer before it is evaluated
        assert same(ours(joined), python(joined)), joined


@st.composite
def expressions(draw, depth=4):
    """A well-formed expression with Python's operators, whose powers stay small."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(["1", "2", "3", "7", "10", "0.5", "1.25", "3.", ".1", "99"]))
    kind = draw(st.sampled_from([*"+-*/", "//", "**", "sign", "()"]))
    inner = draw(expressions(depth=depth - 1))
    if kind == "()":
        return f"({inner})"
    if kind == "sign":
        return draw(st.sampled_from("+-")) + inner
    if kind == "**":
        return f"({inner})**{draw(st.sampled_from(['2', '-1', '.5', '0', '3', '-2', '(1/3)']))}"
    return f"{inner}{draw(st.sampled_from(['', ' ']))}{kind}{draw(expressions(depth=depth - 1))}"


@given(expressions())
@settings(max_examples=500, deadline=None)
def test_any_expression_has_pythons_value(text):
    assert same(ours(text), python(text)), text


def test_nesting_ends_where_pythons_does():
    deepest = "(" * PYTHON_DEPTH + "7" + ")" * PYTHON_DEPTH
    assert evaluate(deepest) == python(deepest) == 7
    assert python(f"({deepest})") is None
    with pytest.raises(ParseError, match="nested too deep"):
        evaluate(f"({deepest})")


def test_symbols_are_read_up_to_their_limit_and_no_further():
    assert evaluate("-" * (MAX_SYMBOLS - 1) + "7") == -7
    with pytest.raises(ParseError, match="too long"):
        evaluate("-" * MAX_SYMBOLS + "7")


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9**9**9**9",
        "(-9)**9**9**9",
        "((((9**9)**99)**99)**99)**99",
        "2**-9**9**9",
        "1//9**9**9**9",
        ".5**9**9**9",
        "9**9**9*0",
        "99**99*" * 400 + "1",
        "9.0**9**99",
        "0**-1",
        "7//0",
        "7/0.",
        "(-8)**.5//1",
    ],
)
def test_what_has_no_value_here_says_so_at_once(text):
    with pytest.raises(ParseError, match=r"too large|division by zero|has no value|too long"):
        evaluate(text)


def test_powers_of_one_and_zero_are_never_too_large():
    assert (evaluate("1**99**99"), evaluate("0**99**99"), evaluate("(-1)**99**99")) == (1, 0, -1)


def test_the_last_tags_of_the_last_line_count_for_the_reference():
    prompt = "User and Assistant. User: as in <answer> 1 </answer>\nAssistant: so\n<think>"
    for response, expected in [
        ("<answer> 7 </answer>", "7"),
        ("<answer>5</answer> no, <answer>\t7 </answer>, done", "7"),
        ("<answer>5</answer>\nno, <answer>7</answer>", "7"),
        ("<answer>7</answer>\n", None),
        ("<answer>7\n</answer>", None),
        ("no", None),
        ("</answer> 7 <answer>", None),
        ("<answer>7</answer> Assistant: <answer>5", "7"),
        ("Assistant: nothing\nUser: <answer> 7 </answer>", "7"),
        ("<answer> 5 <answer> 7 </answer>", "5 <answer> 7"),
        ("<answer> 7 </answer></answer>", "7"),
        ("<answer></answer>", ""),
    ]:
        assert find_on_last_line(prompt + response) == expected, response
    assert find_on_last_line("<answer>1</answer> Assistant: none") is None


def test_the_last_tags_count_strictly_on_however_many_lines():
    assert find_last("<answer>5</answer><answer>\n7\n</answer>\nso") == "\n7\n"
    assert find_last("<answer> 5 <answer> 7 </answer> 9 </answer>") == " 7 "
    assert find_last("<answer> 5") is None


@given(st.text(st.sampled_from("<>/answer 7\n"), max_size=40), st.lists(st.integers(0, 3)))
def test_tags_are_found_as_the_references_pattern_finds_them(noise, kinds):
    pieces = [OPEN, CLOSE, "\n", noise]
    text = "".join(pieces[kind] for kind in kinds)
    line = text.split("\n")[-1]
    found = [match.group(1).strip() for match in re.finditer(r"<answer>(.*?)</answer>", line)]
    assert find_on_last_line(text) == (found[-1] if found else None)


ROWS = read_table()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.kind} {row.response}" for row in ROWS])
def test_a_grammar_judges_as_people_do_but_for_the_known_differences(row):
    for name, verdict in verdicts(row).items():
        assert verdict.reward == float(verdict.correct)
        assert verdict.correct == (row.right != (name in row.differs)), (name, verdict.reason)


def test_the_table_has_at_least_sixty_answers_and_a_reason_for_every_difference():
    assert len(ROWS) >= 60
    assert len({(row.response, row.numbers, row.target) for row in ROWS}) == len(ROWS)
    assert all(len(reason) > 8 for row in ROWS for reason in row.differs.values())
    counts = re.search(r"all +(\d+) +(\d+) +(\d+) +(\d+)\n", agreement()).groups()
    apart = sum(len(row.differs) == 1 for row in ROWS)
    expected = [sum(name not in row.differs for row in ROWS) for name in GRAMMARS]
    assert [*map(int, counts)] == [len(ROWS), *expected, apart]


def test_five_hundred_hostile_responses_are_wrong_and_not_executed(tmp_path):
    canary = tmp_path / "executed"
    for response in hostile(1, 500, canary):
        for text in (response, f"{OPEN}{response}{CLOSE}", f"{OPEN}7+1+5{response}{CLOSE}"):
            for grammar in GRAMMARS.values():
                found = grammar.find(text)
                if found is not None:
                    verdict = grammar.judge(found, [7, 1, 5], 14)
                    assert (verdict.reward, verdict.correct) == (0.0, False)
                    assert len(verdict.answer) <= 400 and len(verdict.reason) <= 200
    assert not canary.exists()


@pytest.mark.parametrize("piece", [OPEN, CLOSE, OPEN + CLOSE, "(", "-", "7", "1.", " ", "\f", "٣"])
def test_a_megabyte_of_anything_gets_a_verdict(piece):
    body = piece * (1_000_000 // len(piece))
    for text in (body, OPEN + body + CLOSE, OPEN + "7+1+5" + body + CLOSE):
        for grammar in GRAMMARS.values():
            found = grammar.find(text)
            if found is not None:
                assert grammar.judge(found, [7, 1, 5], 14).reward == 0.0


@given(
    st.text(max_size=60)
    | st.text(st.sampled_from("0123456789+-*/() <>.²٣\x00\n\r\f\v"), max_size=60)
)
@settings(max_examples=500, deadline=None)
def test_any_text_gets_a_verdict_of_zero_or_one(text):
    for judge in (judge_strict, judge_reference):
        verdict = judge(text, [7, 1, 5], 13)
        assert verdict.reward == float(verdict.correct)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_random_expression_of_the_numbers_is_judged_as_python_values_it(data):
    numbers = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=4))
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    parts = [str(number) for number in rng.sample(numbers, len(numbers))]
    while len(parts) > 1:
        left, right = parts.pop(), parts.pop()
        operator = rng.choice(["+", "-", "*", "/", "//", " - "])
        parts.append(rng.choice(["({}{}{})", "{}{}{}"]).format(left, operator, right))
    value = python(parts[0])
    targets = {13, 0} if value is None else {round(value), round(value) + 1}
    for target in targets:
        near = value is not None and abs(value - target) < 1e-5
        assert judge_reference(parts[0], numbers, target).correct == near
        if "//" not in parts[0]:
            assert judge_strict(parts[0], numbers, target).correct == near
        assert not judge_reference(parts[0], [*numbers, 2], target).correct
