r"""The rules of verdicts: which answer of a response counts, and what is equal to the known one."""

import itertools

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.tasks.math import rules as math_rules
from deltal_jax.tasks.math.rules import REFERENCE_LENGTH, boxed, hendrycks, judge, minerva
from tests.math_answers import VERIFIERS, agreement, read_table, table_judgements

BOTH = pytest.mark.parametrize("verifier", VERIFIERS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{1}}", "{1}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\fbox{4} \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed 7", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_box_counts_and_has_to_end(text, expected):
    assert boxed(text) == expected


@BOTH
@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{42}", "42", "correct"),
        (r"\boxed{41} no, \boxed{42}", "42", "correct"),
        (r"\boxed{42} no, \boxed{41}", "42", "wrong"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", "correct"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{3}", "wrong"),
        (r"<answer> so it is \boxed{42} </answer>", "42", "correct"),
        (r"\boxed{}", "42", "wrong"),
        ("", "42", "wrong"),
        ("it is 41", "42", "wrong"),
        (r"\boxed{42", "42", "wrong"),
    ],
)
def test_both_verifiers_on_plain_responses(verifier, response, gold, expected):
    assert judge(verifier, response, gold)[0] == expected


def test_the_reference_takes_a_response_without_a_box_whole():
    assert judge("reference", " 42 ", "42")[0] == "correct"
    assert judge("reference", "the answer is 42", "42")[0] == "wrong"
    assert judge("reference", r"\boxed{41} and \boxed{42", "42")[0] == "wrong"


def test_math_verify_takes_an_answer_in_tags_where_there_is_no_box():
    assert judge("math_verify", "<answer>41</answer> <answer> 42 </answer>", "42")[0] == "correct"
    assert judge("math_verify", "<answer>42", "42")[0] == "wrong"
    assert judge("math_verify", "42", "42")[:2] == ("wrong", "no answer")


def test_the_reference_looks_into_no_answer_of_over_30_characters():
    assert REFERENCE_LENGTH == 30
    for spaces, expected in ((0, "correct"), (1, "wrong")):
        answer = "1" + "0" * 10 + "+" * 0 + " " * (17 + spaces) + "+0"
        assert len(answer) == 30 + spaces
        assert judge("reference", f"\\boxed{{{answer}}}", "10000000000")[0] == expected
    same = "x" * 500
    assert judge("reference", f"\\boxed{{{same}}}", same)[0] == "correct", "equal text comes first"


def test_what_the_reference_cannot_read_is_wrong_and_math_verify_has_no_verdict_on_it():
    for answer in ("9^{9^{9^9}}", "((((", r"\frac{"):
        response = (
            f"<answer>{answer}</answer> \\boxed{{{answer.replace('{', '').replace('}', '')}}}"
        )
        assert judge("reference", response, "5")[0] == "wrong"
    for answer in ("9^{9^{9^9}}", "(" * 50, "9" * 2000, "\x00", r"0.\overline{3}"):
        assert judge("math_verify", f"\\boxed{{{answer}}}", "5")[0] == "unparsed"


@pytest.mark.parametrize(
    "answer",
    [
        r"\{1, 9^{9^{9}}\}",
        "(10^{10^{10}}, 1)",
        "[1, 2^{2^{30}}x)",
        r"x \le 3^{10000000}",
        "x = (99999!)!",
        r"\begin{pmatrix} 1 & 2^{-99999999999} \\ 3 & 4 \end{pmatrix}",
        r"\text{or } 9^{9^{9}}",
    ],
)
def test_math_verify_is_not_asked_where_one_of_several_values_is_too_large(answer):
    verdict = judge("math_verify", f"\\boxed{{{answer}}}", r"\{1, 2\}")
    assert verdict[:2] == ("unparsed", "too large")


#: What may stand between several answers, and around them.
BETWEEN = [
    ",",
    ", ",
    ";",
    " or ",
    r"\text{ or }",
    r"\text{or}",
    "=",
    r"\ ",
    r"\\",
    "|",
    "/",
    r"\pm ",
]
BETWEEN += [
    r"\approx ",
    r"\to ",
    "&",
    "\n",
    "$, $",
    r"\vee ",
    r"\cup ",
    "<",
    ":",
    ",x=",
    r"\mid ",
    "-",
]
BETWEEN += [
    r"\text{ and } ",
    "%",
    r"\text{ }=",
    r"\text{ },x=",
    r"\text{ } \text{ }=",
    "\u200b",
    r"\!",
]
AROUND = ["%s", r"\{%s\}", "(%s)", "[%s]", "$%s$", r"\text{%s}", "x=%s", r"x \in \{%s\}"]


@BOTH
def test_no_answer_is_right_for_two_known_ones_but_for_words_that_the_reference_calls_a_unit(
    verifier,
):
    twice = set()
    for between, around, known in itertools.product(BETWEEN, AROUND, (["5", "6"], ["A", "B"])):
        said = f"\\boxed{{{around % between.join(known)}}}"
        if all(judge(verifier, said, gold)[0] == "correct" for gold in known):
            twice.add(between)
    known = {"reference": {r"\text{ }=", r"\text{ },x="}, "math_verify": set()}
    assert twice == known[verifier]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"5 \text{ cm}", "5"),
        (r"5 \text{ or } 6 \text{ or } 7", r"5\text{or}6\text{or}7"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        ("x = 5", "5"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (".5x", "0.5x"),
    ],
)
def test_the_normal_form_of_math(text, expected):
    assert hendrycks(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 5", "5"),
        ("5 square units", "5"),
        (r"\text{east}", "east"),
        ("1,000", "1000"),
        ("the answer is $5$", "5"),
        (r"5 \text{ and } 6", r"5and6"),
    ],
)
def test_the_normal_form_of_minerva(text, expected):
    assert minerva(text) == expected


@BOTH
@settings(max_examples=25)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_an_answer_equals_itself(verifier, answer):
    if boxed(f"\\boxed{{{answer}}}") == answer and answer.strip():
        assert judge(verifier, f"\\boxed{{{answer}}}", answer)[0] == "correct"


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_equal_where_they_are(left, right):
    for verifier in VERIFIERS:
        expected = "correct" if left == right else "wrong"
        assert judge(verifier, f"\\boxed{{{left}}}", f"{right}")[0] == expected
        assert judge(verifier, f"\\boxed{{{left}}}", f"{left}.0")[0] == "correct"


WHOLE = st.integers(-3, 3) | st.sampled_from([12, 100, 234, 999, 1000])
NUMERAL = st.one_of(
    WHOLE.map(str),
    WHOLE.map(lambda n: f"{n}.0"),
    st.builds(lambda n, d: f"\\frac{{{n}}}{{{d}}}", st.integers(0, 4), st.integers(1, 4)),
)
TUPLE = st.lists(NUMERAL, min_size=2, max_size=3).map(", ".join).map("({})".format)


@settings(max_examples=60)
@given(TUPLE, TUPLE)
def test_math_verify_says_the_same_of_several_numbers_where_it_is_not_asked(answer, gold):
    for left, right in ((answer, gold), (answer, answer.replace(" ", ""))):
        numbers = [math_rules._plain_numbers(text) for text in (left, right)]
        if found := math_rules._compare_numbers(*numbers):
            parsed = [math_rules._parsed(text) for text in (right, left)]
            same = math_verify.verify(*parsed, timeout_seconds=None, raise_on_error=True)
            assert (found[0] == "correct") is same


@pytest.fixture(scope="module")
def said():
    return table_judgements()


@BOTH
def test_verdicts_on_the_table_are_those_of_people_but_for_the_differences_that_are_known(
    verifier, said
):
    unexpected = [
        (row.answer, row.gold, verdict)
        for row, verdict in zip(read_table(), said[verifier], strict=True)
        if ((verdict == "correct") == row.right) is (verifier in row.differs)
    ]
    assert unexpected == []


def test_how_often_the_verifiers_agree_with_people_and_with_each_other(said):
    rows = read_table()
    assert len(rows) == 414 and len({(row.answer, row.gold) for row in rows}) == 414
    assert {row.right for row in rows} == {True, False}
    right = {v: sum(v not in row.differs for row in rows) for v in VERIFIERS}
    assert right == {"reference": 333, "math_verify": 381}
    pairs = zip(said["reference"], said["math_verify"], strict=True)
    assert sum((left == "correct") != (right == "correct") for left, right in pairs) == 70
    # What people call wrong and a verifier rewards is what a policy would learn.
    for verifier, falsely in (("reference", 21), ("math_verify", 20)):
        verdicts = zip(rows, said[verifier], strict=True)
        assert sum(not row.right and verdict == "correct" for row, verdict in verdicts) == falsely


def test_the_report_of_agreement_has_a_line_for_every_kind_and_every_difference():
    lines = agreement().splitlines()
    kinds = {row.kind for row in read_table()}
    assert kinds <= {line.split("  ")[0] for line in lines}
    differences = sum(len(row.differs) for row in read_table())
    assert len(lines) == 1 + len(kinds) + 1 + 2 + differences
