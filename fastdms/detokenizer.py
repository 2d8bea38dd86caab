"""Token ids to text, one token at a time, at a cost that doesn't grow with the text."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "make_detokenizer"]

REPLACEMENT = "\ufffd"
LONGEST_PENDING_TOKENS = 16
SENTENCEPIECE_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP_STEP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Detokenizer(Protocol):
    """``push`` gives the text that has become certain, ``finish`` the rest; special tokens give none."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


def make_detokenizer(tokenizer: PreTrainedTokenizerBase, prompt_ids: Iterable[int] = ()) -> Detokenizer:
    """The detokenizer for one request.

    ``prompt_ids``: the tokens that the text continues. They matter where a tokenizer writes a space before the first
    word: it is dropped only when no text comes before it.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    continues = next((i for i in prompt_ids if i not in special), None)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    steps = _decoder_steps(backend)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteStream(backend.id_to_token, special, _byte_level_bytes, strip_spaces=0)
    if steps[:3] == SENTENCEPIECE_STEPS and all(step | {"start": 1} == STRIP_STEP for step in steps[3:]):
        strip_spaces = 0 if continues is not None else sum(step["start"] for step in steps[3:])
        return _ByteStream(backend.id_to_token, special, _sentencepiece_bytes, strip_spaces=strip_spaces)
    return _WindowStream(tokenizer, special, [] if continues is None else [continues])


class _ByteStream:
    """For vocabularies that spell bytes: the tokens' bytes go through an incremental UTF-8 decoder."""

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        special: set[int],
        token_bytes: Callable[[str], bytes],
        *,
        strip_spaces: int,
    ) -> None:
        self._id_to_token = id_to_token
        self._special = special
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_spaces = strip_spaces

    def push(self, token_id: int) -> str:
        token = None if token_id in self._special else self._id_to_token(token_id)
        return "" if token is None else self._stripped(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_spaces and text:
            if text[0] != " ":
                self._strip_spaces = 0
            else:
                self._strip_spaces -= 1
                text = text[1:]
        return text


class _WindowStream:
    """For any other vocabulary: what the pending tokens, decoded with the one before them, add to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: set[int], context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._window = context
        self._shown = self._decode()

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._window.append(token_id)
        text = self._decode()
        if text.endswith(REPLACEMENT) and len(self._window) < LONGEST_PENDING_TOKENS:
            return ""
        new = text[len(self._shown) :]
        self._window = [token_id]
        self._shown = self._decode()
        return new

    def finish(self) -> str:
        text = self._decode()
        new, self._shown = text[len(self._shown) :], text
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
