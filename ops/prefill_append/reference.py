"""The definition of prefill_append in plain PyTorch, row by row and head by head."""

from __future__ import annotations

import torch

from fastdms.ops.chunk import token_flags, window_flags
from fastdms.ops.quantise import store_slots


def prefill_append(
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
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    starved: torch.Tensor,
    shift: int,
) -> None:
    page_size, window = k_pages.shape[1], ring.shape[-1] - 1
    for b, row in enumerate(rows.tolist()):
        chunk = slice(int(chunk_indptr[b]), int(chunk_indptr[b + 1]))
        if chunk.start == chunk.stop or bool(starved[row]):
            continue
        token = positions[chunk].long()
        leaves_before = int(token[-1]) - window  # tokens below this position have left the window
        flags = token_flags(decisions[chunk], shift)
        for head in range(k.shape[1]):
            live, table = int(live_len[row, head]), page_table[row, head]
            old, old_slots, old_flags = window_flags(ring[row, head], decisions[chunk, head], int(token[0]), shift)
            freed = old_slots[old_flags & (old < leaves_before)]
            survives = ~(flags[:, head] & (token < leaves_before))
            survivors = survives.nonzero().flatten()
            grown = live + survivors.numel() - freed.numel()
            slot = torch.cat((freed, torch.arange(live, grown, device=k.device)))
            held, needed = -(-live // page_size), -(-grown // page_size)
            free = int(num_free)
            if needed - held > free or needed > table.numel():
                starved[row] = 1
                continue
            table[held:needed] = free_pages[free - (needed - held) : free]
            num_free -= needed - held
            live_len[row, head] = grown
            page = table[slot // page_size].long()
            store_slots(k[chunk, head][survivors].float(), k_pages, k_scales, page, slot % page_size)
            store_slots(v[chunk, head][survivors].float(), v_pages, v_scales, page, slot % page_size)
            entry_slot = torch.cat((old_slots, old_slots.new_zeros(token.numel())))
            entry_slot[old.numel() + survivors] = slot
            entry_flag = torch.cat((old_flags, flags[:, head]))
            recent = slice(max(0, entry_slot.numel() - window - 1), None)
            at = torch.cat((old, token))[recent] % (window + 1)
            ring[row, head, at] = ((entry_slot << 1) | entry_flag)[recent].int()
