"""Training text: files and data sets in, full contexts of token ids out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdms.progress import progress
from fastdms.tokenizer import encode_prompt, render_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "pack", "read_documents", "text_digest"]

_DATASET = "dataset:"
# Long texts are tokenised in pieces that end with a paragraph, so that the tokenizer's threads share them.
_PIECE_CHARS = 65536
_BATCH_PIECES = 64
_PARAGRAPH_END = re.compile(r"\n\s*\n")


class Document(NamedTuple):
    """Text, or a chat as a list of messages, and where it stands, for messages."""

    where: str
    content: str | list[dict[str, str]]


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """The documents of ``sources`` in turn.

    A source is a text file (one document), a ``.jsonl`` file whose lines are objects with ``text`` or ``messages``, a
    folder (its .txt, .md and .jsonl files, by name), or ``dataset:NAME[:SPLIT]``, which the package ``datasets`` loads.

    Raises ValueError that names the source, and the line, for what can't be read.
    """
    if not sources:
        raise ValueError("no text to train on; name at least one file, folder or dataset:NAME")
    for source in sources:
        if source.startswith(_DATASET):
            yield from _dataset(source)
            continue
        for path in _files(source):
            yield from _json_lines(path) if path.suffix == ".jsonl" else [Document(str(path), _text(path))]


def pack(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, context: int) -> npt.NDArray[np.int32]:
    """Token ids ``[N, context]``: documents in order, each followed by the end token, cut into full contexts.

    Where the tokenizer begins a text with a BOS every context does, as every prompt will.
    Raises ValueError if there is less text than one context, and for a document that can't be read, by its name.
    """
    start = np.asarray(encode_prompt(tokenizer, ""), np.int32)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[npt.NDArray[np.int32]] = []
    for document in progress(documents, desc="reading text", unit=" documents"):
        for batch in _batches(_as_text(document, tokenizer)):
            for piece in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                ids.append(np.asarray(piece, np.int32))
        ids.append(np.asarray(end, np.int32))
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    fresh = context - len(start)
    full = len(tokens) // fresh
    if full == 0:
        raise ValueError(f"the text has {len(tokens):,} tokens, less than one context of {context:,}")
    cut = tokens[: full * fresh].reshape(full, fresh)
    return np.concatenate([np.broadcast_to(start, (full, len(start))), cut], axis=1)


def text_digest(contexts: npt.NDArray[np.int32]) -> str:
    """sha256 of packed contexts, by which a resumed run knows that it goes on with the same text."""
    return hashlib.sha256(str(contexts.shape).encode() + contexts.tobytes()).hexdigest()


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl") and p.is_file())
        if not found:
            raise ValueError(f"{source} holds no .txt, .md or .jsonl file")
        return found
    if not path.is_file():
        raise ValueError(f"{source} is no file or folder; a data set is written dataset:NAME")
    return [path]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
            yield _document(row, f"{path}, line {number}")


def _dataset(source: str) -> Iterator[Document]:
    name, _, split = source.removeprefix(_DATASET).partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{source} needs the package datasets: pip install datasets") from error
    try:
        rows: Any = load_dataset(name, split=split or "train", streaming=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{source} can't be loaded: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _document(row, f"{source}, row {number}")


def _document(row: Any, where: str) -> Document:
    text = row.get("text") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(text, str):
        return Document(where, text)
    if isinstance(messages, list):
        return Document(where, messages)
    raise ValueError(f'{where}: needs "text", a string, or "messages", a list with role and content')


def _as_text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        content = document.content
        text = content if isinstance(content, str) else render_conversation(tokenizer, content)
        text.encode()
        return text
    except ValueError as error:
        raise ValueError(f"{document.where}: {error}") from error


def _batches(text: str) -> Iterator[list[str]]:
    pieces: list[str] = []
    start = 0
    while start < len(text):
        paragraph = _PARAGRAPH_END.search(text, start + _PIECE_CHARS)
        end = paragraph.end() if paragraph else len(text)
        pieces.append(text[start:end])
        start = end
        if len(pieces) == _BATCH_PIECES:
            yield pieces
            pieces = []
    if pieces:
        yield pieces
