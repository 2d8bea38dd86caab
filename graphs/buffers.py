"""The static tensors that a decode step reads: one set, of which a bucket uses the first entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["MAX_END_IDS", "RowInput", "StepBuffers", "make_buffers", "pack"]

MAX_END_IDS = 32
_NEUTRAL = (0.0, 0.0, 1.0)
_MULTIPLE = 4  # entries of 4 bytes: Triton compiles a kernel anew for what lies at no multiple of 16 bytes


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

    def fill(self, inputs: Sequence[RowInput], slot: int = 0) -> None:
        """Write ``inputs`` and mark the entries after them as padding (position -1)."""
        packed = pack(inputs, len(self.tokens), self.tokens.device, slot)
        # As words of one dtype, which take one launch.
        torch._foreach_copy_([to.view(torch.int32) for to in self], [column.view(torch.int32) for column in packed])


def make_buffers(num_entries: int, device: torch.device) -> StepBuffers:
    """Buffers of ``num_entries`` padding entries."""
    return StepBuffers(*(tensor.clone() for tensor in pack([], num_entries, device)))


def pack(inputs: Sequence[RowInput], num_entries: int, device: torch.device, slot: int = 0) -> StepBuffers:
    """Buffers of ``inputs`` and padding after them, all in one piece of memory, which one copy takes to ``device``."""
    whole = -(-num_entries // _MULTIPLE) * _MULTIPLE
    entries = [*inputs, *[RowInput(row=0, token=0, position=-1)] * (whole - len(inputs))]
    longs = np.array([(e.token, slot, e.seed) for e in entries], np.int64).T
    ints = np.array(
        [
            (e.position, e.row, e.top_k, e.banned_until, e.last_position, -1 if e.penalties is None else e.row)
            for e in entries
        ],
        np.int32,
    ).T
    floats = np.array([(e.temperature, e.top_p, e.min_p) for e in entries], np.float32).T
    penalties = np.array([entry.penalties or _NEUTRAL for entry in entries], np.float32)
    end_ids = np.full((whole, MAX_END_IDS), -1, np.int32)
    for index, entry in enumerate(inputs):
        end_ids[index, : len(entry.end_ids)] = entry.end_ids
    parts: tuple[npt.NDArray[Any], ...] = (longs, ints, floats, penalties, end_ids)
    host = torch.from_numpy(np.concatenate([part.reshape(-1).view(np.uint8) for part in parts]))
    pieces = host.to(device, non_blocking=True).split([part.nbytes for part in parts])
    placed = [
        piece.view(torch.from_numpy(part).dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True)
    ]
    tokens, slots, seeds = placed[0][:, :num_entries]
    positions, rows, top_k, banned_until, last_positions, count_rows = placed[1][:, :num_entries]
    temperature, top_p, min_p = placed[2][:, :num_entries]
    return StepBuffers(
        tokens=tokens, positions=positions, slots=slots, rows=rows, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, seeds=seeds, end_ids=placed[4][:num_entries], banned_until=banned_until,
        penalties=placed[3][:num_entries], count_rows=count_rows, last_positions=last_positions,
    )  # fmt: skip
