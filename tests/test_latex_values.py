"""Values of LaTeX: what is equal, what is not, and what is refused, in bounded time."""

import contextlib
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.tasks.math.latex_grammar import MAX_LENGTH, ParseError, parse
from deltal_jax.tasks.math.latex_values import TooLargeError, evaluate, same_value

EQUAL = [
    (r"\frac{2}{4}", "0.5"),
    (r"\frac12", ".5"),
    (r"\frac{1}2", "1/2"),
    ("1,234,567.5", "1234567.5"),
    ("2^{10}", "1024"),
    ("2^3^2", "512"),
    ("-2^2", "-4"),
    ("2^{-1}", "0.5"),
    ("2 * -3", "-6"),
    ("8/4/2", "1"),
    ("3!", "6"),
    (r"\binom52", "10"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\sqrt[3]{27}", "3"),
    (r"\log_2 8", "3"),
    (r"\ln 6", r"\ln 2 + \ln 3"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\sin 2x", r"2 \sin x \cos x"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    ("π", r"\pi"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("|x|", r"\sqrt{x^2}"),
    ("2|x-1|y", "|2x-2|y"),
    ("x_1+x_{12}", "x_{12}+x_1"),
    (r"\left(\frac{1}{2}\right)^{2}", r"\frac{1}{4}"),
    (r"a\cdot b \times c", "cba"),
]
DIFFERENT = [
    ("1", "2"),
    ("0.3333333333333333", r"\frac{1}{3}"),
    ("3.1415926", r"\pi"),
    ("1.00000000000000000001", "1"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("x", "y"),
    ("x_1", "x_2"),
    ("x", "|x|"),
    ("x-y", "y-x"),
    (r"\sin x", r"\cos x"),
    ("2^{3}", "3^{2}"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_the_same_value_in_another_form(left, right):
    assert same_value(left, right) and same_value(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_another_value(left, right):
    assert not same_value(left, right) and not same_value(right, left)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "1 +",
        "(1",
        "1)",
        "(1]",
        "{1",
        "--1",
        "1//2",
        "1..2",
        "3!!",
        "x=1",
        "1;2",
        "(1,2)",
        r"\text{cm}",
        r"\infty",
        r"\unknown",
        r"\frac{1}",
        "__import__('os')",
        "eval(1)'",
        "\x00",
        "\ud800",
        "٣",
        "²",
        "1\u200b",
        "1" * (MAX_LENGTH + 1),
        "(" * 400,
        "{" * 400 + "1" + "}" * 400,
        "2^" * 400 + "2",
        r"\sqrt" * 150,
        r"\sin" * 150 + "x",
        "|" * 500,
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ParseError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "9^{9^{9^9}}",
        "2^{99999}",
        "2^{-99999}",
        "99999!",
        r"\binom{99999}{5}",
        "x^{99999}",
    ],
)
def test_what_is_out_of_bounds_is_refused_before_it_is_computed(text):
    with pytest.raises(TooLargeError):
        same_value(text, "1")


@pytest.mark.parametrize("text", ["1/0", "0^{-1}", r"\ln 0", r"\tan(1/0)", "(1/2)!", "(-1)!"])
def test_what_has_no_value_is_refused(text):
    with pytest.raises(ParseError):
        evaluate(parse(text), {})


_LEAVES = st.integers(0, 99).map(lambda n: (str(n), Fraction(n))) | st.decimals(
    0, 99, places=2
).map(lambda n: (str(n), Fraction(n)))
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _combined(left, sign, right):
    """The text and the value of two operands, with no value where it divides by zero."""
    if sign == "/":
        text = rf"\frac{{{left[0]}}}{{{right[0]}}}"
    else:
        text = f"({left[0]} {sign} {right[0]})"
    if None in (left[1], right[1]) or (sign == "/" and right[1] == 0):
        return text, None
    return text, _OPERATORS[sign](left[1], right[1])


def _grown(inner):
    return st.builds(_combined, inner, st.sampled_from(list(_OPERATORS)), inner)


@given(st.recursive(_LEAVES, _grown, max_leaves=12))
def test_rational_expressions_are_exact(expression):
    text, expected = expression
    try:
        found = evaluate(parse(text), {})
    except ParseError:
        found = None
    assert found == expected


@given(
    st.text(max_size=80)
    | st.text(st.sampled_from(r"0123456789+-*/^!|(){}[]\.,xyfracsqrt_ "), max_size=80)
)
def test_any_text_has_a_value_or_is_refused(text):
    with contextlib.suppress(ParseError, TooLargeError):
        assert same_value(text, text) in (True, False)
