"""Checkpoint folders with small real tokenizers, built like those of Qwen, Llama and Gemma."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "If x + 3 = 10 then x = 7; so \\boxed{7} is the answer to the first question.",
    "Ein schöner Tag: café, naïve, Straße. 数学は楽しい。 Привет, мир! 🎉",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 2))\n",
)
#: Words, single digits, punctuation and white space, as Qwen splits them.
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
)
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = ("qwen", "llama", "gemma", "llama2")


def byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE, special tokens behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def byte_fallback(specials: tuple[str, ...], *, leading_space: bool) -> Tokenizer:
    """A BPE on ▁-marked text that falls back to bytes, special tokens before it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        SENTENCES[:2],
        BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if piece != "<unk>"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if leading_space:
        spaces.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def starts_with(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """The same tokenizer; its post-processor puts BOS first."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def build(family: str) -> tuple[Tokenizer, dict[str, str], list[str]]:
    """Tokenizer, special tokens and the tokens of the EOS ids, as a family has them."""
    if family == "qwen":
        tokenizer = byte_level(QWEN)
        tokenizer.normalizer = normalizers.NFC()
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        return tokenizer, named, ["<|im_end|>", "<|endoftext|>"]
    if family == "llama":
        tokenizer = starts_with(byte_level(LLAMA), "<|begin_of_text|>")
        named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        return tokenizer, named, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    tokenizer = starts_with(byte_fallback(GEMMA, leading_space=family == "llama2"), "<bos>")
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return tokenizer, named, ["<eos>", "<end_of_turn>"]


def write_folder(
    folder: Path, family: str, *, config: dict[str, Any] | None = None, template: str | None = None
) -> Path:
    """The tokenizer files of a checkpoint, written by hand as its publisher would."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, named, ends = build(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **(config or {})}
    if template is not None:
        described["chat_template"] = template
    write_json(folder / "tokenizer_config.json", described)
    ids = [tokenizer.token_to_id(token) for token in ends]
    write_json(folder / "generation_config.json", {"eos_token_id": ids})
    return folder


def write_json(path: Path, content: Any) -> None:
    """A file of the folder."""
    path.write_text(json.dumps(content), encoding="utf-8")


def transformers_tokenizer(folder: Path) -> Any:
    """What transformers reads from the folder; skips the test where it isn't installed."""
    transformers = pytest.importorskip(
        "transformers", reason="parity with transformers needs the extra `parity`"
    )
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
