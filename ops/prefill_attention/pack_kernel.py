"""What a chunk's queries see of each span, as contiguous rows: which slots and tokens those are, and their copy."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.triton_common import find_chunk

FOREVER = tl.constexpr(2**31 - 1)  # later than any query


@triton.jit
def _is_kept(decisions_ptr, o_t, end, i_h, HKV: tl.constexpr, SHIFT: tl.constexpr):
    """1 where a token of the chunk is not flagged. With shift 1 the last one's flag is open: no query could notice."""
    flag = decisions_ptr + (o_t + SHIFT).to(tl.int64) * HKV + i_h
    flagged = tl.load(flag, mask=(o_t + SHIFT) < end, other=0)
    return ((o_t < end) & (flagged == 0)).to(tl.int32)


@triton.jit
def _ring_flags(ring_ptr, old, start, live, completed, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """(slots, 1 where flagged) of tokens ``old`` in the ring; what a starved row's ring says of other slots is void."""
    entry = tl.load(ring_ptr + old % (WINDOW + 1), mask=old < start, other=0)
    slot = entry >> 1
    flagged = entry & 1
    if SHIFT == 1:
        flagged = tl.where(old == start - 1, completed, flagged)
    return slot, ((old < start) & (flagged == 1) & (slot >= 0) & (slot < live)).to(tl.int32)


@triton.jit
def _plan_span(
    decisions_ptr, positions_ptr, rows_ptr, chunk_indptr_ptr, live_len_ptr, ring_ptr, plan_ptr, lists_ptr, num_chunks,
    i_b, i_h, begin, B: tl.constexpr, HKV: tl.constexpr, BLOCK_H: tl.constexpr, WINDOW: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """plan = (base, old, late, holes) of one span, lists = (late slots, their positions, holes, fillers, scratch).

    The late ones are flagged tokens of the ring, whom only the chunk's first queries see. All other slots are visible
    to every query: they become the rows [0, old) of the span's packed part, slot s as row s, and the holes that late
    ones leave among those are filled by the slots from ``old`` on that are not late.
    """
    o_w = tl.arange(0, BLOCK_W)
    o_b = tl.arange(0, B)
    o_h = tl.arange(0, BLOCK_H)
    m_b = o_b < num_chunks
    chunk = tl.load(chunk_indptr_ptr + o_b + 1, mask=m_b, other=0) - tl.load(chunk_indptr_ptr + o_b, mask=m_b, other=0)
    m_span = (chunk > 0)[:, None] & (o_h < HKV)[None, :]
    rows = tl.load(rows_ptr + o_b, mask=chunk > 0, other=0).to(tl.int64)
    size = tl.load(live_len_ptr + rows[:, None] * HKV + o_h[None, :], mask=m_span, other=0) + chunk[:, None]
    before = (o_b < i_b)[:, None] | ((o_b == i_b)[:, None] & (o_h < i_h)[None, :])
    base = tl.sum(tl.sum(tl.where(m_span & before, size, 0), 1), 0)

    span = tl.load(rows_ptr + i_b).to(tl.int64) * HKV + i_h
    start = tl.load(positions_ptr + begin)
    live = tl.load(live_len_ptr + span)
    completed = tl.load(decisions_ptr + begin.to(tl.int64) * HKV + i_h).to(tl.int32)
    ring = ring_ptr + span * (WINDOW + 1)
    oldest = tl.maximum(start - WINDOW - 1, 0)
    num_late = live * 0
    for first in range(oldest, start, BLOCK_W):
        _, flagged = _ring_flags(ring, first + o_w, start, live, completed, WINDOW, SHIFT)
        num_late += tl.sum(flagged, 0)
    num_late = tl.minimum(num_late, live)
    num_old = live - num_late

    late_slot = lists_ptr + (i_b * HKV + i_h).to(tl.int64) * (5 * (WINDOW + 1))
    until = late_slot + (WINDOW + 1)
    hole = until + (WINDOW + 1)
    filler = hole + (WINDOW + 1)
    taken = filler + (WINDOW + 1)  # of the slots from num_old on
    for first in range(0, num_late, BLOCK_W):
        tl.store(taken + first + o_w, 0, mask=first + o_w < num_late)
    tl.debug_barrier()  # between writes and reads of the lists by different threads of the program
    found = live * 0
    num_holes = live * 0
    for first in range(oldest, start, BLOCK_W):
        slot, flagged = _ring_flags(ring, first + o_w, start, live, completed, WINDOW, SHIFT)
        rank = found + tl.cumsum(flagged, 0) - flagged
        found += tl.sum(flagged, 0)
        m_late = (flagged == 1) & (rank < num_late)
        tl.store(late_slot + rank, slot, mask=m_late)
        tl.store(until + rank, first + o_w - start + WINDOW, mask=m_late)
        tl.store(taken + slot - num_old, 1, mask=(flagged == 1) & (slot >= num_old))
        is_hole = flagged * (slot < num_old).to(tl.int32)
        rank = num_holes + tl.cumsum(is_hole, 0) - is_hole
        num_holes += tl.sum(is_hole, 0)
        tl.store(hole + rank, slot, mask=is_hole == 1)
    tl.debug_barrier()
    found = live * 0
    for first in range(0, num_late, BLOCK_W):
        stays = (tl.load(taken + first + o_w, mask=first + o_w < num_late, other=1) == 0).to(tl.int32)
        rank = found + tl.cumsum(stays, 0) - stays
        found += tl.sum(stays, 0)
        tl.store(filler + rank, num_old + first + o_w, mask=stays == 1)
    plan = plan_ptr + (i_b * HKV + i_h) * 4
    tl.store(plan, base)
    tl.store(plan + 1, num_old)
    tl.store(plan + 2, num_late)
    tl.store(plan + 3, num_holes)


@triton.jit(do_not_specialize=["num_chunks"])
def _plan_kernel(
    decisions_ptr,
    positions_ptr,
    rows_ptr,
    chunk_indptr_ptr,
    live_len_ptr,
    ring_ptr,
    counts_ptr,
    plan_ptr,
    lists_ptr,
    num_chunks,
    B: tl.constexpr,
    HKV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """counts[head, tile] = tokens of the tile that are not flagged; a chunk's first tile also plans the span."""
    i_tile = tl.program_id(0)
    i_h = tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i_b, tile, begin, end = find_chunk(i_tile, chunk_indptr_ptr, num_chunks, B, TILE)
    if i_b < num_chunks:
        o_t = begin + tile * TILE + tl.arange(0, TILE)
        kept = tl.sum(_is_kept(decisions_ptr, o_t, end, i_h, HKV, SHIFT), 0)
        tl.store(counts_ptr + i_h.to(tl.int64) * tl.num_programs(0) + i_tile, kept)
        if tile == 0:
            _plan_span(
                decisions_ptr, positions_ptr, rows_ptr, chunk_indptr_ptr, live_len_ptr, ring_ptr, plan_ptr, lists_ptr,
                num_chunks, i_b, i_h, begin, B, HKV, BLOCK_H, WINDOW, SHIFT, BLOCK_W,
            )  # fmt: skip


# Plain numbers that vary from chunk to chunk must not each compile a kernel.
@triton.jit(do_not_specialize=["num_chunks", "tokens", "num_tiles", "parts"])
def _pack_kernel(
    k_ptr,
    v_ptr,
    decisions_ptr,
    rows_ptr,
    chunk_indptr_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    page_table_ptr,
    counts_ptr,
    plan_ptr,
    lists_ptr,
    packed_k_ptr,
    packed_v_ptr,
    kept_before_ptr,
    until_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    num_chunks,
    tokens,
    num_tiles,
    parts,
    max_pages,
    B: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """packed[base + r] = old row r, then the chunk's tokens that are not flagged in order, at the end the late ones.

    The first ``num_tiles`` programs of a head take a tile of tokens each, and write for every token how many before
    it in its chunk are kept; after them, ``parts`` programs share a span's slots.
    """
    i_tile = tl.program_id(0)
    i_h = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    if i_tile < num_tiles:
        i_b, tile, begin, end = find_chunk(i_tile, chunk_indptr_ptr, num_chunks, B, TILE)
        if i_b < num_chunks:
            o_t = begin + tile * TILE + tl.arange(0, TILE)
            kept = _is_kept(decisions_ptr, o_t, end, i_h, HKV, SHIFT)
            rank = tl.cumsum(kept, 0) - kept
            counts = counts_ptr + i_h.to(tl.int64) * num_tiles
            for first in range(i_tile - tile, i_tile, 1024):
                o_c = first + tl.arange(0, 1024)
                rank += tl.sum(tl.load(counts + o_c, mask=o_c < i_tile, other=0), 0)
            at = i_h.to(tl.int64) * tokens + o_t
            tl.store(kept_before_ptr + at, rank, mask=o_t < end)
            tl.store(until_ptr + at, tl.where(kept == 1, FOREVER, o_t - begin + WINDOW), mask=o_t < end)
            plan = plan_ptr + (i_b * HKV + i_h) * 4
            row = (tl.load(plan) + tl.load(plan + 1) + rank).to(tl.int64)
            # A kept token of the chunk's last W is in the window of every block after it.
            m = ((kept == 1) & (o_t + WINDOW < end))[:, None] & m_d
            token = o_t.to(tl.int64)[:, None]
            head = i_h.to(tl.int64)
            b_k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + o_d[None, :], mask=m)
            b_v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + o_d[None, :], mask=m)
            tl.store(packed_k_ptr + row[:, None] * D + o_d[None, :], b_k.to(packed_k_ptr.dtype.element_ty), mask=m)
            tl.store(packed_v_ptr + row[:, None] * D + o_d[None, :], b_v.to(packed_v_ptr.dtype.element_ty), mask=m)
    else:
        i_b = (i_tile - num_tiles) // parts
        chunk = tl.load(chunk_indptr_ptr + i_b + 1) - tl.load(chunk_indptr_ptr + i_b)
        if chunk > 0:
            span = tl.load(rows_ptr + i_b).to(tl.int64) * HKV + i_h
            plan = plan_ptr + (i_b * HKV + i_h) * 4
            base = tl.load(plan)
            num_old = tl.load(plan + 1)
            live = num_old + tl.load(plan + 2)
            num_holes = tl.load(plan + 3)
            late_slot = lists_ptr + (i_b * HKV + i_h).to(tl.int64) * (5 * (WINDOW + 1))
            hole = late_slot + 2 * (WINDOW + 1)
            filler = hole + (WINDOW + 1)
            for first in range((i_tile - num_tiles) % parts * TILE, live, parts * TILE):
                o_s = first + tl.arange(0, TILE)
                is_late = o_s >= num_old
                m_s = o_s < live
                slot = tl.load(late_slot + o_s - num_old, mask=is_late & m_s, other=0)
                slot = tl.where(is_late, slot, o_s)
                for first_hole in range(0, tl.where(first < num_old, num_holes, 0), BLOCK_W):
                    o_w = first_hole + tl.arange(0, BLOCK_W)
                    m_w = o_w < num_holes
                    b_hole = tl.load(hole + o_w, mask=m_w, other=-1)
                    b_filler = tl.load(filler + o_w, mask=m_w, other=0)
                    found = o_s[:, None] == b_hole[None, :]
                    fills = tl.max(tl.where(found, b_filler[None, :], -1), 1)
                    slot = tl.where(fills >= 0, fills, slot)
                page = tl.load(page_table_ptr + span * max_pages + slot // PAGE, mask=m_s, other=0).to(tl.int64)
                at = page * PAGE + slot % PAGE
                m = m_s[:, None] & m_d
                b_k = tl.load(k_pages_ptr + at[:, None] * D + o_d[None, :], mask=m).to(tl.float32)
                b_v = tl.load(v_pages_ptr + at[:, None] * D + o_d[None, :], mask=m).to(tl.float32)
                if HAS_SCALES:
                    b_k *= tl.load(k_scales_ptr + at, mask=m_s).to(tl.float32)[:, None]
                    b_v *= tl.load(v_scales_ptr + at, mask=m_s).to(tl.float32)[:, None]
                row = (base + o_s + tl.where(is_late, chunk, 0)).to(tl.int64)
                tl.store(packed_k_ptr + row[:, None] * D + o_d[None, :], b_k.to(packed_k_ptr.dtype.element_ty), mask=m)
                tl.store(packed_v_ptr + row[:, None] * D + o_d[None, :], b_v.to(packed_v_ptr.dtype.element_ty), mask=m)
