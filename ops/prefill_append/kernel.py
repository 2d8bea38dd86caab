"""Triton backend of prefill_append: one program per span plans, then one per few survivors of a tile stores them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import divide_by_scale, element_strides, find_chunk, pop_pages, token_scale

_HEADER = 4  # integers of a span's plan before its freed slots: stored, live, num_freed, first_freed
_PLAN_HEADER = tl.constexpr(_HEADER)


@triton.jit(do_not_specialize=["most_pages"])
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
    plan_ptr,
    tile_ptr,
    max_pages,
    most_pages,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RING: tl.constexpr,
):
    """tile = (survivors in it, survivors before it) for every TILE tokens; live_len = live + survivors - num_freed.

    freed = slots of the flagged tokens that leave, in the order of the ring's entries; ``first_freed`` is the oldest's
    place among them. All integer state of the span but the ring entries of the chunk's tokens.
    """
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    begin = tl.load(chunk_indptr_ptr + i_b)
    end = tl.load(chunk_indptr_ptr + i_b + 1)
    row = tl.load(rows_ptr + i_b)
    # Other programs change num_free and starved, so that plain loads could differ between warps: atomics don't.
    free = tl.atomic_add(num_free_ptr, 0, sem="relaxed")
    if (begin < end) & (row >= 0):
        span = row.to(tl.int64) * HKV + i_h
        ring = ring_ptr + span * (WINDOW + 1)
        plan = plan_ptr + (i_b * HKV + i_h).to(tl.int64) * (_PLAN_HEADER + WINDOW + 1)
        table = page_table_ptr + span * max_pages
        # All loads that wait for nothing else, and in the loops below the next block's before this one is used.
        o_i = tl.arange(0, BLOCK // TILE)
        # [TILE / 32, BLOCK / TILE, 32]: a warp reads neighbours, and counts a tile by itself.
        o_t = tl.arange(0, TILE // 32)[:, None, None] * 32 + o_i[None, :, None] * TILE + tl.arange(0, 32)[None, None, :]
        o_w = tl.arange(0, BLOCK_RING)
        decisions = decisions_ptr + begin.to(tl.int64) * HKV + i_h
        b_flags = tl.load(decisions + (o_t + SHIFT) * HKV, mask=o_t + SHIFT < end - begin, other=0)
        b_entries = tl.load(ring + o_w, mask=o_w <= WINDOW, other=0)
        start = tl.load(positions_ptr + begin)
        live = tl.load(live_len_ptr + span)
        completed = tl.load(decisions).to(tl.int32)
        starved = tl.atomic_add(starved_ptr + row, 0, sem="relaxed")

        num_freed = live * 0
        first_freed = live * 0
        oldest = start % (WINDOW + 1)  # entry of token start - W - 1
        for first in range(0, WINDOW + 1, BLOCK_RING):
            index = first + o_w
            b_next = b_entries
            if first + BLOCK_RING <= WINDOW:
                b_next = tl.load(ring + index + BLOCK_RING, mask=index + BLOCK_RING <= WINDOW, other=0)
            age = (start + WINDOW - index) % (WINDOW + 1)  # the entry is of token start - 1 - age
            flagged = b_entries & 1
            if SHIFT == 1:
                flagged = tl.where(age == 0, completed, flagged)
            leaves = (index <= WINDOW) & (age < start) & (age > WINDOW - (end - begin)) & (flagged == 1)
            leaves = leaves.to(tl.int32)
            rank = num_freed + tl.cumsum(leaves, 0) - leaves
            tl.store(plan + _PLAN_HEADER + rank, b_entries >> 1, mask=leaves == 1)
            num_freed += tl.sum(leaves, 0)
            first_freed += tl.sum(tl.where(index < oldest, leaves, 0), 0)
            b_entries = b_next

        survivors = live * 0
        tiles = tile_ptr + ((begin // TILE + i_b) * HKV + i_h).to(tl.int64) * 2
        for first in range(0, end - begin, BLOCK):
            b_next = b_flags
            if first + BLOCK < end - begin:
                decisions += BLOCK * HKV
                m_next = first + BLOCK + o_t + SHIFT < end - begin
                b_next = tl.load(decisions + (o_t + SHIFT) * HKV, mask=m_next, other=0)
            token = first + o_t
            stays = (token < end - begin) & ((b_flags == 0) | (token >= end - begin - 1 - WINDOW))
            count = tl.sum(tl.sum(stays.to(tl.int32), 0), 1)
            before = survivors + tl.cumsum(count, 0) - count
            m_i = first + o_i * TILE < end - begin
            tl.store(tiles + (first // TILE + o_i) * (2 * HKV), count, mask=m_i)
            tl.store(tiles + (first // TILE + o_i) * (2 * HKV) + 1, before, mask=m_i)
            survivors += tl.sum(count, 0)
            b_flags = b_next

        grown = live + survivors - num_freed
        held = tl.cdiv(live, PAGE)
        needed = tl.cdiv(grown, PAGE)
        popped = -1
        if (starved == 0) & (needed <= max_pages):
            popped = pop_pages(num_free_ptr, free, needed - held, most_pages)
        tl.store(plan, (popped >= 0).to(tl.int32))
        if popped < 0:
            tl.store(starved_ptr + row, 1)
        else:
            for first in range(0, needed - held, BLOCK_RING):
                o_p = first + o_w
                pages = tl.load(free_pages_ptr + popped + o_p, mask=o_p < needed - held)
                tl.store(table + held + o_p, pages, mask=o_p < needed - held)
            tl.store(live_len_ptr + span, grown)
            tl.store(plan + 1, live)
            tl.store(plan + 2, num_freed)
            tl.store(plan + 3, first_freed)
            if SHIFT == 1:  # noqa: SIM102 (static, unlike the inner condition)
                if start > 0:
                    before = ring + (start - 1) % (WINDOW + 1)
                    tl.store(before, (tl.load(before) & ~1) | completed)


@triton.jit(do_not_specialize=["num_chunks"])
def _fill_kernel(
    k_ptr,
    v_ptr,
    decisions_ptr,
    positions_ptr,
    rows_ptr,
    chunk_indptr_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    page_table_ptr,
    ring_ptr,
    plan_ptr,
    tile_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    num_chunks,
    max_pages,
    B: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Survivor r: slot = r < num_freed ? freed[r] : live + r - num_freed; pages[slot] = quantise(k), quantise(v)."""
    i_h = tl.program_id(0) % HKV
    i_m = tl.program_id(0) // HKV % (TILE // BLOCK_M)
    i_b, i_t, begin, end = find_chunk(
        tl.program_id(0) // (HKV * (TILE // BLOCK_M)), chunk_indptr_ptr, num_chunks, B, TILE
    )
    if i_b < num_chunks:
        o_t = i_t * TILE + tl.arange(0, TILE)
        decisions = decisions_ptr + begin.to(tl.int64) * HKV + i_h
        b_flags = tl.load(decisions + (o_t + SHIFT).to(tl.int64) * HKV, mask=o_t + SHIFT < end - begin, other=0)
        plan = plan_ptr + (i_b * HKV + i_h).to(tl.int64) * (_PLAN_HEADER + WINDOW + 1)
        tile = tile_ptr + ((begin // TILE + i_b + i_t) * HKV + i_h).to(tl.int64) * 2
        stored = tl.load(plan)
        live = tl.load(plan + 1)
        num_freed = tl.load(plan + 2)
        first_freed = tl.load(plan + 3)
        count = tl.load(tile)
        before = tl.load(tile + 1)
        start = tl.load(positions_ptr + begin)
        row = tl.load(rows_ptr + i_b)
        if (row >= 0) & (stored == 1) & (i_m * BLOCK_M < count):
            o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
            m_m = o_m < count
            stays = (o_t < end - begin) & ((b_flags == 0) | (o_t >= end - begin - 1 - WINDOW))
            b_counted = tl.cumsum(stays.to(tl.int32), 0)
            offset = i_t * TILE + tl.sum((b_counted[:, None] <= o_m[None, :]).to(tl.int32), 0)  # [BLOCK_M]

            o_d = tl.arange(0, BLOCK_D)
            m_x = m_m[:, None] & (o_d < D)[None, :]
            token = (begin + offset).to(tl.int64)[:, None]
            head = i_h.to(tl.int64)
            b_k = tl.load(k_ptr + head * stride_k_head + token * stride_k_token + o_d[None, :], mask=m_x, other=0.0)
            b_v = tl.load(v_ptr + head * stride_v_head + token * stride_v_token + o_d[None, :], mask=m_x, other=0.0)
            m_ring = m_m & (offset >= end - begin - 1 - WINDOW)
            m_flag = m_ring & (offset + SHIFT < end - begin)
            flagged = tl.load(decisions + (offset + SHIFT).to(tl.int64) * HKV, mask=m_flag, other=0) != 0

            span = row.to(tl.int64) * HKV + i_h
            rank = before + o_m
            place = first_freed + rank
            place = tl.where(place < num_freed, place, place - num_freed)
            reused = tl.load(plan + _PLAN_HEADER + place, mask=m_m & (rank < num_freed), other=0)
            slot = tl.where(rank < num_freed, reused, live + rank - num_freed)
            page = tl.load(page_table_ptr + span * max_pages + slot // PAGE, mask=m_m, other=0)
            target = page.to(tl.int64) * PAGE + slot % PAGE
            p_entry = ring_ptr + span * (WINDOW + 1) + (start + offset) % (WINDOW + 1)
            tl.store(p_entry, (slot << 1) | flagged.to(tl.int32), mask=m_ring)

            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
            if HAS_SCALES:
                k_scale = token_scale(tl.max(tl.abs(b_k), 1))
                v_scale = token_scale(tl.max(tl.abs(b_v), 1))
                tl.store(k_scales_ptr + target, k_scale, mask=m_m)
                tl.store(v_scales_ptr + target, v_scale, mask=m_m)
                b_k = divide_by_scale(b_k, k_scale[:, None])
                b_v = divide_by_scale(b_v, v_scale[:, None])
            o_x = target[:, None] * D + o_d[None, :]
            tl.store(k_pages_ptr + o_x, b_k.to(k_pages_ptr.dtype.element_ty), mask=m_x)
            tl.store(v_pages_ptr + o_x, b_v.to(v_pages_ptr.dtype.element_ty), mask=m_x)


def _tiles(tokens: int, num_chunks: int, head_dim: int) -> tuple[int, int, int, int, int]:
    """Tokens of a tile, tokens and warps of a plan's turn, survivors and warps of a fill program.

    Few programs plan, so each is wide: it takes a chunk of up to four times the average length in one turn. A turn of
    128 serves all shorter chunks, so that one kernel is compiled for them.
    """
    average = triton.cdiv(tokens, num_chunks)
    tile = min(256, max(32, triton.next_power_of_2(average)))
    turn = max(128, tile, min(8192, triton.next_power_of_2(tokens), triton.next_power_of_2(4 * average)))
    return tile, turn, max(1, turn // 512), 32 if head_dim <= 128 else 16, 4


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
    num_chunks, window, page_size, max_pages = rows.shape[0], ring.shape[-1] - 1, k_pages.shape[1], page_table.shape[-1]
    if tokens == 0 or num_chunks == 0:
        return
    tile, turn, plan_warps, fill_block, fill_warps = _tiles(tokens, num_chunks, head_dim)
    tiles = tokens // tile + num_chunks  # at least as many as all chunks have; a chunk's first is begin // tile + i_b
    plan = torch.empty((num_chunks, num_kv_heads, _HEADER + window + 1), dtype=torch.int32, device=k.device)
    in_tile = torch.empty((tiles, num_kv_heads, 2), dtype=torch.int32, device=k.device)
    decisions = decisions.contiguous().view(torch.int8)
    shared = {"HKV": num_kv_heads, "PAGE": page_size, "WINDOW": window, "SHIFT": shift, "TILE": tile}
    _plan_kernel[(num_chunks, num_kv_heads)](
        decisions, positions, rows, chunk_indptr, page_table, live_len, ring, free_pages, num_free, starved, plan,
        in_tile, max_pages, (tokens // page_size + num_chunks) * num_kv_heads,
        **shared, BLOCK=turn, BLOCK_RING=min(1024, max(32, triton.next_power_of_2(window + 1))),
        num_warps=plan_warps,
    )  # fmt: skip
    _fill_kernel[(tiles * (tile // fill_block) * num_kv_heads,)](
        k, v, decisions, positions, rows, chunk_indptr, k_pages, v_pages, k_scales, v_scales, page_table, ring, plan,
        in_tile, *element_strides(k, v), num_chunks, max_pages,
        **shared, B=triton.next_power_of_2(num_chunks), D=head_dim, HAS_SCALES=k_scales.numel() > 0,
        BLOCK_M=fill_block, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=fill_warps,
    )  # fmt: skip
