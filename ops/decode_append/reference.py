"""The definition of decode_append in plain PyTorch, fp32."""

from __future__ import annotations

import torch

from fastdms.ops.quantise import store_slots
from fastdms.ops.rope_decide import rope_and_decide


def decode_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    ring: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    starved: torch.Tensor,
    norm_eps: float,
    decision_scale: float,
    decision_threshold: float,
    shift: int,
    zero_borrowed: int,
) -> torch.Tensor:
    q_rot, k_rot, decision = rope_and_decide(
        q, k, alpha, q_norm, k_norm, cos, sin, positions, norm_eps, decision_scale, decision_threshold, zero_borrowed
    )
    page_size, window = k_pages.shape[1], ring.shape[-1] - 1
    padded = positions < 0
    q_rot[padded] = 0.0
    active = (~padded & (starved[rows.clamp_min(0).long()] == 0)).nonzero().flatten()
    row, t = rows[active].long(), positions[active].long()
    here = torch.arange(active.numel(), device=q.device)

    entries = ring[row]  # [A, Hkv, W + 1], a copy: written back only where the span takes the token
    if shift:  # position t decides about t - 1
        before = (t - 1) % (window + 1)
        flagged = (entries[here, :, before] & ~1) | decision[active].int()
        entries[here, :, before] = torch.where((t > 0)[:, None], flagged, entries[here, :, before])
    leaving = entries[here, :, t % (window + 1)]
    reuse = (t > window)[:, None] & (leaving & 1 == 1)
    slot = torch.where(reuse, leaving >> 1, live_len[row])

    opens = ~reuse & (slot % page_size == 0)
    fits = slot // page_size < page_table.shape[-1]
    pops = opens & fits
    rank = pops.flatten().cumsum(0).view_as(pops)  # the how-manyth pop this one is
    granted = pops & (rank <= num_free)
    stored = ~opens | granted
    popped = free_pages[(num_free - rank).clamp_min(0)]
    table_index = (slot // page_size).clamp_max(page_table.shape[-1] - 1).long().unsqueeze(-1)
    page = torch.where(granted, popped, page_table[row].gather(-1, table_index).squeeze(-1))
    num_free -= granted.sum().to(torch.int32)
    starved[row] |= (~stored).any(-1).to(torch.int32)

    entries[here, :, t % (window + 1)] = (slot << 1) | (0 if shift else decision[active].int())
    at, head = stored.nonzero(as_tuple=True)
    span = (row[at], head)
    slot, page = slot[at, head].long(), page[at, head].long()
    page_table[(*span, slot // page_size)] = page.int()
    live_len[span] += (~reuse[at, head]).to(torch.int32)
    ring[span] = entries[at, head]
    store_slots(k_rot[active[at], head], k_pages, k_scales, page, slot % page_size)
    store_slots(v[active[at], head].float(), v_pages, v_scales, page, slot % page_size)
    return q_rot.to(q.dtype)
