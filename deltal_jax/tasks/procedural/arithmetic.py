"""Arithmetic: sums, factors, fractions, bases and dice."""

import re

from deltal_jax.tasks.procedural.reading import Kind, Wrong, fraction, given, integer, integers


def read_factors(text: str, facts: dict) -> list[int]:
    """Factors in ascending order, separated by ×, x, *, spaces or commas."""
    return sorted(integers(re.sub(r"[×x*]|\\times", " ", text), facts))


def read_numeral(text: str, facts: dict) -> str:
    """Digits and letters of a number in some base; leading zeros do not count."""
    del facts
    match = re.fullmatch(r"0*([0-9a-z]{1,100})", text.strip().lower(), re.ASCII)
    if match is None:
        raise Wrong("not a number")
    return match[1]


def is_numeral(digits: str, facts: dict) -> bool:
    """Whether these are the digits of the number in the base that is asked for."""
    try:
        return int(digits, facts["target_base"]) == facts["decimal_value"]
    except ValueError:  # a digit that the base has not
        return False


def _numbers(entry: dict) -> dict:
    return {"numbers": sorted(entry["metadata"]["numbers"])}


KINDS: dict[str, Kind] = {
    "chain_sum": Kind(integer, facts=given("expression")),
    "gcd": Kind(integer, facts=_numbers),
    "lcm": Kind(integer, facts=_numbers),
    "prime_factorization": Kind(read_factors, facts=given("number")),
    "fraction_simplification": Kind(fraction, facts=given("numerator", "denominator")),
    "base_conversion": Kind(
        read_numeral,
        is_numeral,
        given("decimal_value", "source_base", "target_base"),
        options={"min_value": 1},  # the generator writes 0 without a digit
    ),
    "dice": Kind(fraction, facts=given("puzzle")),
}
