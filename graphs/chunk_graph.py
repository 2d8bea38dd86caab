"""A whole prefill chunk of one row as a CUDA graph: its launches take the host longer than they take the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastdms.graphs.capture import Recorder

__all__ = ["ChunkBuffers", "ChunkGraph", "Prefill"]


class ChunkBuffers(NamedTuple):
    """The static tensors of a chunk of T tokens of one row.

    tokens: ``[T]`` int64. positions: ``[T]`` int32. rows: ``[1]`` int32. chunk_indptr: ``[2]`` int32, (0, T), or (0, 0)
    for a chunk that is empty. outputs: ``[1]`` int64, T - 1.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    chunk_indptr: torch.Tensor
    outputs: torch.Tensor


Prefill = Callable[[ChunkBuffers], torch.Tensor]  # logits [1, V] fp32


class ChunkGraph:
    """Prefills ``num_tokens`` tokens of one row at a time, by replays of one recording.

    prefill: launches it, over static buffers; an empty chunk touches no state, and warms up. Nothing that other graphs
    keep may lie in the recorder's pool: a replay could write to it.
    """

    def __init__(self, prefill: Prefill, num_tokens: int, device: torch.device, recorder: Recorder) -> None:
        started = time.perf_counter()
        self._buffers = ChunkBuffers(
            tokens=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.full((num_tokens,), -1, dtype=torch.int32, device=device),
            rows=torch.zeros(1, dtype=torch.int32, device=device),
            chunk_indptr=torch.zeros(2, dtype=torch.int32, device=device),
            outputs=torch.full((1,), num_tokens - 1, dtype=torch.int64, device=device),
        )
        self._steps = torch.arange(num_tokens, dtype=torch.int32, device=device)

        def run() -> tuple[torch.Tensor]:
            return (prefill(self._buffers),)

        recorder.warm_up(run)
        self._recording = recorder.record(run)
        self._buffers.chunk_indptr[1] = num_tokens
        self._runs, self._seconds = 0, time.perf_counter() - started

    @property
    def num_tokens(self) -> int:
        """Tokens of a chunk; no other length can be run."""
        return self._buffers.tokens.shape[0]

    @property
    def buffers(self) -> ChunkBuffers:
        """What the recording reads."""
        return self._buffers

    def run(self, row: int, token_ids: Sequence[int], start: int) -> torch.Tensor:
        """Prefill ``token_ids``, the first of which is at position ``start``; logits ``[1, V]`` after the last."""
        if len(token_ids) != self.num_tokens:
            raise ValueError(f"this graph prefills {self.num_tokens} tokens, got {len(token_ids)}")
        self._buffers.tokens.copy_(torch.tensor(token_ids, device="cpu"), non_blocking=True)
        torch.add(self._steps, start, out=self._buffers.positions)
        self._buffers.rows.fill_(row)
        self._recording.replay()
        self._runs += 1
        return self._recording.outputs[0].clone()

    def stats(self) -> dict[str, Any]:
        """num_tokens, runs so far, seconds that making it took, and the bytes that it keeps, scratch among them."""
        kept = self._recording.kept_bytes + self._recording.pool_bytes
        return {"num_tokens": self.num_tokens, "runs": self._runs, "seconds": self._seconds, "bytes": kept}
