"""The word tokenizer: one id a word, exact round trips, unknown words refused by name. Tokenizers
of checkpoint folders: the ids and the text of transformers, exact round trips, streams that lose
nothing."""

import functools
import io
import itertools
import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from deltal_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    read_tokenizer,
    train_text_tokenizer,
    train_word_tokenizer,
)
from deltal_jax.errors import UserError
from deltal_jax.tasks.countdown.trace import CountDown
from tests.small_tokenizers import (
    FAMILIES,
    GEMMA,
    SENTENCES,
    build,
    transformers_tokenizer,
    write_folder,
    write_json,
)

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
def test_a_tokenizer_from_its_files_is_the_same_tokenizer(text):
    again = SentencePieceTokenizer(*TOKENIZER.files().values())
    assert again.files() == TOKENIZER.files()
    assert (again.vocab_size, again.bos_id, again.eos_ids) == (
        TOKENIZER.vocab_size,
        TOKENIZER.bos_id,
        TOKENIZER.eos_ids,
    )
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text)) == text


def test_training_twice_gives_the_same_bytes():
    assert train_word_tokenizer(list(WORDS)).files() == TOKENIZER.files()


def test_every_vocabulary_of_the_task_gets_one_id_a_word():
    for task in (CountDown(max_value=10), CountDown(numbers=6, max_number=100, max_value=1000)):
        words = task.vocabulary()
        tokenizer = train_word_tokenizer(words)
        assert tokenizer.vocab_size == CONTROLS + len(words)
        assert len({tuple(tokenizer.encode(word)) for word in words}) == len(words)
        problem = task.problem(0, 0)
        assert tokenizer.decode(tokenizer.encode(problem.prompt)) == problem.prompt


def test_a_missing_bos_or_an_id_of_no_piece_is_harmless():
    assert TOKENIZER.encode("7 1", bos=True) == [TOKENIZER.bos_id, *TOKENIZER.encode("7 1")]
    assert TOKENIZER.decode([*TOKENIZER.encode("7 1"), TOKENIZER.vocab_size]) == "7 1"


TEXTS = (*SENTENCES, "", " ", "  two  spaces ", "日本語🎉 é x", "\n\n", "a\u200b b", "12345 + 678")
texts = st.one_of(st.text(max_size=30), st.sampled_from(TEXTS))


@functools.cache
def of_family(family: str) -> HuggingFaceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = read_tokenizer(write_folder(Path(folder), family))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@functools.cache
def byte_fallback_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts)
def test_text_survives_the_round_trip_through_ids(family, text):
    # ▁ is how these vocabularies write a space.
    text = unicodedata.normalize("NFC", text).replace("▁", "_")
    assert of_family(family).decode(of_family(family).encode(text)) == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(family, text, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path, family))
    ours = read_tokenizer(tmp_path)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, bos=True) == theirs(text).input_ids
    ids = [*theirs(text).input_ids, *ours.eos_ids]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.vocab_size, ours.special_tokens["eos_token"]) == (len(theirs), theirs.eos_token)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_saved_gives_the_same_ids(family, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path / "first", family))
    theirs.save_pretrained(tmp_path / "second")
    write_json(tmp_path / "second" / "config.json", {"eos_token_id": theirs.eos_token_id})
    ours = read_tokenizer(tmp_path / "second")
    assert ours.eos_ids == (theirs.eos_token_id,)
    for text in TEXTS:
        assert ours.encode(text, bos=True) == theirs(text).input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_exported_files(family, tmp_path):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    ours = read_tokenizer(write_folder(tmp_path / "first", family, template=template))
    (tmp_path / "second").mkdir()
    for name, content in ours.files().items():
        (tmp_path / "second" / name).write_bytes(content)
    theirs = transformers_tokenizer(tmp_path / "second")
    assert theirs.chat_template == template == ours.chat_templates["default"]
    for text in TEXTS:
        assert ours.encode(text, bos=True) == theirs(text).input_ids


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts)
def test_special_tokens_are_added_only_when_asked_for(family, text):
    tokenizer, special = of_family(family), set(of_family(family).special_tokens.values())
    if any(token in text for token in special):
        return
    plain = tokenizer.encode(text)
    assert set(plain).isdisjoint({tokenizer.bos_id, *tokenizer.eos_ids})
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert tokenizer.encode(text, bos=True) == [*start, *plain]


def test_a_special_token_in_the_text_is_its_one_id_and_decodes_to_nothing():
    tokenizer = of_family("qwen")
    end, start, hi = 402, 401, tokenizer.encode("hi")
    assert tokenizer.encode("<|im_start|>hi<|im_end|>") == [start, *hi, end]
    assert tokenizer.decode([start, *hi, end]) == "hi"


def test_only_what_the_post_processor_adds_is_a_bos(tmp_path):
    def bos(name, family, config):
        return read_tokenizer(write_folder(tmp_path / name, family, config=config)).bos_id

    assert bos("a", "llama", {}) == 400
    assert bos("b", "llama", {"bos_token": None, "add_bos_token": False}) == 400
    assert bos("c", "qwen", {}) is None
    assert bos("d", "qwen", {"bos_token": "<|endoftext|>", "add_bos_token": True}) is None


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"add_bos_token": False}),
        ("qwen", {"bos_token": "<|endoftext|>"}),
        ("qwen", {"bos_token": "<|endoftext|>", "add_bos_token": True}),
        ("qwen", {"bos_token": None, "add_bos_token": True}),
        ("qwen", {"tokenizer_class": "Qwen2Tokenizer"}),
    ],
)
def test_transformers_starts_text_with_the_same_bos(family, config, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path, family, config=config))
    for text in TEXTS:
        assert read_tokenizer(tmp_path).encode(text, bos=True) == theirs(text).input_ids


def test_several_eos_ids_are_read_and_the_turn_ends_with_the_first():
    assert of_family("qwen").eos_ids == (402, 400)
    # The file lists 401, 402, 403; `eos_token` is <|eot_id|>, 403.
    assert of_family("llama").eos_ids == (403, 401, 402)
    assert of_family("gemma").eos_ids == (1, 5)


def test_eos_ids_come_from_the_generation_config_then_the_config_then_the_tokenizer(tmp_path):
    write_folder(tmp_path, "qwen")
    write_json(tmp_path / "config.json", {"eos_token_id": [7, 8]})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    assert read_tokenizer(tmp_path).eos_ids == (9,)
    write_json(tmp_path / "generation_config.json", {"temperature": 0.7})
    assert read_tokenizer(tmp_path).eos_ids == (7, 8)
    (tmp_path / "config.json").unlink()
    assert read_tokenizer(tmp_path).eos_ids == (402,)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|im_start|>"}})
    assert read_tokenizer(tmp_path).eos_ids == (401,)
    (tmp_path / "tokenizer_config.json").unlink()
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    assert read_tokenizer(tmp_path).eos_ids == (400,)


def ids_below(limit: int):
    return st.lists(st.integers(0, limit), max_size=40)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_a_stream_of_any_ids_joins_to_their_text(family, data):
    tokenizer = of_family(family)
    ids = data.draw(ids_below(tokenizer.vocab_size + 5))
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(ids=ids_below(270))
def test_a_stream_of_sampled_bytes_joins_to_their_text(family, ids):
    # The first 270 ids of every one of these vocabularies are nearly all single bytes.
    assert "".join(of_family(family).stream(ids)) == of_family(family).decode(ids)


@pytest.mark.parametrize("family", ["gemma", "llama2"])
def test_a_special_token_inside_a_run_of_bytes_does_not_break_the_stream(family):
    tokenizer = of_family(family)
    seven, first = (len(GEMMA) + byte for byte in (0x37, 0xE4))
    ids = [seven, tokenizer.eos_ids[0], first, *tokenizer.encode("dog")]
    # A run of bytes is text only as a whole: the 7 is lost with the byte behind it.
    assert tokenizer.decode([seven]) == "7"
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).startswith("\ufffd\ufffd")


@given(ids=ids_below(400))
def test_a_stream_of_sentencepiece_ids_joins_to_their_text(ids):
    tokenizer = SentencePieceTokenizer(byte_fallback_model())
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", [*FAMILIES, "sentencepiece"])
def test_a_character_split_over_ids_is_streamed_whole(family):
    if family == "sentencepiece":
        tokenizer = SentencePieceTokenizer(byte_fallback_model())
    else:
        tokenizer = of_family(family)
    text = "ab 語🦆 cd"
    ids = tokenizer.encode(text)
    parts = list(tokenizer.stream(ids))
    assert len(tokenizer.encode("🦆")) >= 3  # it is split
    assert "".join(parts) == text
    assert not any("\ufffd" in part or not part for part in parts)
    assert len(parts) > 2  # and the rest isn't held back for it


def test_a_stream_gives_text_before_the_next_id_is_asked_for():
    tokenizer = of_family("qwen")
    asked = 0

    def ids():
        nonlocal asked
        for token in tokenizer.encode("The dog does not mind"):
            asked += 1
            yield token

    for number, _ in enumerate(tokenizer.stream(ids()), start=1):
        assert asked == number


def copied(tokenizer, folder, config=None):
    """The tokenizer, written into a folder and read again."""
    folder.mkdir()
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    if config is not None:  # the model's, which may name the EOS ids
        (folder / "config.json").write_bytes(config.read_bytes())
    return read_tokenizer(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_of_a_folder_is_the_same_from_its_files(family, tmp_path):
    write_folder(tmp_path, family, template="{{ bos_token }}{{ messages[0].content }}")
    write_json(tmp_path / "config.json", {"eos_token_id": 3, "model_type": "llama"})
    for generation in ({}, {"eos_token_id": [3, 4]}):
        write_json(tmp_path / "generation_config.json", generation)
        first = read_tokenizer(tmp_path)
        second = copied(first, tmp_path / str(len(generation)), config=tmp_path / "config.json")
        assert isinstance(second, HuggingFaceTokenizer)
        assert second.eos_ids == first.eos_ids == tuple(generation.get("eos_token_id", [3]))
        assert second.files() == first.files()
        assert (second.bos_id, second.vocab_size) == (first.bos_id, first.vocab_size)
        assert second.special_tokens == first.special_tokens
        assert second.chat_templates == first.chat_templates
        assert [second.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]


def test_an_export_takes_the_files_as_they_came_without_the_config_of_the_model(tmp_path):
    write_folder(tmp_path, "qwen")
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "notes.txt").write_text("not a tokenizer's")
    assert read_tokenizer(tmp_path).files() == {
        name: (tmp_path / name).read_bytes()
        for name in (
            *("tokenizer.json", "tokenizer_config.json"),
            *("generation_config.json", "chat_template.jinja"),
        )
    }


def test_a_sentencepiece_folder_keeps_its_eos_ids_and_files(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    alone = read_tokenizer(tmp_path)
    assert isinstance(alone, SentencePieceTokenizer)
    assert (alone.bos_id, alone.eos_ids) == (1, (2,))
    assert alone.files() == {"tokenizer.model": byte_fallback_model()}

    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, 2]})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "add_bos_token": False})
    again = copied(read_tokenizer(tmp_path), tmp_path / "copy")
    assert isinstance(again, SentencePieceTokenizer)
    assert (again.bos_id, again.eos_ids) == (None, (2, 7))
    assert again.files().keys() == {
        *("tokenizer.model", "tokenizer_config.json", "generation_config.json")
    }
    for text in ("The dog, 数学 🎉", "  two  spaces "):
        assert again.encode(text, bos=True) == again.encode(text)
        assert again.decode(again.encode(text)) == text


def test_a_word_tokenizer_is_read_back_from_a_folder(tmp_path):
    again = copied(TOKENIZER, tmp_path / "copy")
    assert again.files() == TOKENIZER.files()
    assert (again.bos_id, again.eos_ids) == (TOKENIZER.bos_id, TOKENIZER.eos_ids)
    assert again.encode("7 1 5 -> 40 :") == TOKENIZER.encode("7 1 5 -> 40 :")


def test_a_tokenizer_json_comes_before_a_sentencepiece_model(tmp_path):
    write_folder(tmp_path, "llama2")
    (tmp_path / "tokenizer.model").write_bytes(byte_fallback_model())
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("The dog") == of_family("llama2").encode("The dog")
    assert tokenizer.files()["tokenizer.model"] == byte_fallback_model()


def test_truncation_and_padding_stored_in_the_file_do_not_count(tmp_path):
    stored, _, _ = build("qwen")
    stored.enable_truncation(3)
    stored.enable_padding(length=64)
    write_folder(tmp_path, "qwen")
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode(SENTENCES[0]) == of_family("qwen").encode(SENTENCES[0])


def test_the_vocabulary_ends_above_the_highest_id_and_ids_beyond_are_no_text():
    tokenizer = of_family("qwen")
    assert tokenizer.vocab_size == 403 == 1 + max(tokenizer.encode("<|im_end|>"))
    assert tokenizer.decode([*tokenizer.encode("hi"), 403, 151_935]) == "hi"


def test_text_without_a_piece_is_refused_by_name():
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2, "</s>": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = HuggingFaceTokenizer(
        {
            "tokenizer.json": words.to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": "</s>"}).encode(),
        }
    )
    assert tokenizer.encode("two one") == [1, 0]
    with pytest.raises(UserError) as refused:
        tokenizer.encode("one three two")
    assert str(refused.value) == "prompt: 'three' is not in the vocabulary"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ("generation_config.json", '{"eos_token_id": "2"}', "generation_config.json is ['2']"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "generation_config.json is"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "chat template cannot be read"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(name, content, says, tmp_path):
    write_folder(tmp_path, "qwen")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refused:
        read_tokenizer(tmp_path)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_broken_sentencepiece_model_is_one_line_that_names_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_or_without_an_end_says_so(tmp_path):
    with pytest.raises(UserError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer(tmp_path)
    build("qwen")[0].save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="needs eos_token_id"):
        read_tokenizer(tmp_path)


@given(st.text(max_size=60))
def test_a_tokenizer_of_free_text_gives_back_any_text(text):
    texts = ["Find the path.\n\n1 2|2 3/1 3 =", "<answer>1 2 3</answer>", "ab  ba\nab"] * 20
    tokenizer = text_tokenizer(tuple(texts))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache
def text_tokenizer(texts):
    tokenizer = train_text_tokenizer(list(texts), 300)
    assert tokenizer.files() == train_text_tokenizer(list(texts), 300).files()
    return tokenizer
