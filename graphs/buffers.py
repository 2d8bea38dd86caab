"""The static tensors that a decode step reads: one set, of which a bucket uses the first entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["MAX_END_IDS", "RowInput", "Staging", "StepBuffers", "make_buffers"]

MAX_END_IDS = 32
_NEUTRAL = (0.0, 0.0, 1.0)
_NO_IDS = (-1,) * MAX_END_IDS
_ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for what lies at no multiple of them


class RowInput(NamedTuple):
    """What one row asks of a step. ``position``: of ``token``; the sampled token will stand one further on.
    ``penalties``: presence, frequency and repetition; None, and the tokens of the row aren't counted.
    ``last_position``: of the last token that the row may get."""

    row: int
    token: int
    position: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    end_ids: tuple[int, ...] = ()
    banned_until: int = 0
    penalties: tuple[float, float, float] | None = None
    last_position: int = 2**31 - 1


_PADDING = RowInput(row=0, token=0, position=-1)


class StepBuffers(NamedTuple):
    """``[B]`` each, but ``end_ids [B, MAX_END_IDS]`` and ``penalties [B, 3]``; as ``ops.sample`` and the decoder take
    them. ``slots``: of the ``TokenRing``, all the same."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    end_ids: torch.Tensor
    banned_until: torch.Tensor
    penalties: torch.Tensor
    count_rows: torch.Tensor
    last_positions: torch.Tensor

    def first(self, num_entries: int) -> StepBuffers:
        """Views of the first ``num_entries`` entries."""
        return StepBuffers(*(tensor[:num_entries] for tensor in self))

    def words(self) -> list[torch.Tensor]:
        """Views of all as words of one dtype, which one launch copies."""
        return [tensor.view(torch.int32) for tensor in self]


# Dtype and width of an entry, in the order of ``StepBuffers``.
_COLUMNS = (
    (torch.int64, 1), (torch.int32, 1), (torch.int64, 1), (torch.int32, 1), (torch.float32, 1), (torch.int32, 1),
    (torch.float32, 1), (torch.float32, 1), (torch.int64, 1), (torch.int32, MAX_END_IDS), (torch.int32, 1),
    (torch.float32, 3), (torch.int32, 1), (torch.int32, 1),
)  # fmt: skip


def make_buffers(num_entries: int, device: torch.device) -> StepBuffers:
    """Buffers of ``num_entries`` padding entries, each in memory of its own: to the compiler what changes in one of two
    that share it may have changed in the other."""
    return StepBuffers(*(tensor.clone() for tensor in Staging(num_entries, device).pack([])))


class Staging:
    """All buffers of ``num_entries`` entries in one piece of memory, on the host and on the device, so that a single
    copy takes them there."""

    def __init__(self, num_entries: int, device: torch.device) -> None:
        begins, size = [], 0
        for dtype, width in _COLUMNS:
            begins.append(size)
            size += -(-num_entries * width * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

        def columns(memory: torch.Tensor) -> StepBuffers:
            return StepBuffers(
                *(
                    memory[begin : begin + num_entries * width * dtype.itemsize].view(dtype).view(-1, width).squeeze(1)
                    for begin, (dtype, width) in zip(begins, _COLUMNS, strict=True)
                )
            )

        self._num_written = num_entries  # of the host's entries, the first that may be anything but padding
        self._host = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._columns = [column.numpy() for column in columns(self._host)]
        self._slots = columns(self._host).slots.numpy()
        self._placed = torch.zeros_like(self._host, device=device)
        self.placed = columns(self._placed)

    def pack(self, inputs: Sequence[RowInput], slot: int = 0) -> StepBuffers:
        """``inputs`` and padding after them (position -1), on the device, until the next call."""
        entries = [*inputs, *[_PADDING] * (self._num_written - len(inputs))] or [_PADDING]
        columns = (
            [entry.token for entry in entries],
            [entry.position for entry in entries],
            slot,
            [entry.row for entry in entries],
            [entry.temperature for entry in entries],
            [entry.top_k for entry in entries],
            [entry.top_p for entry in entries],
            [entry.min_p for entry in entries],
            [entry.seed for entry in entries],
            [entry.end_ids + _NO_IDS[len(entry.end_ids) :] for entry in entries],
            [entry.banned_until for entry in entries],
            [entry.penalties or _NEUTRAL for entry in entries],
            [-1 if entry.penalties is None else entry.row for entry in entries],
            [entry.last_position for entry in entries],
        )
        self._num_written = len(entries)  # should writing break off
        for column, values in zip(self._columns, columns, strict=True):
            column[: len(entries)] = values
        self._slots[:] = slot  # of padding, too
        self._num_written = len(inputs)
        self._placed.copy_(self._host, non_blocking=True)  # pageable, so that the host may go on and change it
        return self.placed
