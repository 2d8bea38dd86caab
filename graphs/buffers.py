"""The static tensors that a decode step reads: one set, of which a bucket uses the first entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["MAX_END_IDS", "Columns", "RowInput", "StepBuffers", "make_buffers"]

MAX_END_IDS = 32
_NEUTRAL = (0.0, 0.0, 1.0)

Columns = tuple[list[Any] | None, ...]  # of the buffers, one list of entries each; None: not known


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

    def fill(self, inputs: Sequence[RowInput], held: Columns | None = None, slot: int = 0) -> Columns:
        """Write ``inputs`` and mark the entries after them as padding (position -1); returns what they then hold.

        held: what the last ``fill`` of these entries returned, if nothing has been written to them since: then only
        what differs is, which in a batch that goes on is tokens and positions.
        """
        padding = [RowInput(row=0, token=0, position=-1)] * (self.tokens.shape[0] - len(inputs))
        entries = [*inputs, *padding]
        columns: Columns = (
            [entry.token for entry in entries],
            [entry.position for entry in entries],
            [slot] * len(entries),
            [entry.row for entry in entries],
            [entry.temperature for entry in entries],
            [entry.top_k for entry in entries],
            [entry.top_p for entry in entries],
            [entry.min_p for entry in entries],
            [entry.seed for entry in entries],
            [[*entry.end_ids, *[-1] * (MAX_END_IDS - len(entry.end_ids))] for entry in entries],
            [entry.banned_until for entry in entries],
            [entry.penalties or _NEUTRAL for entry in entries],
            [-1 if entry.penalties is None else entry.row for entry in entries],
            [entry.last_position for entry in entries],
        )
        for tensor, column, before in zip(self, columns, held or [None] * len(columns), strict=True):
            if column != before:
                tensor.copy_(torch.tensor(column, dtype=tensor.dtype, device="cpu"), non_blocking=True)
        return columns


def make_buffers(num_entries: int, device: torch.device) -> StepBuffers:
    """Buffers of ``num_entries`` padding entries."""

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros((num_entries, *shape), dtype=dtype, device=device)

    buffers = StepBuffers(
        tokens=zeros(torch.int64),
        positions=zeros(torch.int32),
        slots=zeros(torch.int64),
        rows=zeros(torch.int32),
        temperature=zeros(torch.float32),
        top_k=zeros(torch.int32),
        top_p=zeros(torch.float32),
        min_p=zeros(torch.float32),
        seeds=zeros(torch.int64),
        end_ids=zeros(torch.int32, MAX_END_IDS),
        banned_until=zeros(torch.int32),
        penalties=zeros(torch.float32, 3),
        count_rows=zeros(torch.int32),
        last_positions=zeros(torch.int32),
    )
    buffers.fill([])
    return buffers
