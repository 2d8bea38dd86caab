"""Triton backend of decode_attention: equal pieces of work for every program, cut on the device from ``live_len``.

Programs and spans are both in order, so each pair (program p, span s) that meets owns partial ``p + s``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.triton_common import LOG2_E, dependent_launch, dot_dtype

_LOWEST = tl.constexpr(-1.0e30)


class Tiles(NamedTuple):
    """How the work is cut: tokens of a tile, warps and pipeline stages of a program, programs per multiprocessor."""

    tokens: int
    warps: int
    stages: int
    programs: int


def tiles(head_dim: int, element_bytes: int) -> Tiles:
    """The cut that measured best for pages of this size (``docs/lab-notes.md``)."""
    if element_bytes == 4:
        return Tiles(tokens=32, warps=4, stages=2, programs=2)
    if head_dim * element_bytes <= 128:
        return Tiles(tokens=32, warps=1, stages=5, programs=8)
    return Tiles(tokens=64 if head_dim * element_bytes <= 256 else 32, warps=4, stages=3, programs=2)


@triton.jit
def _span_tiles(
    positions_ptr,
    rows_ptr,
    live_len_ptr,
    num_spans,
    S: tl.constexpr,
    HKV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Tiles of BLOCK_N tokens in each span of the batch, ``[S]``; none for padded entries.

    WAIT: for the kernels before this one, as soon as what they may have written is to be read. Who doesn't wait reads
    the lengths past the cache of its multiprocessor, in which old ones may lie.
    """
    o_s = tl.arange(0, S)
    m_s = o_s < num_spans
    position = tl.load(positions_ptr + o_s // HKV, mask=m_s, other=-1)
    row = tl.maximum(tl.load(rows_ptr + o_s // HKV, mask=m_s, other=0), 0)  # on its way together with the position
    if WAIT:
        gdc_wait()
    p_live = live_len_ptr + row * HKV + o_s % HKV
    live = tl.load(p_live, mask=m_s & (position >= 0), other=0, cache_modifier="" if WAIT else ".cg")
    return tl.cdiv(live, BLOCK_N)


@triton.jit
def _slots(table_ptr, first, live, o_n, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tokens ``first + o_n`` of a span lie in the pool, ``[BLOCK_N]`` int64; 0 for those past ``live``."""
    if BLOCK_N % PAGE == 0 and BLOCK_N // PAGE <= 8:  # unrolled
        slots = (o_n % PAGE).to(tl.int64)
        for i in tl.static_range(BLOCK_N // PAGE):
            page = tl.load(table_ptr + first // PAGE + i, mask=first + i * PAGE < live, other=0).to(tl.int64)
            slots += tl.where(o_n // PAGE == i, page * PAGE, 0)
        return slots
    else:
        token = first + o_n
        page = tl.load(table_ptr + token // PAGE, mask=token < live, other=0).to(tl.int64)
        return page * PAGE + token % PAGE


@triton.jit
def _load_tokens(pages_ptr, slots, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]`` of a page pool; zero past the last token and past D."""
    o_d = tl.arange(0, BLOCK_D)
    at = pages_ptr + slots[:, None] * D + o_d[None, :]
    if MASKED and D != BLOCK_D:
        return tl.load(at, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=m_n[:, None], other=0.0)
    elif D != BLOCK_D:
        return tl.load(at, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _load_scale_pairs(pairs_ptr, begin, m_n, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Scales of the tokens in the slots from ``begin`` on, ``[BLOCK_N]`` fp32, zero past the last; two in each int32,
    since the compiler pipelines no load of less than four bytes."""
    pairs = tl.load(pairs_ptr + begin // 2 + tl.arange(0, BLOCK_N // 2))
    lower, upper = pairs << 16, pairs & -65536  # a bf16 is the upper half of the fp32 of its value
    scales = tl.join(lower, upper).reshape([BLOCK_N]).to(tl.float32, bitcast=True)
    if MASKED:
        scales = tl.where(m_n, scales, 0.0)
    return scales


@triton.jit
def _tile_step(
    b_q,
    b_max,
    b_sum,
    b_acc,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    first,
    live,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of the online softmax, its sum still spread over the tile; MASKED where the span ends inside it."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = first + o_n < live
    if PAGE % BLOCK_N == 0:
        begin = tl.load(table_ptr + first // PAGE).to(tl.int64) * PAGE + first % PAGE
        slots = begin + o_n
    else:
        slots = _slots(table_ptr, first, live, o_n, PAGE, BLOCK_N)
    b_k = _load_tokens(k_pages_ptr, slots, m_n, D, BLOCK_D, MASKED)
    b_v = _load_tokens(v_pages_ptr, slots, m_n, D, BLOCK_D, MASKED)
    b_x = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision="ieee")  # [BLOCK_G, BLOCK_N]
    if HAS_SCALES:
        if PAGE % BLOCK_N == 0:
            b_k_scales = _load_scale_pairs(k_scales_ptr, begin, m_n, BLOCK_N, MASKED)
            b_v_scales = _load_scale_pairs(v_scales_ptr, begin, m_n, BLOCK_N, MASKED)
        else:
            b_k_scales = tl.load(k_scales_ptr + slots, mask=m_n, other=0.0).to(tl.float32)
            b_v_scales = tl.load(v_scales_ptr + slots, mask=m_n, other=0.0).to(tl.float32)
        b_x *= (b_k_scales * scale_log2)[None, :]
    else:
        b_x *= scale_log2
    if MASKED:
        b_x = tl.where(m_n[None, :], b_x, _LOWEST)
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_old = tl.exp2(b_max - b_new)
    b_w = tl.exp2(b_x - b_new[:, None])
    if MASKED:
        b_w = tl.where(m_n[None, :], b_w, 0.0)
    b_sum = b_sum * b_old[:, None] + b_w
    b_acc *= b_old[:, None]
    if HAS_SCALES:  # the tile's largest scale stays outside the product, where fp16 could not hold it
        b_scale = tl.max(b_v_scales, 0)
        b_w *= (b_v_scales * (1.0 / b_scale))[None, :]
        b_acc += tl.dot(b_w.to(b_q.dtype), b_v.to(b_q.dtype), input_precision="ieee") * b_scale
    else:
        b_acc = tl.dot(b_w.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision="ieee")
    return b_new, b_sum, b_acc


@triton.jit
def _decode_attention_kernel(
    q_ptr,
    positions_ptr,
    rows_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    page_table_ptr,
    live_len_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    stride_q_token,
    stride_q_head,
    num_spans,
    max_pages,
    scale_log2,
    S: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """acc[p + s] = sum_n exp2(x_n - max) v_n over span s's tiles that fall to program p; x = scale q k^T log2(e)."""
    i_p = tl.program_id(0)
    span_tiles = _span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N, DEPENDENT)
    if DEPENDENT:  # not before: the merge, which may come up from now on, reads the lengths without waiting
        gdc_launch_dependents()
    cumulative = tl.cumsum(span_tiles, 0)
    total = tl.sum(span_tiles, 0).to(tl.int64)
    programs = tl.minimum(total, PROGRAMS)  # none without work: its partial would never be written
    tile = tl.where(i_p < programs, (i_p * total) // tl.maximum(programs, 1), total).to(tl.int32)
    end = tl.where(i_p < programs, ((i_p + 1) * total) // tl.maximum(programs, 1), total).to(tl.int32)
    o_s = tl.arange(0, S)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_head = (o_g[:, None] < G) & (o_d[None, :] < D)
    while tile < end:
        span = tl.sum((cumulative <= tile).to(tl.int32), 0)
        span_end = tl.sum(tl.where(o_s == span, cumulative, 0), 0)
        span_begin = span_end - tl.sum(tl.where(o_s == span, span_tiles, 0), 0)
        stop = tl.minimum(span_end, end)
        i_b = span // HKV
        i_h = span % HKV
        stored_span = tl.maximum(tl.load(rows_ptr + i_b), 0).to(tl.int64) * HKV + i_h
        live = tl.load(live_len_ptr + stored_span)
        table = page_table_ptr + stored_span * max_pages
        head = (i_h * G + o_g[:, None]).to(tl.int64)
        p_q = q_ptr + i_b.to(tl.int64) * stride_q_token + head * stride_q_head + o_d[None, :]
        b_q = tl.load(p_q, mask=m_head, other=0.0).to(tl.float32)  # [BLOCK_G, BLOCK_D]
        scale = scale_log2
        if HAS_SCALES:  # fp8 becomes fp16, which can't hold every bf16 query
            largest = tl.max(tl.max(tl.abs(b_q), 1), 0)
            exponent = tl.ceil(tl.log2(tl.where(largest > 0.0, largest, 1.0)))
            power = tl.exp2(tl.clamp(exponent, -126.0, 126.0))  # neither it nor its inverse leaves fp32
            b_q /= power
            scale *= power
        b_q = b_q.to(DOT)
        b_max = tl.full([BLOCK_G], _LOWEST, tl.float32)
        b_sum = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
        b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        begin = (tile - span_begin) * BLOCK_N
        last = (stop - span_begin) * BLOCK_N
        whole = tl.minimum(last, live // BLOCK_N * BLOCK_N)
        for first in range(begin, whole, BLOCK_N):
            b_max, b_sum, b_acc = _tile_step(
                b_q, b_max, b_sum, b_acc, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, table, first, live,
                scale, D, BLOCK_D, PAGE, BLOCK_N, HAS_SCALES, False,
            )  # fmt: skip
        if whole < last:
            b_max, b_sum, b_acc = _tile_step(
                b_q, b_max, b_sum, b_acc, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, table, whole, live,
                scale, D, BLOCK_D, PAGE, BLOCK_N, HAS_SCALES, True,
            )  # fmt: skip
        partial = (i_p + span).to(tl.int64) * G + o_g
        tl.store(max_ptr + partial, b_max, mask=o_g < G)
        tl.store(sum_ptr + partial, tl.sum(b_sum, 1), mask=o_g < G)
        tl.store(acc_ptr + partial[:, None] * D + o_d[None, :], b_acc, mask=m_head)
        tile = stop


@triton.jit
def _merge_kernel(
    positions_ptr,
    rows_ptr,
    live_len_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,
    num_spans,
    S: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PIECES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[s, g] = sum_p exp2(max_p - max) acc_p / sum_p exp2(max_p - max) sum_p over the programs that met span s."""
    if DEPENDENT:
        gdc_launch_dependents()
    span = tl.program_id(0)
    i_g = tl.program_id(1)
    span_tiles = _span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N, False)
    o_s = tl.arange(0, S)
    total = tl.sum(span_tiles, 0).to(tl.int64)
    programs = tl.minimum(total, PROGRAMS)
    own = tl.sum(tl.where(o_s == span, span_tiles, 0), 0)
    begin = tl.sum(tl.where(o_s < span, span_tiles, 0), 0)
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, PIECES)
    m_d = o_d < D
    b_max = _LOWEST
    b_sum = 0.0
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    if DEPENDENT:
        gdc_wait()
    if own > 0:
        # Tile x belongs to the last program p with p * total // programs <= x.
        first = (((begin + 1) * programs - 1) // total).to(tl.int32)
        last = (((begin + own) * programs - 1) // total).to(tl.int32)
        for i_p in range(first, last + 1, PIECES):
            m_p = i_p + o_p <= last
            partial = (i_p + o_p + span).to(tl.int64) * G + i_g
            b_m = tl.load(max_ptr + partial, mask=m_p, other=_LOWEST)
            b_s = tl.load(sum_ptr + partial, mask=m_p, other=0.0)
            b_a = tl.load(acc_ptr + partial[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)
            b_new = tl.maximum(b_max, tl.max(b_m, 0))
            b_old = tl.exp2(b_max - b_new)
            b_w = tl.where(m_p, tl.exp2(b_m - b_new), 0.0)
            b_sum = b_sum * b_old + tl.sum(b_w * b_s, 0)
            b_acc = b_acc * b_old + tl.sum(b_w[:, None] * b_a, 0)
            b_max = b_new
    b_out = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)
    tl.store(out_ptr + (span.to(tl.int64) * G + i_g) * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


def decode_attention(
    q: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads, page_size = live_len.shape[1], k_pages.shape[1]
    out = q.new_empty(q.shape)
    if batch == 0:
        return out
    spans, group = batch * num_kv_heads, num_heads // num_kv_heads
    dot = dot_dtype(q.dtype, k_pages.dtype)
    if k_scales.numel() > 0 and dot != tl.float32:
        dot = tl.float16  # holds every fp8 value, and the hardware converts to it
    block_n, warps, stages, per_processor = tiles(head_dim, k_pages.element_size() if dot != tl.float32 else 4)
    if page_size % block_n == 0:
        k_scales, v_scales = _pairs(k_scales), _pairs(v_scales)
    programs = min(
        per_processor * _num_processors(q.device), spans * triton.cdiv(page_table.shape[-1] * page_size, block_n)
    )
    partials = q.new_empty((programs + spans) * group * (head_dim + 2), dtype=torch.float32)
    acc, maxima, sums = partials.split([(programs + spans) * group * n for n in (head_dim, 1, 1)])
    blocks = {
        "S": triton.next_power_of_2(spans), "HKV": num_kv_heads, "G": group, "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_N": block_n, "PROGRAMS": programs,
    }  # fmt: skip
    _decode_attention_kernel[(programs,)](
        q, positions, rows, k_pages, v_pages, k_scales, v_scales, page_table, live_len, maxima, sums, acc,
        *q.stride()[:2], spans, page_table.shape[-1], sm_scale * LOG2_E,
        BLOCK_G=max(16, triton.next_power_of_2(group)), PAGE=page_size, HAS_SCALES=k_scales.numel() > 0, DOT=dot,
        num_warps=warps, num_stages=stages, **blocks, **dependent_launch(q.device),
    )  # fmt: skip
    _merge_kernel[(spans, group)](
        positions, rows, live_len, maxima, sums, acc, out, spans, PIECES=16, num_warps=1, **blocks,
        **dependent_launch(q.device),
    )  # fmt: skip
    return out


def _pairs(scales: torch.Tensor) -> torch.Tensor:
    if scales.storage_offset() % 2:
        raise ValueError("scales are read in pairs, so they must not begin at an odd element of their storage")
    return scales.view(torch.int32)


def _num_processors(device: torch.device) -> int:
    """Multiprocessors; the interpreter gets few, so that pieces still cut through spans."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
