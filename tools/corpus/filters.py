"""What of a source's text is worth training on: English, neither tables nor data, and no boilerplate."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

__all__ = ["cleaned", "normalised", "sampled"]

_COMMON_WORD = re.compile(
    "a|an|and|are|as|at|be|but|by|can|for|from|has|have|he|his|i|if|in|is|it|not|of|on|or|that|the|this|to|was|which|will|"
    "with|you"
)
_MIN_COMMON_SHARE = 0.1
_MIN_DOCUMENT_CHARS = 400
_MIN_LETTER_SHARE = 0.5
_MAX_DIGIT_SHARE = 0.2
_MAX_WORD_CHARS = 120
# A paragraph of at least that length is a licence or navigation when it comes a third time.
_MIN_REPEATED_CHARS = 60
_MAX_REPEATS = 2


def normalised(text: str) -> str:
    """Return text in Unicode's NFC with plain spaces and line ends, and without control or invisible characters."""
    text = unicodedata.normalize("NFC", re.sub(r"\r\n?", "\n", text)).replace("\xa0", " ")
    text = re.sub("[\u200b-\u200f\u2060\ufeff\xad\ufffd]|[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n")


def cleaned(document: str, seen: Counter[str]) -> str:
    """Return a document's usable text, or "" if it isn't English or too short.

    Args:
        document: normalised text, paragraphs separated by empty lines.
        seen: how often each long paragraph has come in the documents so far; is added to.
    """
    kept = []
    for paragraph in re.split(r"\n{2,}", document):
        if not _is_text(paragraph):
            continue
        if len(paragraph) >= _MIN_REPEATED_CHARS:
            seen[paragraph] += 1
            if seen[paragraph] > _MAX_REPEATS:
                continue
        kept.append(paragraph)
    text = "\n\n".join(kept)
    return text if len(text) >= _MIN_DOCUMENT_CHARS and _is_english(text) else ""


def sampled(documents: list[str], limit_bytes: int | None) -> list[str]:
    """Return documents of at most ``limit_bytes`` (UTF-8) together, chosen by their hash, in their own order."""
    if limit_bytes is None:
        return documents
    encoded = [document.encode() for document in documents]
    chosen: list[int] = []
    left = limit_bytes
    for i in sorted(range(len(documents)), key=lambda i: hashlib.sha256(encoded[i]).digest()):
        if len(encoded[i]) <= left:
            chosen.append(i)
            left -= len(encoded[i])
    return [documents[i] for i in sorted(chosen)]


def _is_text(paragraph: str) -> bool:
    visible = re.sub(r"\s", "", paragraph)
    letters, digits = sum(map(str.isalpha, visible)), sum(map(str.isdigit, visible))
    if letters == 0 or any(len(word) > _MAX_WORD_CHARS for word in paragraph.split()):
        return False
    if len(visible) < _MIN_REPEATED_CHARS:
        return True
    return letters >= _MIN_LETTER_SHARE * len(visible) and digits <= _MAX_DIGIT_SHARE * len(visible)


def _is_english(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(bool(_COMMON_WORD.fullmatch(word)) for word in words) >= _MIN_COMMON_SHARE * len(words)
