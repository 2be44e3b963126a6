"""Tokenizers: SentencePiece models, loaded from bytes or trained on a small closed vocabulary."""

import io
from typing import Protocol

import sentencepiece

from deltal_jax.errors import UserError


class Tokenizer(Protocol):
    """Text to ids and back. Ids go from sampler to trainer as they are, never through text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def bos_id(self) -> int:
        """The id that starts a prompt."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS or EOS. Raises UserError on text it has no pieces for."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control pieces decode to nothing."""
        ...

    def to_bytes(self) -> bytes:
        """The serialised model."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model held as bytes, so that a checkpoint can carry it."""

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_ids = (self._processor.eos_id(),)

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(text)
        if self._processor.unk_id() in ids:
            pieces = self._processor.encode(text, out_type=str)
            unknown = next(
                p for p in pieces if self._processor.piece_to_id(p) == self._processor.unk_id()
            )
            raise UserError(
                f"prompt: {unknown.replace('▁', ' ').strip()!r} is not in the vocabulary"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def to_bytes(self) -> bytes:
        return self._model


def train_word_tokenizer(words: list[str]) -> SentencePieceTokenizer:
    """A SentencePiece model with exactly one piece a word, for text separated by single spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)]),
        model_writer=model,
        model_type="word",
        vocab_size=len(words) + 4,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=1.0,
        num_threads=1,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())
