"""Triton backend of decode_attention: equal pieces of work for every program, cut on the device from ``live_len``.

Programs and spans are both in order, so each pair (program p, span s) that meets owns partial ``p + s``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import dot_dtype

_LOG2_E = 1.4426950408889634


@triton.jit
def _span_tiles(
    positions_ptr, rows_ptr, live_len_ptr, num_spans, S: tl.constexpr, HKV: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tiles of BLOCK_N tokens in each span of the batch, ``[S]``; none for padded entries."""
    o_s = tl.arange(0, S)
    m_s = o_s < num_spans
    position = tl.load(positions_ptr + o_s // HKV, mask=m_s, other=-1)
    m_s = m_s & (position >= 0)
    row = tl.load(rows_ptr + o_s // HKV, mask=m_s, other=0)
    return tl.cdiv(tl.load(live_len_ptr + row * HKV + o_s % HKV, mask=m_s, other=0), BLOCK_N)


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
):
    """acc[p + s] = sum_n exp2(x_n - max) v_n over span s's tiles that fall to program p; x = scale q k^T log2(e)."""
    i_p = tl.program_id(0)
    tiles = _span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N)
    cumulative = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0).to(tl.int64)
    programs = tl.minimum(total, PROGRAMS)  # none without work: its partial would never be written
    tile = tl.where(i_p < programs, (i_p * total) // tl.maximum(programs, 1), total).to(tl.int32)
    end = tl.where(i_p < programs, ((i_p + 1) * total) // tl.maximum(programs, 1), total).to(tl.int32)
    o_s = tl.arange(0, S)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d = o_d < D
    while tile < end:
        span = tl.sum((cumulative <= tile).to(tl.int32), 0)
        span_end = tl.sum(tl.where(o_s == span, cumulative, 0), 0)
        span_begin = span_end - tl.sum(tl.where(o_s == span, tiles, 0), 0)
        stop = tl.minimum(span_end, end)
        i_b = span // HKV
        i_h = span % HKV
        stored_span = tl.load(rows_ptr + i_b).to(tl.int64) * HKV + i_h
        live = tl.load(live_len_ptr + stored_span)
        p_q = q_ptr + i_b.to(tl.int64) * stride_q_token + (i_h * G + o_g[:, None]) * stride_q_head + o_d[None, :]
        b_q = tl.load(p_q, mask=(o_g[:, None] < G) & m_d[None, :], other=0.0)  # [BLOCK_G, BLOCK_D]
        b_q = b_q.to(tl.float32).to(DOT)
        b_max = tl.full([BLOCK_G], -1.0e30, tl.float32)
        b_sum = tl.zeros([BLOCK_G], tl.float32)
        b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for i_n in range(tile - span_begin, stop - span_begin):
            token = i_n * BLOCK_N + o_n
            m_n = token < live
            page = tl.load(page_table_ptr + stored_span * max_pages + token // PAGE, mask=m_n, other=0).to(tl.int64)
            slot = page * PAGE + token % PAGE
            m_k = m_n[None, :] & m_d[:, None]
            b_k = tl.load(k_pages_ptr + slot[None, :] * D + o_d[:, None], mask=m_k, other=0.0)
            m_v = m_n[:, None] & m_d[None, :]
            b_v = tl.load(v_pages_ptr + slot[:, None] * D + o_d[None, :], mask=m_v, other=0.0)
            b_x = tl.dot(b_q, b_k.to(tl.float32).to(DOT), input_precision="ieee") * scale_log2  # [BLOCK_G, BLOCK_N]
            if HAS_SCALES:
                b_x *= tl.load(k_scales_ptr + slot, mask=m_n, other=0.0).to(tl.float32)[None, :]
            b_x = tl.where(m_n[None, :], b_x, -1.0e30)
            b_new = tl.maximum(b_max, tl.max(b_x, 1))
            b_old = tl.exp2(b_max - b_new)
            b_w = tl.where(m_n[None, :], tl.exp2(b_x - b_new[:, None]), 0.0)
            b_sum = b_sum * b_old + tl.sum(b_w, 1)
            b_scale = 1.0
            if HAS_SCALES:  # the tile's largest scale stays outside the product, where fp16 could not hold it
                b_scales = tl.load(v_scales_ptr + slot, mask=m_n, other=0.0).to(tl.float32)
                b_scale = tl.max(b_scales, 0)
                b_w *= (b_scales / b_scale)[None, :]
            b_v = b_v.to(tl.float32).to(DOT)
            b_acc = b_acc * b_old[:, None] + tl.dot(b_w.to(DOT), b_v, input_precision="ieee") * b_scale
            b_max = b_new
        partial = (i_p + span).to(tl.int64) * BLOCK_G + o_g
        tl.store(max_ptr + partial, b_max)
        tl.store(sum_ptr + partial, b_sum)
        tl.store(acc_ptr + partial[:, None] * BLOCK_D + o_d[None, :], b_acc)
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
    BLOCK_G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out[s] = sum_p exp2(max_p - max) acc_p / sum_p exp2(max_p - max) sum_p over the programs that met span s."""
    span = tl.program_id(0)
    tiles = _span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N)
    o_s = tl.arange(0, S)
    total = tl.sum(tiles, 0).to(tl.int64)
    programs = tl.minimum(total, PROGRAMS)
    own = tl.sum(tl.where(o_s == span, tiles, 0), 0)
    begin = tl.sum(tl.where(o_s < span, tiles, 0), 0)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    b_max = tl.full([BLOCK_G], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if own > 0:
        # Tile x belongs to the last program p with p * total // programs <= x.
        first = (((begin + 1) * programs - 1) // total).to(tl.int32)
        last = (((begin + own) * programs - 1) // total).to(tl.int32)
        for i_p in range(first, last + 1):
            partial = (i_p + span).to(tl.int64) * BLOCK_G + o_g
            b_m = tl.load(max_ptr + partial)
            b_new = tl.maximum(b_max, b_m)
            b_old = tl.exp2(b_max - b_new)
            b_w = tl.exp2(b_m - b_new)
            b_sum = b_sum * b_old + tl.load(sum_ptr + partial) * b_w
            b_part = tl.load(acc_ptr + partial[:, None] * BLOCK_D + o_d[None, :])
            b_acc = b_acc * b_old[:, None] + b_part * b_w[:, None]
            b_max = b_new
    b_out = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_out = out_ptr + (span.to(tl.int64) * G + o_g[:, None]) * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=(o_g[:, None] < G) & (o_d[None, :] < D))


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
    block_g, block_d, block_n = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(head_dim)), 64
    programs = min(_max_programs(q.device), spans * triton.cdiv(page_table.shape[-1] * page_size, block_n))
    partials = q.new_empty((programs + spans) * block_g * (block_d + 2), dtype=torch.float32)
    maxima, sums, acc = partials.split([(programs + spans) * block_g * n for n in (1, 1, block_d)])
    blocks = {
        "S": triton.next_power_of_2(spans), "HKV": num_kv_heads, "G": group, "BLOCK_G": block_g, "D": head_dim,
        "BLOCK_D": block_d, "BLOCK_N": block_n, "PROGRAMS": programs, "num_warps": 4,
    }  # fmt: skip
    _decode_attention_kernel[(programs,)](
        q, positions, rows, k_pages, v_pages, k_scales, v_scales, page_table, live_len, maxima, sums, acc,
        *q.stride()[:2], spans, page_table.shape[-1], sm_scale * _LOG2_E,
        PAGE=page_size, HAS_SCALES=k_scales.numel() > 0, DOT=dot_dtype(q.dtype, k_pages.dtype), num_stages=3, **blocks,
    )  # fmt: skip
    _merge_kernel[(spans,)](positions, rows, live_len, maxima, sums, acc, out, spans, **blocks)
    return out


def _max_programs(device: torch.device) -> int:
    """Two programs per multiprocessor; the interpreter gets few, so that pieces still cut through spans."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5
