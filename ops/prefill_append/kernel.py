"""Triton backend of prefill_append: one program per span plans the slots, then one per tile of tokens fills them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import element_strides, load_halves, pop_pages, store_token


@triton.jit
def _plan_kernel(
    decisions_ptr,
    positions_ptr,
    rows_ptr,
    chunk_indptr_ptr,
    page_table_ptr,
    live_len_ptr,
    ring_ptr,
    free_pages_ptr,
    num_free_ptr,
    starved_ptr,
    freed_ptr,
    target_ptr,
    max_pages,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[t] = page * PAGE + slot of each survivor (others keep -1), and all integer state of the span.

    Survivor r takes freed[r] while there are freed slots, then slot live + r - num_freed.
    """
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    o_t = tl.arange(0, BLOCK)
    begin = tl.load(chunk_indptr_ptr + i_b)
    end = tl.load(chunk_indptr_ptr + i_b + 1)
    row = tl.maximum(tl.load(rows_ptr + i_b), 0).to(tl.int64)  # both sides of the next line are evaluated
    if begin < end and tl.load(starved_ptr + row) == 0:
        span = row * HKV + i_h
        ring = ring_ptr + span * (WINDOW + 1)
        freed = freed_ptr + (i_b * HKV + i_h).to(tl.int64) * (WINDOW + 1)
        table = page_table_ptr + span * max_pages
        live = tl.load(live_len_ptr + span)
        start = tl.load(positions_ptr + begin)
        leaves_before = start + (end - begin) - 1 - WINDOW
        completed = tl.load(decisions_ptr + begin.to(tl.int64) * HKV + i_h).to(tl.int32)

        num_freed = live * 0
        oldest = tl.maximum(start - WINDOW - 1, 0)
        for first in range(oldest, start, BLOCK):
            old = first + o_t
            m_old = old < start
            entry = tl.load(ring + old % (WINDOW + 1), mask=m_old, other=0)
            flagged = entry & 1
            if SHIFT == 1:
                flagged = tl.where(old == start - 1, completed, flagged)
            leaves = (m_old & (flagged == 1) & (old < leaves_before)).to(tl.int32)
            rank = num_freed + tl.cumsum(leaves, 0) - leaves
            tl.store(freed + rank, entry >> 1, mask=leaves == 1)
            num_freed += tl.sum(leaves, 0)

        num_survivors = live * 0
        for first in range(begin, end, BLOCK):
            token = first + o_t
            m_flag = (token + SHIFT) < end
            flagged = tl.load(decisions_ptr + (token + SHIFT).to(tl.int64) * HKV + i_h, mask=m_flag, other=0)
            dropped = (flagged != 0) & (start + token - begin < leaves_before)
            num_survivors += tl.sum(((token < end) & (dropped == 0)).to(tl.int32), 0)

        grown = live + num_survivors - num_freed
        held = tl.cdiv(live, PAGE)
        needed = tl.cdiv(grown, PAGE)
        index = -1
        if needed <= max_pages:
            index = pop_pages(num_free_ptr, needed - held)
        if index < 0:
            tl.store(starved_ptr + row, 1)
        else:
            for first in range(0, needed - held, BLOCK):
                m_page = first + o_t < needed - held
                popped = tl.load(free_pages_ptr + index + first + o_t, mask=m_page)
                tl.store(table + held + first + o_t, popped, mask=m_page)
            tl.store(live_len_ptr + span, grown)
            if SHIFT == 1:  # noqa: SIM102 (static, unlike the inner condition)
                if start > 0:
                    before = ring + (start - 1) % (WINDOW + 1)
                    tl.store(before, (tl.load(before) & ~1) | completed)
            tl.debug_barrier()  # freed and table are written and read by different threads of the program
            num_survivors = live * 0
            for first in range(begin, end, BLOCK):
                token = first + o_t
                m_flag = (token + SHIFT) < end
                flagged = tl.load(decisions_ptr + (token + SHIFT).to(tl.int64) * HKV + i_h, mask=m_flag, other=0)
                flagged = (flagged != 0).to(tl.int32)
                position = start + token - begin
                stays = ((token < end) & ((flagged == 0) | (position >= leaves_before))).to(tl.int32)
                rank = num_survivors + tl.cumsum(stays, 0) - stays
                num_survivors += tl.sum(stays, 0)
                reused = tl.load(freed + rank, mask=(stays == 1) & (rank < num_freed), other=0)
                slot = tl.where(rank < num_freed, reused, live + rank - num_freed)
                page = tl.load(table + slot // PAGE, mask=stays == 1, other=0).to(tl.int64)
                target = target_ptr + token.to(tl.int64) * HKV + i_h
                tl.store(target, page * PAGE + slot % PAGE, mask=stays == 1)
                m_ring = (token < end) & (position >= leaves_before)
                tl.store(ring + position % (WINDOW + 1), (slot << 1) | flagged, mask=m_ring)


@triton.jit
def _fill_kernel(
    k_ptr,
    v_ptr,
    target_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """pages[target[t]] = quantise(k[t]), quantise(v[t]) for each token with a target."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    o_half = tl.arange(0, BLOCK_HALF)
    m_half = o_half < HALF
    target = tl.load(target_ptr + i_t * HKV + i_h)
    if target >= 0:
        first, second = load_halves(
            k_ptr + i_t * stride_k_token + i_h * stride_k_head, k_ptr, 0.0, o_half, m_half, HALF, False
        )
        store_token(first, second, k_pages_ptr, k_scales_ptr, target, o_half, m_half, HALF, HAS_SCALES)
        first, second = load_halves(
            v_ptr + i_t * stride_v_token + i_h * stride_v_head, v_ptr, 0.0, o_half, m_half, HALF, False
        )
        store_token(first, second, v_pages_ptr, v_scales_ptr, target, o_half, m_half, HALF, HAS_SCALES)


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
    tokens, num_kv_heads, head_dim = k.shape
    num_chunks, window = rows.shape[0], ring.shape[-1] - 1
    if tokens == 0 or num_chunks == 0:
        return
    freed = torch.empty((num_chunks, num_kv_heads, window + 1), dtype=torch.int32, device=k.device)
    target = torch.full((tokens, num_kv_heads), -1, dtype=torch.int64, device=k.device)
    # One warp: other programs change num_free and starved[row], which the warps of a program could read differently.
    _plan_kernel[(num_chunks, num_kv_heads)](
        decisions.contiguous().view(torch.int8), positions, rows, chunk_indptr, page_table, live_len, ring,
        free_pages, num_free, starved, freed, target, page_table.shape[-1],
        HKV=num_kv_heads, PAGE=k_pages.shape[1], WINDOW=window, SHIFT=shift,
        BLOCK=min(1024, max(16, triton.next_power_of_2(tokens))), num_warps=1,
    )  # fmt: skip
    _fill_kernel[(tokens, num_kv_heads)](
        k, v, target, k_pages, v_pages, k_scales, v_scales, *element_strides(k, v),
        HKV=num_kv_heads, HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        HAS_SCALES=k_scales.numel() > 0, num_warps=1,
    )  # fmt: skip
