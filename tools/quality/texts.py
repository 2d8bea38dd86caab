"""Text files to sequences of token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdms.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Text", "encode_plain", "read_texts", "token_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to measure on, and the name that it has in reports and file names."""

    name: str
    content: str


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[Text]:
    """The UTF-8 files, each named by its own name without its suffix; ValueError for one that can't be read.

    Two files of one name are refused, for their pictures would overwrite each other.
    """
    texts: dict[str, Text] = {}
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the text {path} can't be read: {error}") from error
        if path.stem in texts:
            raise ValueError(f"two texts are named {path.stem}; rename one of the files")
        texts[path.stem] = Text(name=path.stem, content=content)
    return list(texts.values())


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a piece of text, without the BOS that a prompt may begin with."""
    return encode_prompt(tokenizer, text)[len(encode_prompt(tokenizer, "")) :]


def token_windows(tokenizer: PreTrainedTokenizerBase, text: Text, num_tokens: int, count: int) -> list[list[int]]:
    """``count`` sequences of ``num_tokens`` ids, spread evenly from the beginning of the text to its end.

    They don't overlap; where the text is too short for so many, there are fewer. Each begins with a BOS, which counts,
    where the tokenizer adds one. Raises ValueError where the text is shorter than one sequence.
    """
    begin = encode_prompt(tokenizer, "")
    ids = encode_plain(tokenizer, text.content)
    body = num_tokens - len(begin)
    if len(ids) < body:
        raise ValueError(f"the text {text.name} has {len(begin) + len(ids):,} tokens; {num_tokens:,} are needed")
    count = min(count, len(ids) // body)
    starts = [i * (len(ids) - body) // max(1, count - 1) for i in range(count)]
    return [begin + ids[start : start + body] for start in starts]
