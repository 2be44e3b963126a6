"""Tokenizers: Hugging Face's `tokenizer.json`, and SentencePiece models, which may also be trained
on a small closed vocabulary.

A tokenizer is the files of a checkpoint folder that say what ids mean. They travel together
and as they came: into the folder of a run, and into an exported one.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from deltal_jax.errors import UserError

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
#: The model's: read for its EOS ids, never exported from here.
CONFIG = "config.json"
SETTINGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE, GENERATION_CONFIG, CONFIG)
FILES = (TOKENIZER, SENTENCEPIECE, *SETTINGS)
#: The names of single bytes in a vocabulary that falls back to them.
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Tokenizer(Protocol):
    """Text to ids and back. Ids go from sampler to trainer as they are, never through text."""

    @property
    def vocab_size(self) -> int:
        """One above the highest id. The model may have more rows."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that starts a prompt; None where prompts start with their own first id."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response; the first is the one to end a demonstration with."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of special tokens by name (`bos_token`, `eos_token`, …), for templates."""
        ...

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates by name; the usual one is `default`."""
        ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of the text, after BOS if asked and if there is one; never EOS.

        Raises UserError on text it has no pieces for.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control pieces, and ids of no piece, decode to nothing."""
        ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as its ids arrive, in whole characters; the parts join to `decode` of all ids."""
        ...

    def files(self) -> dict[str, bytes]:
        """What a checkpoint folder needs of it, by file name."""
        ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files beside a tokenizer's model say about it."""

    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    eos_ids: tuple[int, ...]  # () where neither generation config nor model config names any
    add_bos: bool  # of a SentencePiece model: a tokenizer.json says it itself


class HuggingFaceTokenizer:
    """A `tokenizer.json` with the files beside it, by their names in a checkpoint folder."""

    def __init__(self, files: Mapping[str, bytes]):
        import tokenizers

        self._files = _known(files)
        settings = read_settings(files)
        self.special_tokens = settings.special_tokens
        self.chat_templates = settings.chat_templates
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
        except ValueError as error:
            raise UserError(f"model.path: {TOKENIZER} cannot be read: {error}") from error
        # Both may be stored in the file, from how somebody called it last.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab()
        self.vocab_size = max(ids.values(), default=-1) + 1
        self._joining = {ids[piece] for piece in BYTE_PIECES if piece in ids}
        added = self._tokenizer.get_added_tokens_decoder()
        self._joining |= {i for i, token in added.items() if token.special}
        self.eos_ids = _eos_ids(settings, self._tokenizer.token_to_id)
        self.bos_id = self._find_bos()
        # Byte-level models have none: they have a piece for every byte.
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown_id = self._tokenizer.token_to_id(unknown) if unknown else None

    def _find_bos(self) -> int | None:
        """What the post-processor puts before text. Neither a `bos_token` nor an `add_bos_token`
        in the config counts beside a tokenizer.json: transformers goes by the post-processor."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        return None if whole[: len(plain)] == plain else whole[0]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._unknown_id is not None and self._unknown_id in ids:
            start, end = encoding.offsets[ids.index(self._unknown_id)]
            raise UserError(f"prompt: {text[start:end]!r} is not in the vocabulary")
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        decoder, seen, shown = DecodeStream(skip_special_tokens=True), [], 0
        held: list[int] = []
        for token in ids:
            seen.append(token)
            held.append(token)
            if self._joins_next(token):
                continue
            part = decoder.step(self._tokenizer, held)
            held = []
            if part:
                shown += len(part)
                yield part
        yield from filter(None, [self.decode(seen)[shown:]])

    def _joins_next(self, token: int) -> bool:
        """Whether the text so far may change with the next id: after a byte piece, as a run of them
        is text only as a whole, and after a token without text, which doesn't end such a run.

        `DecodeStream` raises when text that it gave out changes.
        """
        return token in self._joining or self._tokenizer.id_to_token(token) is None

    def files(self) -> dict[str, bytes]:
        return _exported(self._files)


class SentencePieceTokenizer:
    """A SentencePiece model held as bytes, with the files beside it where it came from a folder.

    Control pieces cannot be typed, so it takes no chat template.
    """

    def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
        self._files = _known(files or {}) | {SENTENCEPIECE: model}
        settings = read_settings(self._files)
        self.special_tokens = settings.special_tokens
        self.chat_templates: dict[str, str] = {}
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"model.path: {SENTENCEPIECE} cannot be read: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if settings.add_bos and bos >= 0 else None
        self.eos_ids = _eos_ids(settings, lambda _: None if eos < 0 else eos)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        ids = self._processor.encode(text)
        if self._processor.unk_id() in ids:
            pieces = self._processor.encode(text, out_type=str)
            unknown = next(
                p for p in pieces if self._processor.piece_to_id(p) == self._processor.unk_id()
            )
            raise UserError(
                f"prompt: {unknown.replace('▁', ' ').strip()!r} is not in the vocabulary"
            )
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if i < self.vocab_size])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        seen, shown = [], 0
        for token in ids:
            seen.append(token)
            text = self.decode(seen)
            if len(text) > shown and not text.endswith("\ufffd"):  # bytes may be still to come
                yield text[shown:]
                shown = len(text)
        yield from filter(None, [self.decode(seen)[shown:]])

    def files(self) -> dict[str, bytes]:
        return _exported(self._files)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, or else `tokenizer.model`.

    Raises UserError where there is neither, or where a file is broken.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"model.path: {folder} cannot be read: {error}") from error
    if TOKENIZER not in files and SENTENCEPIECE not in files:
        raise UserError(f"model.path: {folder} has neither {TOKENIZER} nor {SENTENCEPIECE}")
    return _from_files(files)


def read_settings(files: Mapping[str, bytes]) -> Settings:
    """What the files beside the model say. Raises UserError for broken ones."""
    tokenizer = _read_json(files, TOKENIZER_CONFIG)
    return Settings(
        special_tokens=_token_texts(_read_json(files, SPECIAL_TOKENS)) | _token_texts(tokenizer),
        chat_templates=_templates(tokenizer.get("chat_template"), files),
        eos_ids=_id_list(files, GENERATION_CONFIG) or _id_list(files, CONFIG),
        add_bos=tokenizer.get("add_bos_token") is not False,
    )


def train_word_tokenizer(words: list[str]) -> SentencePieceTokenizer:
    """A SentencePiece model with exactly one piece a word, for text separated by single spaces."""
    return _train(
        [" ".join(words)],
        model_type="word",
        vocab_size=len(words) + 4,
        add_dummy_prefix=True,
    )


def train_text_tokenizer(texts: list[str], vocab_size: int = 1024) -> SentencePieceTokenizer:
    """A SentencePiece model of free text, with at most so many pieces: any text has pieces, as it
    falls back to bytes, and `decode` gives it back character by character."""
    return _train(
        texts,
        model_type="bpe",  # unigram cuts words that few texts have into letters
        vocab_size=vocab_size,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        add_dummy_prefix=False,
        max_sentence_length=100_000,
    )


def _train(texts: list[str], **options: Any) -> SentencePieceTokenizer:
    """What both have in common: a text is kept as it is, and the same texts make the same model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


def _from_files(files: Mapping[str, bytes]) -> Tokenizer:
    if TOKENIZER in files:
        return HuggingFaceTokenizer(files)
    return SentencePieceTokenizer(files[SENTENCEPIECE], files)


def _known(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in FILES if name in files}


def _exported(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != CONFIG}


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"model.path: {name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path: {name} holds no JSON object")
    return content


def _token_texts(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; older files describe a token by an object with its `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _templates(configured: Any, files: Mapping[str, bytes]) -> dict[str, str]:
    """One template, or a list of named ones; a file of its own comes before either."""
    try:
        if TEMPLATE in files:
            return {"default": files[TEMPLATE].decode()}
        if isinstance(configured, list):
            return {entry["name"]: entry["template"] for entry in configured}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"model.path: the chat template cannot be read: {error!r}") from error
    return {"default": configured} if configured else {}


def _id_list(files: Mapping[str, bytes], name: str) -> tuple[int, ...]:
    """`eos_token_id` of a file: one id, several or none."""
    ids = _read_json(files, name).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"model.path: eos_token_id of {name} is {ids}, expected ids")
    return tuple(ids)


def _eos_ids(settings: Settings, token_to_id: Callable[[str], int | None]) -> tuple[int, ...]:
    """The ids that the settings name, the tokenizer's own EOS first if it is among them: it ends a
    turn, which is what a demonstration has to teach."""
    own = token_to_id(settings.special_tokens.get("eos_token", ""))
    if settings.eos_ids:
        return tuple(sorted(settings.eos_ids, key=lambda i: i != own))
    if own is None:
        raise UserError(
            f"model.path: no end of text: {GENERATION_CONFIG} needs eos_token_id, or "
            f"{TOKENIZER_CONFIG} an eos_token that the tokenizer has"
        )
    return (own,)
