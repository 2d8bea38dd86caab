"""The definition of prefill_attention in plain PyTorch, fp32: the mask written out, row by row and head by head."""

from __future__ import annotations

import torch

from fastdms.ops.chunk import token_flags, window_flags
from fastdms.ops.quantise import load_slots

_FOREVER = torch.iinfo(torch.int32).max


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decisions: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    chunk_indptr: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    ring: torch.Tensor,
    shift: int,
    sm_scale: float,
) -> torch.Tensor:
    group, page_size, window = q.shape[1] // k.shape[1], k_pages.shape[1], ring.shape[-1] - 1
    out = q.new_zeros(q.shape)
    for b, row in enumerate(rows.tolist()):
        chunk = slice(int(chunk_indptr[b]), int(chunk_indptr[b + 1]))
        if chunk.start == chunk.stop:
            continue
        at = positions[chunk]
        flags = token_flags(decisions[chunk], shift)
        for head in range(k.shape[1]):
            slots = torch.arange(int(live_len[row, head]), device=q.device)
            page = page_table[row, head, slots // page_size].long()
            keys = torch.cat((load_slots(k_pages, k_scales, page, slots % page_size), k[chunk, head].float()))
            values = torch.cat((load_slots(v_pages, v_scales, page, slots % page_size), v[chunk, head].float()))
            # The last position that sees each key; every stored key precedes the chunk.
            last = torch.full((keys.shape[0],), _FOREVER, dtype=torch.int32, device=q.device)
            old, slot, flagged = window_flags(ring[row, head], decisions[chunk, head], int(at[0]), shift)
            flagged &= (slot >= 0) & (slot < slots.numel())  # a starved row's ring says nothing of its span
            last[slot[flagged]] = (old[flagged] + window).int()
            last[slots.numel() :] = torch.where(flags[:, head], at + window, _FOREVER)
            first = torch.cat((torch.zeros_like(slots, dtype=torch.int32), at))
            visible = (first <= at[:, None]) & (at[:, None] <= last)
            heads = slice(head * group, (head + 1) * group)
            scores = q[chunk, heads].float().transpose(0, 1) @ keys.T * sm_scale  # [G, n, N]
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            out[chunk, heads] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out
