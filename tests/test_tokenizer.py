"""The word tokenizer: one id a word, exact round trips, unknown words refused by name."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.data.tokenizer import SentencePieceTokenizer, train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.countdown import CountDown

TASK = CountDown()
WORDS = TASK.vocabulary()
TOKENIZER = train_word_tokenizer(WORDS)
CONTROLS = 4

sentences = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


def test_every_word_has_one_id_of_its_own():
    ids = [TOKENIZER.encode(word) for word in WORDS]
    assert all(len(of_word) == 1 for of_word in ids)
    assert sorted(i for (i,) in ids) == list(range(CONTROLS, CONTROLS + len(WORDS)))
    assert TOKENIZER.vocab_size == CONTROLS + len(WORDS)
    assert [TOKENIZER.decode(of_word) for of_word in ids] == WORDS


def test_bos_and_eos_are_apart_from_padding_and_from_every_word():
    assert TOKENIZER.bos_id == 1
    assert TOKENIZER.eos_ids == (2,)
    words = {i for word in WORDS for i in TOKENIZER.encode(word)}
    assert words.isdisjoint({0, TOKENIZER.bos_id, *TOKENIZER.eos_ids})


@given(sentences)
def test_text_of_known_words_survives_the_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text.split())
    assert TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(CONTROLS, CONTROLS + len(WORDS) - 1), max_size=40))
def test_sampled_word_ids_survive_the_round_trip(ids):
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


@given(sentences, sentences)
def test_encoding_a_concatenation_concatenates_the_ids(first, second):
    joined = " ".join(filter(None, (first, second)))
    assert TOKENIZER.encode(joined) == TOKENIZER.encode(first) + TOKENIZER.encode(second)


def test_prompts_and_demonstrations_of_the_task_round_trip():
    for prompt, response in itertools.islice(TASK.demonstrations(0), 200):
        for text in (prompt, response):
            assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_control_ids_decode_to_nothing():
    ids = TOKENIZER.encode("7 1 5 -> 40 :")
    assert TOKENIZER.decode([]) == ""
    assert TOKENIZER.decode([0, TOKENIZER.bos_id, *TOKENIZER.eos_ids]) == ""
    assert TOKENIZER.decode([TOKENIZER.bos_id, *ids, *TOKENIZER.eos_ids, 0, 0]) == "7 1 5 -> 40 :"


def test_a_growing_prefix_decodes_to_a_growing_text():
    ids = TOKENIZER.encode("5 + 7 = 12 < <a> 5 * ( 1 + 7 ) </a>")
    texts = [TOKENIZER.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert all(b.startswith(a) and len(b) > len(a) for a, b in itertools.pairwise(texts))


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("banana", "banana"),
        ("7 1 banana -> 40 :", "banana"),
        ("7 1 61 -> 40 :", "61"),
        ("7 1 5->40 :", "5->40"),
        ("7 / 5", "/"),
        ("７ 1", "７"),
        ("7 ٣", "٣"),
        ("first 7 second", "first"),
        ("<unk>", "<unk>"),
    ],
)
def test_an_unknown_word_is_refused_by_name(text, culprit):
    with pytest.raises(UserError) as refused:
        TOKENIZER.encode(text)
    assert str(refused.value) == f"prompt: {culprit!r} is not in the vocabulary"


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>", "7 </s> 1"])
def test_control_pieces_cannot_be_typed(text):
    with pytest.raises(UserError, match="is not in the vocabulary"):
        TOKENIZER.encode(text)


@given(sentences.filter(bool))
def test_a_tokenizer_from_bytes_is_the_same_tokenizer(text):
    again = SentencePieceTokenizer(TOKENIZER.to_bytes())
    assert again.to_bytes() == TOKENIZER.to_bytes()
    assert (again.vocab_size, again.bos_id, again.eos_ids) == (
        TOKENIZER.vocab_size,
        TOKENIZER.bos_id,
        TOKENIZER.eos_ids,
    )
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text)) == text


def test_training_twice_gives_the_same_bytes():
    assert train_word_tokenizer(list(WORDS)).to_bytes() == TOKENIZER.to_bytes()


def test_every_vocabulary_of_the_task_gets_one_id_a_word():
    for task in (CountDown(max_value=10), CountDown(numbers=6, max_number=100, max_value=1000)):
        words = task.vocabulary()
        tokenizer = train_word_tokenizer(words)
        assert tokenizer.vocab_size == CONTROLS + len(words)
        assert len({tuple(tokenizer.encode(word)) for word in words}) == len(words)
        problem = task.problem(0, 0)
        assert tokenizer.decode(tokenizer.encode(problem.prompt)) == problem.prompt
