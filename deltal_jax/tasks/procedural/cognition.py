"""Cognition: counting, finding, deciphering and reversing."""

from deltal_jax.tasks.procedural.reading import Kind, given, integer, listed, phrase

KINDS: dict[str, Kind] = {
    "letter_counting": Kind(integer, facts=given("span", "target_letter")),
    "needle_haystack": Kind(phrase),
    "caesar_cipher": Kind(phrase, facts=given("cipher_text")),
    "word_sequence_reversal": Kind(listed, facts=given("words")),
}
