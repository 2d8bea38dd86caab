"""One request on its way through the engine."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence

import torch

from fastdms.completion import FinishReason, StreamPiece
from fastdms.graphs import RowInput
from fastdms.kv_report import RowUsage
from fastdms.sampling_params import SamplingParams
from fastdms.text_stream import TextStream

__all__ = ["Request"]

# The step's buffers are int32 and fp32: a larger top_k is no limit anyway, nor is a larger min_tokens ever reached; a
# smaller top_p or repetition penalty would become 0, and at an infinite temperature all logits would be alike, so that
# top_k could not tell them apart.
_INT32_MAX = 2**31 - 1
_SMALLEST = 1e-30
_HOTTEST = 1e30


class Request:
    """State of one prompt: what is wanted, what the cache holds of it, and what came out.

    The cache is to hold the prompt and all generated tokens but the last, which the next decode step feeds.
    ``row``: its cache row, None while it waits. ``computed``: tokens in the cache. ``ended_in_step``: by one of
    ``end_ids`` or by length, which the step that sampled its last token knew, too.
    """

    def __init__(
        self,
        *,
        arrival: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        end_ids: frozenset[int],
        max_context: int,
        text: TextStream | None,
    ) -> None:
        self.arrival = arrival
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.penalties = params.penalties
        if self.penalties is not None:
            self.penalties = (*self.penalties[:2], max(self.penalties[2], _SMALLEST))
        self.end_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else end_ids)
        self.max_tokens = min(params.max_tokens, max_context - len(self.prompt_ids))
        self.text = text
        self.row: int | None = None
        self.computed = 0
        self.expected_pages = 0
        self.output_ids: list[int] = []
        self.logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self.pieces: deque[StreamPiece] = deque()
        self.finish_reason: FinishReason | None = None
        self.ended_in_step = False
        self.error: ValueError | None = None
        self.usage: RowUsage | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def to_compute(self) -> list[int]:
        """Tokens that must be in the cache before the next decode step."""
        return self.prompt_ids + self.output_ids[:-1] if self.output_ids else self.prompt_ids

    @property
    def prefilled(self) -> bool:
        """Whether the next step of this request is a decode step."""
        return self.computed >= len(self.prompt_ids) + max(0, len(self.output_ids) - 1)

    def row_input(self) -> RowInput:
        """What its row asks of the next sampling: feeds the last token, samples the one after it."""
        p = self.params
        ids = self.output_ids or self.prompt_ids
        return RowInput(
            row=0 if self.row is None else self.row,
            token=ids[-1],
            position=len(self.prompt_ids) + len(self.output_ids) - 1,
            temperature=min(p.temperature, _HOTTEST),
            top_k=min(max(0, p.top_k), _INT32_MAX),
            top_p=max(p.top_p, _SMALLEST),
            min_p=p.min_p,
            seed=self.seed,
            end_ids=tuple(sorted(self.end_ids)),
            banned_until=min(len(self.prompt_ids) + p.min_tokens, _INT32_MAX),
            penalties=self.penalties,
            last_position=len(self.prompt_ids) + self.max_tokens - 1,
        )

    def accept(self, token: int, logits: torch.Tensor) -> None:
        """Take the sampled ``token``, drawn from ``logits [V]`` fp32, and see whether it ends the request."""
        if self.logprobs is not None:
            self.logprobs.append(_top_logprobs(logits, token, self.params.logprobs or 0))
        self.output_ids.append(token)
        reason: FinishReason | None = None
        by_id = token in self.end_ids and len(self.output_ids) >= self.params.min_tokens
        by_length = len(self.output_ids) >= self.max_tokens
        self.ended_in_step = by_id or by_length
        piece = self.text.push(token) if self.text else ""
        if by_id or (self.text is not None and self.text.stopped):
            reason = "stop"
        elif by_length:
            reason = "length"
        if reason is None:
            self.pieces.append(StreamPiece(text=piece, token_ids=[token]))
        else:
            self.finish(reason, piece, [token])

    def finish(self, reason: FinishReason, piece: str = "", token_ids: Sequence[int] = ()) -> None:
        """End the request; held-back text comes out with the last piece."""
        if self.text is not None:
            piece += self.text.finish()
            reason = "stop" if self.text.stopped else reason
        self.finish_reason = reason
        self.pieces.append(StreamPiece(text=piece, token_ids=list(token_ids), finish_reason=reason))


def _top_logprobs(logits: torch.Tensor, token: int, count: int) -> dict[int, float]:
    """Log-probabilities of the ``count`` likeliest tokens and of the chosen one, before any sampling setting."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return top if token in top else {**top, token: float(logprobs[token])}
