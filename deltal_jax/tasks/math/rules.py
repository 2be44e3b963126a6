r"""Verdicts on mathematical answers: the two rules that `task.math.verifier` names.

`reference` is what the paper's experiments score by, without executing any text: the last
`\boxed{}`, or the whole response; equal strings; over 30 characters is wrong; then equal after the
MATH data set's normalisation, equal values, or equal after Minerva's normalisation. What cannot be
read is wrong. `math_verify` asks the package of that name, and has no verdict on what that cannot
read.

Both run in worker processes (`workers.py`): this module imports nothing heavy until it is asked.
"""

import functools
import re
from fractions import Fraction
from typing import Any, Literal, cast

from deltal_jax.tasks.math import latex_grammar, latex_values

Kind = Literal["correct", "wrong", "unparsed"]
Judgement = tuple[Kind, str, str]
_Finding = tuple[Kind, str]

#: Calls that import what comparisons of all kinds need, which takes longer than any of them.
WARM_UP = [
    (r"\boxed{\frac{2}{4}}", "0.5"),
    (r"\boxed{\sqrt{x^2} + \sin x}", "x+1"),
    (r"\boxed{\{1,2\}}", r"[0,1)"),
    (r"\boxed{\begin{pmatrix} 1 \\ x \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{x^2+y=1}", "y=2"),
]
#: Longest answer that the reference looks into, in characters.
REFERENCE_LENGTH = 30
#: Longest answer that math-verify is asked about, in characters.
MAX_ANSWER_LENGTH = 1000
#: Deepest nesting of brackets that math-verify is asked about.
MAX_NESTING = 40

_PLAIN = re.compile(r"(-?)(?:(\d+(?:\.\d+)?)|\\[dt]?frac\{(\d+)\}\{(\d+)\})", re.ASCII)
_BOXES = ("\\boxed{", "\\boxed {", "\\fbox{")
_TRAILING = re.compile(r"(?:(?<!\\)[\s.]|\\[,;! ])+$")
#: What stands between the expressions of a list, a set, an interval, a matrix or a relation.
_BETWEEN = re.compile(
    r"[,;=<>&]|\\\\|\\[{}]|\\(?:le|leq|ge|geq|ne|neq|in|cup|cap)(?![A-Za-z])"
    r"|\\(?:begin|end)\{[a-z]*\}|\\(?:text|mathrm|mbox)\{[^{}]*\}"
)
_FLOAT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


def judge(verifier: str, response: str, gold: str) -> Judgement:
    """(verdict, why, the final answer in a normal form) of one response."""
    return {"reference": judge_by_reference, "math_verify": judge_by_math_verify}[verifier](
        response, gold
    )


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{…} or \fbox{…}; None where there is none, or it does not end."""
    starts = [text.rfind(opening) + len(opening) for opening in _BOXES if opening in text]
    depth, start = 1, max(starts, default=len(text))
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None


def judge_by_reference(response: str, gold: str) -> Judgement:
    answer = boxed(response)
    answer = (response if answer is None else answer).strip()
    said, gold = hendrycks(answer)[:MAX_ANSWER_LENGTH], gold.strip()
    if answer == gold:
        return "correct", "equal text", said
    if len(answer) > REFERENCE_LENGTH:
        return "wrong", f"over {REFERENCE_LENGTH} characters", said
    expected = hendrycks(gold)
    if said and (said == expected or _equal_floats(said, expected)):
        return "correct", "equal after normalisation", said
    try:
        if latex_values.same_value(answer, gold):
            return "correct", "equal value", said
        why = "another value"
    except ValueError as error:
        why = f"no value: {error}"
    found = minerva(answer)
    if found and found == minerva(gold):
        return "correct", "equal after Minerva's normalisation", said
    return "wrong", why, said


def judge_by_math_verify(response: str, gold: str) -> Judgement:
    answer = boxed(response)
    if answer is None:
        tagged = re.findall(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", response, re.DOTALL)
        answer = tagged[-1] if tagged else ""
    answer = answer.strip()
    if not answer:
        return "wrong", "no answer", ""
    said = hendrycks(answer)[:MAX_ANSWER_LENGTH]
    if answer == gold.strip():
        return "correct", "equal text", said
    if len(answer) > MAX_ANSWER_LENGTH:
        return "unparsed", "too long", said
    verdict, why = _compare(_TRAILING.sub("", latex_grammar.spelled(answer)), gold)
    return verdict, why, said


@functools.lru_cache(4096)  # responses to one problem repeat their answers
def _compare(answer: str, gold: str) -> _Finding:
    if found := _compare_numbers(_plain_numbers(answer), _plain_numbers(gold)):
        return found
    if why := _refusal(answer):
        return "unparsed", why
    from math_verify import verify

    golds, answers = _parsed(gold), _parsed(answer)
    if not golds or not answers:
        return "unparsed", "can't be read" if golds else "the known answer can't be read"
    # The known answer comes first: the comparison is not symmetric.
    same = verify(golds, answers, timeout_seconds=None, raise_on_error=True)
    return ("correct", "equal by math-verify") if same else ("wrong", "differs by math-verify")


def _compare_numbers(answer: list[Fraction], gold: list[Fraction]) -> _Finding | None:
    """Most answers are numbers, or several in parentheses: math-verify says the same of them, a
    hundred times slower."""
    if not answer or len(answer) != len(gold):
        return None
    if answer == gold:
        return "correct", "equal numbers"
    if all(value.denominator == 1 for value in answer + gold):
        return "wrong", "another whole number"
    return None  # it may still be near enough


@functools.lru_cache(4096)
def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer, read as LaTeX in a box; empty where it is none."""
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"\\boxed{{{answer}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=cast(int, None),  # that of the worker will do
        raise_on_error=True,
    )


def _plain_number(text: str) -> Fraction | None:
    """The value of a whole number, a decimal or a fraction of whole numbers; else None."""
    match = _PLAIN.fullmatch(text)
    if match is None or len(text) > REFERENCE_LENGTH:
        return None
    sign, number, above, below = match.groups()
    if number is None and not int(below):
        return None
    value = Fraction(number) if number is not None else Fraction(int(above), int(below))
    return -value if sign else value


def _plain_numbers(text: str) -> list[Fraction]:
    """The values of one plain number, or of several in parentheses; else none."""
    several = text.startswith("(") and text.endswith(")") and "," in text
    found = [_plain_number(part.strip()) for part in text[1:-1].split(",")] if several else []
    values = [value for value in found or [_plain_number(text)] if value is not None]
    return values if len(values) == max(1, len(found)) else []


def _refusal(answer: str) -> str:
    """Why math-verify is not asked: it would take very long, or all of the stack."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return "nested too deep"
    return "too large" if any(map(_is_too_large, [answer, *_BETWEEN.split(answer)])) else ""


def _is_too_large(text: str) -> bool:
    """Whether it is an expression of a value that is too large; brackets may be left open."""
    for form in (text, text.lstrip("([ ").rstrip(")] ")):
        try:
            node = latex_grammar.parse(form)
            latex_values.evaluate(node, dict.fromkeys(latex_grammar.letters(node), Fraction(2)))
        except latex_values.TooLargeError:
            return True
        except ValueError:
            continue
    return False


def _equal_floats(left: str, right: str) -> bool:
    if not (_FLOAT.fullmatch(left) and _FLOAT.fullmatch(right)):
        return False
    return float(left) == float(right)


def hendrycks(text: str) -> str:
    """The normal form of the MATH data set's own scorer: LaTeX without what only looks."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for noise in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", "$", r"\%", "%"):
        text = text.replace(noise, "")
    if text.count(r"\text{ ") == 1:  # a unit; more of them are words
        text = text.split(r"\text{ ")[0]
    text = re.sub(r"(^| |\{)\.(?=\d)", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and len(left.strip()) <= 2 and "=" not in right:
        text = right
    text = re.sub(r"\\sqrt([^{\[\s])", r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\frac([^{\s])([^{\s])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\s])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([^{])", r"\1{\2}", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    if simple := re.fullmatch(r"(-?\d+)/(-?\d+)", text, re.ASCII):
        return rf"\frac{{{simple[1]}}}{{{simple[2]}}}"
    return text


#: Words that say nothing about a value: articles, and what answers are counted in.
_WORDS = (
    "square ways integers dollars mph inches hours km units feet minutes digits cents degrees cm "
    "gm pounds meters meals edges students children tickets multiples"
).split()


def minerva(text: str) -> str:
    """The normal form of the Minerva paper (arXiv 2206.14858, its appendix on evaluation)."""
    text = text.rsplit("=", maxsplit=1)[-1]
    for old, new in (
        ("an ", ""),
        ("a ", ""),
        (".$", "$"),
        ("\\$", ""),
        (r"\ ", ""),
        ("mbox", "text"),
    ):
        text = text.replace(old, new)
    text = text.replace(",\\text{and}", ",").replace("\\text{and}", ",").replace("\\text{m}", "")
    for word in _WORDS:
        text = re.sub(rf"\b{word}\b", "", text)
    for noise in (
        r"\text{s}",
        r"\text{.}",
        r"\text{}",
        r"^\circ",
        r"^{\circ}",
        r"\;",
        r",\!",
        r"{,}",
    ):
        text = text.replace(noise, "")
    text = text.replace(r"\ldots", "").replace(r"\dots", "").replace(" ", "")
    if inner := re.search(r"\$(.*?)\$", text):
        text = inner[1]
    for command in ("text", "textbf", "overline", "boxed", "mathrm"):
        text = re.sub(rf"\\{command}\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"(frac)([^{])(.)", r"\1{\2}{\3}", text)
    text = re.sub(r"(sqrt)([^{\[])", r"\1{\2}", text)
    text = text.replace("$", "")
    if text.replace(",", "").isdigit():
        return text.replace(",", "")
    return text
