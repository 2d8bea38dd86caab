"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastdms.kv_report import KVReport

__all__ = ["Completion", "FinishReason", "StreamPiece"]

FinishReason = Literal["stop", "length", "kv_full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished request; ``completion["text"]`` is ``completion.text``, and so for each field.

    text: what was generated, without special tokens, cut before the stop string that ended it.
    token_ids: every id that was generated, an end token included.
    finish_reason: ``"stop"`` (end token, stop token or stop string), ``"length"`` (``max_tokens``, or the end of the
        context) or ``"kv_full"`` (no page was left for the cache).
    prompt_tokens: length of the prompt in tokens.
    logprobs: one dict for each of ``token_ids``: token id to log-probability; None unless asked for.
    kv: what the request's KV cache held.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[dict[int, float]] | None
    kv: KVReport

    def __getitem__(self, name: str) -> Any:
        """The field called ``name``; KeyError for any other name."""
        if name not in (field.name for field in fields(self)):
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPiece:
    """What a stream yields: the new text (possibly empty), the new ids, and in the last piece why it ended."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
