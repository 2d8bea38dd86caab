"""Prefill chunks as CUDA graphs: their launches take the host longer than they take the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdms.graphs.capture import Recorder, Recording

__all__ = ["ChunkBuffers", "ChunkGraphs", "Prefill", "RowChunk", "chunk_sizes", "ragged_chunk"]

_LEAST_TOKENS, _MOST_TOKENS = 64, 4096  # a longer chunk takes the device longer than the host
_MOST_ROWS = 8  # of one chunk; each costs a little whether it has tokens or not


class RowChunk(NamedTuple):
    """The next tokens of a row. ``start``: position of the first."""

    row: int
    token_ids: Sequence[int]
    start: int


class ChunkBuffers(NamedTuple):
    """The static tensors of a ragged chunk, of T tokens with those that pad it and of R rows with those that have none.

    tokens: ``[T]`` int64. positions: ``[T]`` int32, -1 for padding. rows: ``[R]`` int32. chunk_indptr: ``[R + 1]``
    int32. outputs: ``[R]`` int64, each row's last token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    chunk_indptr: torch.Tensor
    outputs: torch.Tensor


Prefill = Callable[[ChunkBuffers], torch.Tensor]  # logits [R, V] fp32


def chunk_sizes(most: int) -> tuple[int, ...]:
    """Tokens of the chunks that are captured, ascending: ``most``, or what is captured at most, and halves of it."""
    sizes = [min(most, _MOST_TOKENS)]
    while sizes[-1] // 2 >= _LEAST_TOKENS:
        sizes.append(sizes[-1] // 2)
    return tuple(reversed(sizes))


def ragged_chunk(
    chunks: Sequence[RowChunk], num_tokens: int | None = None, num_rows: int | None = None
) -> ChunkBuffers:
    """What a chunk's tensors hold, on the CPU; padded to ``num_tokens`` and ``num_rows``, where they are given."""
    indptr = [0]
    for chunk in chunks:
        indptr.append(indptr[-1] + len(chunk.token_ids))
    size = indptr[-1] if num_tokens is None else num_tokens
    without = 0 if num_rows is None else num_rows - len(chunks)
    tokens = torch.zeros(size, dtype=torch.int64, device="cpu")
    positions = torch.full((size,), -1, dtype=torch.int32, device="cpu")
    for chunk, begin, end in zip(chunks, indptr, indptr[1:], strict=False):
        tokens[begin:end] = torch.from_numpy(np.asarray(chunk.token_ids, dtype=np.int64))
        positions[begin:end] = torch.arange(chunk.start, chunk.start + end - begin, dtype=torch.int32, device="cpu")

    def tensor(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu")

    return ChunkBuffers(
        tokens=tokens,
        positions=positions,
        rows=tensor([chunk.row for chunk in chunks] + [0] * without, torch.int32),
        chunk_indptr=tensor(indptr + indptr[-1:] * without, torch.int32),
        outputs=tensor([end - 1 for end in indptr[1:]] + [0] * without, torch.int64),
    )


class ChunkGraphs:
    """Prefills ragged chunks by replays, each padded to the least size that holds it.

    prefill: launches one, over static buffers; a chunk without tokens touches no state, and warms up. sizes: tokens;
    those for which there is no memory are left out. num_rows: that the engine runs at once. Nothing that other graphs
    keep may lie in the recorder's pool: a replay could write to it.
    """

    def __init__(
        self, prefill: Prefill, sizes: Sequence[int], num_rows: int, device: torch.device, recorder: Recorder
    ) -> None:
        started = time.perf_counter()
        num_rows = self._num_rows = min(num_rows, _MOST_ROWS)
        self.buffers = ChunkBuffers(
            tokens=torch.zeros(max(sizes), dtype=torch.int64, device=device),
            positions=torch.full((max(sizes),), -1, dtype=torch.int32, device=device),
            rows=torch.zeros(num_rows, dtype=torch.int32, device=device),
            chunk_indptr=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            outputs=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )
        recordings: dict[int, Recording] = {}
        for size in sorted(sizes, reverse=True):  # so that the smaller ones find room in the pool
            recording = self._record(prefill, size, recorder)
            if recording is not None:
                recordings[size] = recording
            elif device.type == "cuda":
                torch.cuda.empty_cache()
        self._recordings = dict(sorted(recordings.items()))
        self._runs = dict.fromkeys(self._recordings, 0)
        self._seconds = time.perf_counter() - started

    def run(self, chunks: Sequence[RowChunk]) -> torch.Tensor | None:
        """Logits ``[len(chunks), V]`` after each row's last token; None, and nothing done, if none is that large."""
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        size = next((size for size in self._runs if num_tokens <= size), None)
        if size is None or len(chunks) > self._num_rows:
            return None
        for buffer, tensor in zip(self.buffers, ragged_chunk(chunks, size, self._num_rows), strict=True):
            buffer[: len(tensor)].copy_(tensor, non_blocking=True)
        self._recordings[size].replay()
        self._runs[size] += 1
        return self._recordings[size].outputs[0][: len(chunks)].clone()

    def stats(self) -> dict[str, Any]:
        """runs so far, by size; seconds that making them took; bytes of the pool that they share."""
        pool_bytes = sum(recording.pool_bytes for recording in self._recordings.values())
        return {"runs": dict(self._runs), "seconds": self._seconds, "bytes": pool_bytes}

    def _record(self, prefill: Prefill, size: int, recorder: Recorder) -> Recording | None:
        own = self.buffers._replace(tokens=self.buffers.tokens[:size], positions=self.buffers.positions[:size])

        def run() -> tuple[torch.Tensor]:
            return (prefill(own),)

        try:
            recorder.warm_up(run)
            return recorder.record(run)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        return None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Of the allocator, or as the driver, cuBLAS or a broken-off capture say it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
