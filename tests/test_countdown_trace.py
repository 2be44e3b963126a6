"""CountDown: the verifier against exhaustive enumeration, hostile text, and the problem streams."""

import ast
import itertools
import operator
import re
import time
import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.config.tasks import CountDownConfig, TaskConfig
from deltal_jax.errors import UserError
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.countdown.rules import (
    MAX_ANSWER_LENGTH,
    MAX_DEPTH,
    ParseError,
    parse,
)
from deltal_jax.tasks.countdown.trace import CountDown

TASK = CountDown()
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def trees(leaves: tuple[int, ...]):
    """Every binary tree over the leaves in this order, with every operator at every node."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    for cut in range(1, len(leaves)):
        for left, right in itertools.product(trees(leaves[:cut]), trees(leaves[cut:])):
            for symbol in OPERATORS:
                yield symbol, left, right


def value(tree) -> Fraction | None:
    """The exact value; None where it divides by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    symbol, left, right = tree[0], value(tree[1]), value(tree[2])
    if left is None or right is None or (symbol == "/" and right == 0):
        return None
    return OPERATORS[symbol](left, right)


def fully(tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    return f"({fully(tree[1])}{tree[0]}{fully(tree[2])})"


def minimally(tree, least: int = 0) -> str:
    """Parentheses only where precedence and left association would read another tree."""
    if isinstance(tree, int):
        return str(tree)
    level = PRECEDENCE[tree[0]]
    text = f"{minimally(tree[1], level)} {tree[0]} {minimally(tree[2], level + 1)}"
    return f"( {text} )" if level < least else text


def answer(numbers, target) -> dict:
    return {"numbers": list(numbers), "target": target}


def said(expression: str) -> str:
    return f"<a> {expression} </a>"


def correct(expression: str, numbers, target) -> bool:
    verdict = TASK.verify(said(expression), answer(numbers, target))
    assert verdict.reward == (1.0 if verdict.correct else 0.0)
    return verdict.correct


@pytest.mark.parametrize("numbers", [(7, 1, 5), (2, 2, 8), (0, 3, 3), (9,), (6, 4)])
def test_verifier_agrees_with_every_expression_of_a_number_set(numbers):
    seen = 0
    for order in set(itertools.permutations(numbers)):
        for tree in trees(order):
            exact = value(tree)
            for text in (fully(tree), minimally(tree)):
                seen += 1
                if exact is None:
                    assert TASK.verify(said(text), answer(numbers, 1)).reason == "division by zero"
                    continue
                assert parse(text)[0] == exact
                assert sorted(parse(text)[1]) == sorted(numbers)
                for target in {int(exact), int(exact) + 1, round(exact), 0}:
                    assert correct(text, numbers, target) == (exact == target), (text, target)
    assert seen == 2 * len(set(itertools.permutations(numbers))) * sum(1 for _ in trees(numbers))


def test_verifier_agrees_with_random_trees_of_four_numbers_in_any_order():
    numbers = (3, 8, 8, 1)
    every = [(o, t) for o in sorted(set(itertools.permutations(numbers))) for t in trees(o)]
    for _, tree in every[::97]:
        exact = value(tree)
        for text in (fully(tree), minimally(tree)):
            if exact is None:
                assert TASK.verify(said(text), answer(numbers, 24)).reason == "division by zero"
            else:
                assert correct(text, numbers, 24) == (exact == 24)


def test_famous_24_needs_an_exact_fraction_on_the_way():
    assert correct("8 / (3 - 8 / 3)", (8, 3, 8, 3), 24)
    assert correct("6 / (1 - 3 / 4)", (1, 3, 4, 6), 24)


def test_division_is_exact_and_never_rounded():
    assert parse("1 / 3 + 1 / 3 + 1 / 3") == (Fraction(1), [1, 3, 1, 3, 1, 3])
    assert parse("7 / 2")[0] == Fraction(7, 2)
    assert not correct("7 / 2", (7, 2), 3)
    assert not correct("7 / 2", (7, 2), 4)
    assert parse("99999999999999999999 / 3 * 3")[0] == 99999999999999999999
    assert not correct("10000000000000001 / 10000000000000000", (10**16 + 1, 10**16), 1)


def test_negative_intermediates_are_exact():
    assert correct("3 - 5 + 9", (3, 5, 9), 7)
    assert correct("( 2 - 7 ) * ( 3 - 5 )", (2, 7, 3, 5), 10)
    assert correct("( 1 - 3 ) * ( 2 - 4 ) / 4", (1, 2, 3, 4, 4), 1)


def test_subtraction_and_division_associate_to_the_left_and_products_bind_first():
    assert parse("9 - 4 - 3")[0] == 2
    assert parse("8 / 4 / 2")[0] == 1
    assert parse("8 / 4 * 2")[0] == 4
    assert parse("1 + 2 * 3 - 4 / 2")[0] == 5


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("7 + 5", (7, 1, 5), 12),
        ("7 + 5 + 1 + 1", (7, 1, 5), 14),
        ("7 + 5 + 5", (7, 1, 5), 17),
        ("71 + 5", (7, 1, 5), 76),
        ("13", (7, 1, 5), 13),
        ("7 * 1 + 5 * 0", (7, 1, 5), 7),
    ],
)
def test_every_number_is_used_exactly_once(expression, numbers, target):
    verdict = TASK.verify(said(expression), answer(numbers, target))
    assert (verdict.reward, verdict.correct) == (0.0, False)
    assert verdict.reason == "does not use each number once"


HOSTILE = [
    "",
    " ",
    "( )",
    ")(",
    "( 7 + 1 ) + 5 )",
    "( 7 + 1 + 5",
    "7 + + 5",
    "7 1 5",
    "7 +",
    "+ 7",
    "- 7 + 1 + 5",
    "-7+1+5",
    "7 + -5 + 1",
    "7 5",
    "7 ( 5 )",
    "(7)(1)(5)",
    "5//2",
    "7 % 5",
    "2 ** 5",
    "9**9**9",
    "9**9**9**9",
    "7 ^ 5",
    "7.0 + 1 + 5",
    "1e9",
    "0x7 + 1 + 5",
    "1_000",
    "7 + 1 + 5 = 13",
    "7 + 1 + 5 ; 1",
    "7 + 1 + 5 # 13",
    "7,1,5",
    "int('7')",
    "7 if 1 else 5",
    "lambda: 13",
    "(lambda: 13)()",
    "13 or 7 + 1 + 5",
    "[7, 1, 5]",
    "().__class__.__bases__[0].__subclasses__()",
    "{13}",
    "7² ",
    "²",
    "7 + 1 + ⁵",
    "٧ + 1 + 5",
    "٣",
    "７＋１＋５",
    "7 × 1",
    "7 − 1",
    "7 + 1 + 5\x00",
    "\x00",
    "7 + 1\u00a0+ 5",
    "7 + 1 + 5\u200b",
    "Ⅶ + 1 + 5",
    "<a>",
    "\ud800",
    "\U0001f4a5",
    "\\",
    "7 + 1 + 5 \\\n",
    "nan",
    "inf",
    "True",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_is_not_arithmetic_is_refused(text):
    with pytest.raises(ParseError, match=r"unexpected|missing|too long|too deep"):
        parse(text)
    verdict = TASK.verify(f"<a>{text}</a>", answer((7, 1, 5), 13))
    assert (verdict.reward, verdict.correct) == (0.0, False)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {}')",
        "__import__('pathlib').Path('{}').touch()",
        "eval(\"open('{}', 'w')\")",
        "exec(\"open('{}', 'w')\")",
        "(7 + 1 + 5, open('{}', 'w'))[0]",
        "$(touch {})",
        "`touch {}`",
        "f\"{{open('{}', 'w')}}\"",
    ],
)
def test_text_is_never_executed(text, tmp_path):
    trap = tmp_path / "executed"
    hostile = text.format(trap)
    for response in (hostile, said(hostile), said(f"7 + 1 + 5 {hostile}")):
        assert not TASK.verify(response, answer((7, 1, 5), 13)).correct
    assert not trap.exists()


def test_huge_powers_take_no_time():
    started = time.perf_counter()
    for text in ("9**9**9", "9^9^9", "*".join(["9" * 90] * 4), "(" * 200 + "9" + ")" * 199):
        assert not correct(text, (9, 9, 9), 1)
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize(
    "response",
    [
        "<a>" + "7+" * 500_000 + "</a>",
        "<a>" * 333_333,
        "</a>" * 250_000,
        "<a></a>" * 150_000,
        "<a>" + "9" * 1_000_000 + "</a>",
        "<a>" + "(" * 1_000_000 + "</a>",
        "<a>" + " " * 1_000_000 + "</a>",
        "x" * 1_000_000,
        "<a>" + "<" * 1_000_000,
        "<a>" + "x" * 1_000_000,
    ],
    ids="sum openers closers empties digits parentheses spaces prose angles unclosed".split(),
)
def test_a_million_characters_are_refused_in_linear_time(response):
    started = time.perf_counter()
    verdict = TASK.verify(response, answer((7, 1, 5), 13))
    assert time.perf_counter() - started < 5.0
    assert (verdict.reward, verdict.correct) == (0.0, False)
    assert len(verdict.answer) <= MAX_ANSWER_LENGTH


def test_nesting_is_parsed_up_to_its_limit_and_no_deeper():
    assert parse("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH) == (Fraction(7), [7])
    with pytest.raises(ParseError, match="nested too deep"):
        parse("(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1))
    assert parse("(7)+" * 60 + "1")[0] == 421, "depth counts what is open, not what was"


def test_length_is_parsed_up_to_its_limit_and_no_further():
    exact = "1+" * (MAX_ANSWER_LENGTH // 2 - 1) + "11"
    assert len(exact) == MAX_ANSWER_LENGTH
    assert parse(exact)[0] == MAX_ANSWER_LENGTH // 2 - 1 + 11
    with pytest.raises(ParseError, match="answer too long"):
        parse(exact + "1")


def oracle(text: str) -> Fraction | None:
    """The value by Python's own grammar, over the allowed nodes alone; None for anything else."""

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise SyntaxError
        symbols = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
        if type(node.op) not in symbols:
            raise SyntaxError
        return OPERATORS[symbols[type(node.op)]](walk(node.left), walk(node.right))

    try:
        with warnings.catch_warnings(action="ignore"):  # "7(1)" makes Python ask about a comma
            return walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


@given(st.lists(st.sampled_from([*"123456789+-*/()", "**", "//", "12"]), max_size=12))
@settings(max_examples=400)
def test_any_row_of_tokens_means_what_pythons_grammar_says_or_nothing(tokens):
    text = " ".join(tokens)
    try:
        found = parse(text)[0]
    except ParseError:
        found = None
    assert found == oracle(text)


@given(
    st.text(max_size=60) | st.text(st.sampled_from("0123456789+-*/() <>a/.²٣\x00\n"), max_size=60)
)
def test_any_text_gets_a_verdict_of_zero_or_one(text):
    for response in (text, said(text)):
        verdict = TASK.verify(response, answer((7, 1, 5), 13))
        assert verdict.reward == float(verdict.correct)


def test_no_answer_is_wrong_and_says_so():
    for response in ("", "7 + 1 + 5 = 13", "<a> 7 + 1 + 5", "7 + 1 + 5 </a>", "</a> 7 <a>"):
        verdict = TASK.verify(response, answer((7, 1, 5), 13))
        assert (verdict.reward, verdict.reason, verdict.answer) == (0.0, "no answer", "")


def test_the_last_of_several_answers_counts():
    right, wrong = said("7 + 1 + 5"), said("7 * 1 * 5")
    goal = answer((7, 1, 5), 13)
    assert TASK.verify(f"{wrong} no {right} tail", goal).correct
    assert not TASK.verify(f"{right} then {wrong}", goal).correct
    assert not TASK.verify(f"{right} then <a> </a>", goal).correct
    assert TASK.verify(f"{wrong} {right} <a> unclosed", goal).correct


def test_nested_tags_give_the_innermost_answer():
    goal = answer((7, 1, 5), 13)
    assert TASK.verify("<a> 1 <a> 7 + 1 + 5 </a> 2 </a>", goal).correct
    assert TASK.verify("<a><a>7+1+5</a></a>", goal).correct
    assert not TASK.verify("<a> 7 + <a> 1 </a> + 5 </a>", goal).correct


def test_an_answer_may_span_lines_and_is_normalised_for_votes():
    verdict = TASK.verify("<a>\n7   +\t1\r\n+ 5\n</a>", answer((7, 1, 5), 13))
    assert verdict.correct
    assert verdict.answer == "7 + 1 + 5"


def test_the_reason_names_what_is_wrong():
    goal = answer((7, 1, 5), 40)
    assert TASK.verify(said("7 + 1 + 5"), goal).reason == "gives 13, not 40"
    assert TASK.verify(said("7 / 5 + 1"), goal).reason == "gives 12/5, not 40"
    assert TASK.verify(said("7 / ( 1 - 1 )"), goal).reason == "division by zero"
    assert TASK.verify(said("5 * ( 1 + 7 )"), goal).reason == "correct"


def test_held_out_is_a_property_of_numbers_and_target_alone():
    for position in range(100):
        problem = TASK.problem(3, position)
        for order in itertools.permutations(problem.answer["numbers"]):
            text = f"{' '.join(map(str, order))} -> {problem.answer['target']}"
            assert TASK.is_held_out(TASK.parse_problem(text)) == TASK.is_held_out(problem)


def test_no_training_problem_or_demonstration_is_held_out():
    shown = {prompt for prompt, _ in itertools.islice(TASK.demonstrations(0), 3000)}
    trained = {TASK.problem(seed, n).prompt for seed in (0, 1) for n in range(1500)}

    def identity(prompt: str) -> tuple:
        problem = TASK.parse_problem(prompt)
        return tuple(sorted(problem.answer["numbers"])), problem.answer["target"]

    held_out = {identity(problem.prompt) for problem in TASK.held_out(512)}
    assert len(held_out) > 100
    assert held_out.isdisjoint(identity(prompt) for prompt in shown | trained)


def test_about_a_tenth_of_all_problem_classes_is_held_out():
    classes = {
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), 3)
        for target in range(1, 61)
    }
    problems = (TASK.parse_problem(f"{' '.join(map(str, n))} -> {t}") for n, t in classes)
    share = sum(map(TASK.is_held_out, problems)) / len(classes)
    assert 0.09 < share < 0.11


def test_held_out_problems_are_a_prefix_stable_sequence():
    assert TASK.held_out(50) == CountDown().held_out(200)[:50]


def test_a_problem_depends_on_seed_and_position_alone():
    forward = [TASK.problem(5, n) for n in range(60)]
    backward = [CountDown().problem(5, n) for n in reversed(range(60))][::-1]
    assert forward == backward
    assert CountDown().problem(5, 1_000_000) == CountDown().problem(5, 1_000_000)
    assert len({p.prompt for p in forward}) > 50
    assert forward != [TASK.problem(6, n) for n in range(60)]


@pytest.mark.parametrize(
    "task", [TASK, CountDown(numbers=4, max_number=20, max_value=100)], ids=["small", "large"]
)
def test_every_problem_is_in_range_and_solvable(task):
    words = set(task.vocabulary())
    for position in range(40):
        problem = task.problem(1, position)
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        assert len(numbers) == task.numbers
        assert all(1 <= n <= task.max_number for n in numbers)
        assert 1 <= target <= task.max_value
        assert target not in numbers
        assert problem.prompt == f"{' '.join(map(str, numbers))} -> {target} :"
        assert set(problem.prompt.split()) <= words
        orders = set(itertools.permutations(numbers))
        if task.numbers == 3:
            assert any(value(t) == target for order in orders for t in trees(order))


STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def check_trace(task: CountDown, prompt: str, response: str) -> str:
    """Assert that a demonstration says nothing false; what kind it is."""
    problem = task.parse_problem(prompt)
    numbers, target = problem.answer["numbers"], problem.answer["target"]
    trace, _, tail = response.partition("<a>")
    final = tail.removesuffix("</a>").strip()
    assert tail.endswith(" </a>")
    exact, used = parse(final)
    assert sorted(used) == sorted(numbers)
    verdict = task.verify(response, problem.answer)
    assert verdict.correct == (exact == target)
    tries = re.findall(r"(.*?) (<|>|ok)(?: |$)", trace)
    assert " ".join(f"{steps} {sign}" for steps, sign in tries) == trace.strip()
    for number, (steps, sign) in enumerate(tries):
        available = list(numbers)
        for step in steps.split(" , "):
            left, symbol, right, result = STEP.fullmatch(step).groups()
            assert OPERATORS[symbol](int(left), int(right)) == int(result)
            assert 0 <= int(result) <= task.max_value
            available.remove(int(left))
            available.remove(int(right))
            available.append(int(result))
        assert len(available) == 1, "a try uses every number once"
        assert sign == ("ok" if available[0] == target else "<" if available[0] < target else ">")
        assert (sign == "ok") <= (number == len(tries) - 1), "a hit ends the search"
    if not tries:
        return "direct"
    assert exact == available[0], "the answer is the last try"
    return "hit" if sign == "ok" else "gave up"


@pytest.mark.parametrize(
    "task", [TASK, CountDown(numbers=4, max_number=20, max_value=100)], ids=["small", "large"]
)
def test_demonstrations_say_nothing_false(task):
    words = set(task.vocabulary())
    for prompt, response in itertools.islice(task.demonstrations(1), 400):
        check_trace(task, prompt, response)
        assert set(response.split()) <= words


def test_a_tenth_of_demonstrations_answers_directly_and_the_rest_search():
    count = 3000
    pairs = itertools.islice(TASK.demonstrations(7), count)
    kinds = [check_trace(TASK, prompt, response) for prompt, response in pairs]
    share = {kind: kinds.count(kind) / count for kind in ("direct", "hit", "gave up")}
    deviation = (0.1 * 0.9 / count) ** 0.5
    assert abs(share["direct"] - TASK.direct) < 4 * deviation
    assert share["hit"] > 0.4
    assert share["gave up"] > 0.1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_direct_answers_is_that_of_the_config(share):
    task = make_task(TaskConfig(countdown=CountDownConfig(direct=share)))
    kinds = [check_trace(TASK, *pair) for pair in itertools.islice(task.demonstrations(7), 50)]
    assert kinds.count("direct") == 50 * share


def test_demonstrations_repeat_for_their_seed_and_differ_for_another():
    first, again, other = (list(itertools.islice(TASK.demonstrations(s), 50)) for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("7 1 5 -> 40", [7, 1, 5], 40),
        ("7 1 5 -> 40 :", [7, 1, 5], 40),
        ("  7  1\t5->40:", [7, 1, 5], 40),
        ("60 0 -> 0", [60, 0], 0),
    ],
)
def test_a_typed_problem_is_parsed(text, numbers, target):
    problem = TASK.parse_problem(text)
    assert problem.answer == answer(numbers, target)
    assert problem.prompt == f"{' '.join(map(str, numbers))} -> {target} :"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "7 1 5",
        "-> 40",
        "7 -> 7",
        "7 1 5 -> ",
        "7 1 5 -> 4 0",
        "7 1 5 = 40",
        "7 -1 5 -> 40",
        "7 1.5 -> 40",
        "7 ² -> 40",
        "٧ 1 5 -> 40",
        "7 1 5 -> 40 : <a>",
        "7 1 5 -> 40\x00",
    ],
)
def test_a_malformed_problem_is_refused_with_the_form(text):
    with pytest.raises(UserError, match="not of the form '7 1 5 -> 40'"):
        TASK.parse_problem(text)


@pytest.mark.parametrize(("text", "culprit"), [("7 1 5 -> 61", "61"), ("7 100 5 -> 4", "100")])
def test_a_number_that_the_vocabulary_lacks_is_refused_by_name(text, culprit):
    with pytest.raises(
        UserError, match=rf"^problem: {culprit} is over task.countdown.max_value=60$"
    ):
        TASK.parse_problem(text)


def test_a_number_of_thousands_of_digits_is_refused_like_any_other():
    with pytest.raises(UserError, match="problem"):
        TASK.parse_problem("7 1 " + "5" * 5000 + " -> 40")
