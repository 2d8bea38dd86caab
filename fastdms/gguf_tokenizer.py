"""The tokenizer in a GGUF file, read by transformers and then brought to what the file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_gguf_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _BytePairs:
    """What the name in ``tokenizer.ggml.pre`` stands for.

    split: the regular expression whose matches are encoded on their own. single_digits: digits are, too. whole_words:
    a match that is in the vocabulary is taken whole. adds_bos: unless ``tokenizer.ggml.add_bos_token`` says otherwise.
    """

    split: str
    single_digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_LLAMA3 = _BytePairs(split=rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, adds_bos=True)
_QWEN2 = _BytePairs(split=rf"{_WORDS}|\p{{N}}|{_REST}")
_TEKKEN = _BytePairs(
    split=rf"{_CASED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    adds_bos=True,
)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTE_PAIRS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "smollm": _BytePairs(split=_GPT2_SPLIT, single_digits=True),
    "gpt-2": _BytePairs(split=_GPT2_SPLIT),
}
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a .gguf file (of a split model: its first part).

    A BOS is added as ``tokenizer.ggml.add_bos_token`` says; without it, as the vocabulary's kind usually does.
    Raises ValueError for a file that is absent, corrupt, or without a tokenizer that can be built.
    """
    from transformers import AutoTokenizer

    from fastdms.checkpoint.gguf_header import read_header

    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    metadata = {key.removeprefix("tokenizer."): value for key, value in read_header(path).metadata.items()}
    kind = metadata.get("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model must be 'gpt2' or 'llama', got {kind!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    # The tokenizers library raises bare Exceptions for what it can't build.
    except Exception as error:
        raise ValueError(f"can't read the tokenizer in {path}: {error}") from error
    for attribute, key in _SPECIAL_TOKENS.items():
        token_id = metadata.get(f"ggml.{key}")
        token = tokenizer.convert_ids_to_tokens(token_id) if isinstance(token_id, int) else None
        setattr(tokenizer, attribute, token)
    byte_pairs = _BYTE_PAIRS.get(str(metadata.get("ggml.pre"))) if kind == "gpt2" else None
    if kind == "gpt2":
        _set_byte_level(tokenizer.backend_tokenizer, byte_pairs)
    adds_bos = kind == "llama" if byte_pairs is None else byte_pairs.adds_bos
    tokenizer.add_bos_token = bool(metadata.get("ggml.add_bos_token", adds_bos)) and tokenizer.bos_token is not None
    return tokenizer


def _set_byte_level(backend: Any, byte_pairs: _BytePairs | None) -> None:
    """Versions of transformers differ in what they make of a byte-level vocabulary."""
    from tokenizers import Regex, decoders, pre_tokenizers

    backend.decoder = decoders.ByteLevel()
    if byte_pairs is None:
        return
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if byte_pairs.single_digits else []
    steps.append(pre_tokenizers.Split(Regex(byte_pairs.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = byte_pairs.whole_words
