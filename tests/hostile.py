"""Responses that were made to execute, stall or confuse a verifier."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

#: What answers beside the hostile ones expect, and what no hostile one may be judged to be.
GOLD = "31415926"
_CODE = (
    "__import__('os').system('touch {}')",
    "__import__('pathlib').Path('{}').touch()",
    "open('{}','w').write('x')",
    "exec(\"open('{}','w')\")",
    "eval(\"__import__('os').system('touch {}')\")",
    "(lambda: open('{}','w'))()",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0]('touch {}')",
    "\\write18{{touch {}}}",
    "\\immediate\\write18{{touch {}}}",
    "\\input{{|touch {}}}",
    "\\text{{__import__('os').system('touch {}')}}",
    "\\operatorname{{open}}('{}','w')",
    "sympify(\"open('{}','w')\")",
    "$(touch {})",
    "`touch {}`",
    "x.__class__.__init__.__globals__['os'].system('touch {}')",
    "{{{{open('{}','w')}}}}",
    "cos\nos\nsystem\n(S'touch {}'\ntR.",
)
_HUGE = (
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "((((9^9)^9)^9)^9)^9",
    "999999999!",
    "(99999!)!",
    "\\binom{99999999}{4999999}",
    "2^{-99999999999}",
    "\\prod_{n=1}^{10000000} n",
    "\\sum_{n=1}^{10000000} n^n",
    "(x+1)^{99999}",
    "(x+y+z+w)^{200}",
    "\\sqrt[999999]{2^{999999}}",
    "\\int_0^1 x^{x^{x}} dx",
    "\\lim_{x\\to\\infty} x^{x^x}",
    "1e999999999",
    "9e9e9e9",
    "0.(9)",
    "\\frac{1}{10^{-999999999}}",
    "\\gcd(10^{99999}, 3^{99999})",
    "\\log_{1}{1}",
    "\\frac{0}{0}",
    "\\infty - \\infty",
)


def hostile(seed: int, count: int, canary: Path) -> Iterator[str]:
    """So many responses; those that try to execute would create the file `canary`."""
    rng = random.Random(f"hostile/{seed}")
    kinds = [_code, _huge, _nested, _long, _unicode, _regex, _unbalanced, _digits, _mixed]
    for number in range(count):
        answer = kinds[number % len(kinds)](rng, canary)
        yield rng.choice(_FRAMES)(answer)


def _code(rng: random.Random, canary: Path) -> str:
    return rng.choice(_CODE).format(canary)


def _huge(rng: random.Random, canary: Path) -> str:
    return rng.choice(_HUGE).replace("9", str(rng.randint(7, 9)), rng.randint(0, 2))


def _nested(rng: random.Random, canary: Path) -> str:
    left, right = rng.choice(
        [
            ("(", ")"),
            ("{", "}"),
            ("[", "]"),
            ("\\frac{1}{", "}"),
            ("\\sqrt{", "}"),
            ("\\left(", "\\right)"),
            ("2^{", "}"),
            ("-", ""),
            ("\\sin ", ""),
            ("|", "|"),
            ("\\boxed{", "}"),
            ("\\text{", "}"),
            ("\\begin{pmatrix}", "\\end{pmatrix}"),
        ]
    )
    depth = rng.choice([5, 20, 45, 200, 900])
    return left * depth + "1" + right * depth


def _long(rng: random.Random, canary: Path) -> str:
    piece = rng.choice(["7+", "x", "9", " ", "\\frac", "a,", "\\\\", "$", "1=", "\n", "^2", "{}"])
    return piece * rng.choice([300, 3_000, 200_000])


def _unicode(rng: random.Random, canary: Path) -> str:
    pool = (
        "\x00\x01\x1b\x7f\ud800\udfff\u200b\u202e\ufeff\uffff٣²½Ⅶ７∞√π−×\U0001f4a5\U0001d7d8é\u0301"
    )
    return "".join(rng.choice(pool + "123+") for _ in range(rng.choice([1, 5, 60])))


def _regex(rng: random.Random, canary: Path) -> str:
    piece, count = rng.choice(
        [
            ("$1", 900),
            ("answer ", 500),
            ("\\[1", 900),
            ("1 and ", 600),
            ("a" * 30 + "!", 60),
            ("\\boxed{", 500),
            ("final answer is ", 200),
            ("0" * 1000 + ".", 3),
            ("<answer>", 400),
            ("\\text{ ", 500),
            ("frac{", 700),
        ]
    )
    return piece * count


def _unbalanced(rng: random.Random, canary: Path) -> str:
    return "".join(
        rng.choice(["{", "}", "(", ")", "[", "]", "\\{", "\\left(", "\\right]", "1", "\\frac", "$"])
        for _ in range(rng.choice([3, 12, 80]))
    )


def _digits(rng: random.Random, canary: Path) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choice([90, 900, 5_000, 100_000])))
    return rng.choice(
        ["{}", "0.{}", "-{}", "{}!", "1/{}", "{}^{{2}}", "0x{}", "\\sqrt{{{}}}"]
    ).format(digits)


def _mixed(rng: random.Random, canary: Path) -> str:
    parts = (_code, _huge, _nested, _unicode, _unbalanced)
    return "".join(rng.choice(parts)(rng, canary) for _ in range(2))


_FRAMES: tuple[Callable[[str], str], ...] = (
    lambda x: f"The answer is \\boxed{{{x}}}.",
    lambda x: f"\\boxed{{{x}}}",
    lambda x: f"<answer>{x}</answer>",
    lambda x: f"\\boxed{{{x}",
    lambda x: x,
    lambda x: f"\\boxed{{\\{{1, {x}\\}}}}",
    lambda x: f"\\boxed{{x = {x}}}",
    lambda x: f"\\boxed{{{GOLD}}} no: \\boxed{{{x} + 1}}",
)
