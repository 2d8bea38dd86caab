"""Triton backend of prefill_attention: a flash loop over the row's pages, then over the chunk up to the diagonal."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import attention_tile, dot_dtype, element_strides, find_chunk, flash_step

_LOG2_E = 1.4426950408889634


@triton.jit
def _expiry_kernel(
    decisions_ptr,
    positions_ptr,
    rows_ptr,
    chunk_indptr_ptr,
    live_len_ptr,
    ring_ptr,
    expiry_ptr,
    max_slots,
    HKV: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """expiry[slot] = position + W of every flagged token in the ring: the last position that sees it."""
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    begin = tl.load(chunk_indptr_ptr + i_b)
    if begin < tl.load(chunk_indptr_ptr + i_b + 1):
        start = tl.load(positions_ptr + begin)
        span = tl.load(rows_ptr + i_b).to(tl.int64) * HKV + i_h
        live = tl.load(live_len_ptr + span)
        completed = tl.load(decisions_ptr + begin.to(tl.int64) * HKV + i_h).to(tl.int32)
        for offset in range(0, WINDOW + 1, BLOCK_W):
            o_w = offset + tl.arange(0, BLOCK_W)
            token = start - 1 - o_w
            m_w = (o_w <= WINDOW) & (token >= 0)
            entry = tl.load(ring_ptr + span * (WINDOW + 1) + token % (WINDOW + 1), mask=m_w, other=0)
            flagged = entry & 1
            if SHIFT == 1:
                flagged = tl.where(o_w == 0, completed, flagged)
            slot = entry >> 1
            out = expiry_ptr + (i_b * HKV + i_h).to(tl.int64) * max_slots + slot
            tl.store(out, token + WINDOW, mask=m_w & (flagged == 1) & (slot >= 0) & (slot < live))


@triton.jit
def _prefill_attention_kernel(
    q_ptr,
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
    live_len_ptr,
    expiry_ptr,
    out_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    num_chunks,
    max_pages,
    scale_log2,
    B: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT: tl.constexpr,
):
    """BLOCK_M positions x G grouped heads are the rows of one tile; out = softmax(scale q k^T + mask) v."""
    i_h = tl.program_id(1)
    i_b, block, begin, end = find_chunk(tl.program_id(0), chunk_indptr_ptr, num_chunks, B, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d = o_d < D
    if i_b < num_chunks:
        token = begin + block * BLOCK_M + o_r // G
        m_r = (o_r < BLOCK_M * G) & (token < end)
        start = tl.load(positions_ptr + begin)
        position = start + block * BLOCK_M + o_r // G
        head = i_h * G + o_r % G
        p_q = q_ptr + token.to(tl.int64)[:, None] * stride_q_token + head[:, None] * stride_q_head + o_d[None, :]
        b_q = tl.load(p_q, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32).to(DOT)  # [BLOCK_R, BLOCK_D]
        b_max = tl.full([BLOCK_R], -1.0e30, tl.float32)
        b_sum = tl.zeros([BLOCK_R], tl.float32)
        b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

        span = tl.load(rows_ptr + i_b).to(tl.int64) * HKV + i_h
        live = tl.load(live_len_ptr + span)
        p_expiry = expiry_ptr + (i_b * HKV + i_h).to(tl.int64) * max_pages * PAGE
        for offset in range(0, live, BLOCK_N):
            o_slot = offset + o_n
            m_n = o_slot < live
            page = tl.load(page_table_ptr + span * max_pages + o_slot // PAGE, mask=m_n, other=0).to(tl.int64)
            at = page * PAGE + o_slot % PAGE
            b_k = tl.load(k_pages_ptr + at[None, :] * D + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(v_pages_ptr + at[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
            if HAS_SCALES:
                b_k *= tl.load(k_scales_ptr + at, mask=m_n, other=0.0).to(tl.float32)[None, :]
                b_v *= tl.load(v_scales_ptr + at, mask=m_n, other=0.0).to(tl.float32)[:, None]
            expiry = tl.load(p_expiry + o_slot, mask=m_n, other=-1)
            visible = m_n[None, :] & (position[:, None] <= expiry[None, :])
            b_max, b_sum, b_acc = flash_step(b_q, b_k, b_v, visible, b_max, b_sum, b_acc, scale_log2, DOT)

        stop = tl.minimum(end, begin + (block + 1) * BLOCK_M)
        for first in range(begin, stop, BLOCK_N):
            o_key = first + o_n
            m_n = o_key < stop
            key = o_key.to(tl.int64)
            p_k = k_ptr + key[None, :] * stride_k_token + i_h * stride_k_head + o_d[:, None]
            p_v = v_ptr + key[:, None] * stride_v_token + i_h * stride_v_head + o_d[None, :]
            b_k = tl.load(p_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(p_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
            # With shift 1 the chunk's last token has no flag yet, and no query of the chunk could notice it.
            m_flag = (o_key + SHIFT) < end
            flagged = tl.load(decisions_ptr + (key + SHIFT) * HKV + i_h, mask=m_n & m_flag, other=0)
            distance = position[:, None] - (start + o_key - begin)[None, :]
            visible = m_n[None, :] & (distance >= 0) & ((distance <= WINDOW) | (flagged == 0)[None, :])
            b_max, b_sum, b_acc = flash_step(b_q, b_k, b_v, visible, b_max, b_sum, b_acc, scale_log2, DOT)

        p_out = out_ptr + (token.to(tl.int64)[:, None] * HKV * G + head[:, None]) * D + o_d[None, :]
        b_out = b_acc / tl.where(m_r, b_sum, 1.0)[:, None]
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


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
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, num_chunks = k.shape[1], k_pages.shape[1], rows.shape[0]
    out = q.new_zeros(q.shape)
    if tokens == 0 or num_chunks == 0:
        return out
    group, max_pages, window = num_heads // num_kv_heads, page_table.shape[-1], ring.shape[-1] - 1
    flags = decisions.contiguous().view(torch.int8)
    expiry = torch.full(
        (num_chunks, num_kv_heads, max_pages * page_size),
        torch.iinfo(torch.int32).max,
        dtype=torch.int32,
        device=q.device,
    )
    _expiry_kernel[(num_chunks, num_kv_heads)](
        flags, positions, rows, chunk_indptr, live_len, ring, expiry, max_pages * page_size,
        HKV=num_kv_heads, WINDOW=window, BLOCK_W=min(256, triton.next_power_of_2(window + 1)), SHIFT=shift,
    )  # fmt: skip
    dot = dot_dtype(q.dtype, k_pages.dtype)
    block_r, block_n = attention_tile(group, head_dim, dot)
    block_m = block_r // group
    grid = (triton.cdiv(tokens, block_m) + num_chunks, num_kv_heads)
    _prefill_attention_kernel[grid](
        q, k, v, flags, positions, rows, chunk_indptr, k_pages, v_pages, k_scales, v_scales, page_table, live_len,
        expiry, out, *element_strides(q, k, v), num_chunks, max_pages, sm_scale * _LOG2_E,
        B=triton.next_power_of_2(num_chunks), HKV=num_kv_heads, G=group, D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), PAGE=page_size, WINDOW=window, SHIFT=shift,
        BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_N=block_n, HAS_SCALES=k_scales.numel() > 0,
        DOT=dot, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
