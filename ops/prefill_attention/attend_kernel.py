"""The flash loop of prefill_attention: packed keys that every query sees, then what is seen in part."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from fastdms.ops.prefill_attention.pack_kernel import FOREVER
from fastdms.ops.triton_common import find_chunk


@triton.jit
def _load_keys(k, v, row, o_n, o_d, stride_k, stride_v, m_n, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``row + o_n`` of keys, transposed, and values: ``[BLOCK_D, BLOCK_N]`` and ``[BLOCK_N, BLOCK_D]``."""
    p_k = k + row.to(tl.int64) * stride_k + o_n.to(tl.int64)[None, :] * stride_k + o_d[:, None]
    p_v = v + row.to(tl.int64) * stride_v + o_n.to(tl.int64)[:, None] * stride_v + o_d[None, :]
    if MASKED:
        m_d = o_d < D
        b_k = tl.load(p_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)
    return b_k, b_v


@triton.jit
def _step(b_x, b_v, b_max, b_sum, b_acc, scale_log2):
    """One tile of the online softmax: scores ``[R, N]`` before scaling, -inf where masked; values ``[N, D]``."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1) * scale_log2)
    b_w = tl.exp2(b_x * scale_log2 - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_w, 1)
    b_acc = tl.dot(b_w.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc


@triton.jit(do_not_specialize=["num_chunks", "tokens"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chunk_indptr_ptr,
    plan_ptr,
    lists_ptr,
    kept_before_ptr,
    until_ptr,
    packed_k_ptr,
    packed_v_ptr,
    packed_k_desc,
    packed_v_desc,
    out_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    num_chunks,
    tokens,
    scale_log2,
    B: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """BLOCK_M positions x G grouped heads are the rows of one tile; out = softmax(scale q k^T + mask) v.

    Keys in three kinds, with q0 the block's first position: packed ones before q0 - W, which all its queries see;
    late ones of the packed part; and the chunk's own from q0 - W on. Whole tiles that every query sees come first.
    """
    i_h = tl.program_id(1)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    i_b, block, begin, end = find_chunk(pid, chunk_indptr_ptr, num_chunks, B, BLOCK_M)
    if i_b == num_chunks:  # the tokens after the last row's: padding
        begin = tl.load(chunk_indptr_ptr + num_chunks)
        end = tokens
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    first_query = block * BLOCK_M  # counted from the chunk's beginning, like all queries and keys below
    query = first_query + o_r // G
    token = (begin + query).to(tl.int64)
    m_r = (o_r < BLOCK_M * G) & (token < end)
    m_q = m_r[:, None] & (o_d < D)[None, :]
    head = i_h * G + o_r % G
    p_out = out_ptr + (token[:, None] * HKV * G + head[:, None]) * D + o_d[None, :]
    if i_b == num_chunks:
        tl.store(p_out, tl.zeros([BLOCK_R, BLOCK_D], out_ptr.dtype.element_ty), mask=m_q)
    else:
        p_q = q_ptr + token[:, None] * stride_q_token + head.to(tl.int64)[:, None] * stride_q_head + o_d[None, :]
        b_q = tl.load(p_q, mask=m_q, other=0.0).to(packed_k_ptr.dtype.element_ty)  # [BLOCK_R, BLOCK_D]
        b_max = tl.full([BLOCK_R], -1.0e30, tl.float32)
        b_sum = tl.zeros([BLOCK_R], tl.float32)
        b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

        plan = plan_ptr + (i_b * HKV + i_h) * 4
        base = tl.load(plan)
        num_old = tl.load(plan + 1)
        num_late = tl.load(plan + 2)
        band = tl.maximum(first_query - WINDOW, 0)
        num_packed = num_old + tl.load(kept_before_ptr + i_h.to(tl.int64) * tokens + begin + band)
        p_packed_k = packed_k_ptr + base.to(tl.int64) * D
        p_packed_v = packed_v_ptr + base.to(tl.int64) * D
        p_chunk_k = k_ptr + begin.to(tl.int64) * stride_k_token + i_h.to(tl.int64) * stride_k_head
        p_chunk_v = v_ptr + begin.to(tl.int64) * stride_v_token + i_h.to(tl.int64) * stride_v_head

        # Tiles of the band: first those with keys that are out of some query's window, then those that every query
        # sees, last those with keys that come after some query.
        stop = tl.minimum(first_query + BLOCK_M, end - begin)
        num_band = tl.cdiv(stop - band, BLOCK_N)
        num_flagged = tl.minimum(tl.cdiv(tl.maximum(first_query + BLOCK_M - 1 - WINDOW - band, 0), BLOCK_N), num_band)
        num_clear = tl.maximum((first_query + 1 - band) // BLOCK_N - num_flagged, 0)
        num_full = num_packed // BLOCK_N

        if TMA:
            for i in range(0, num_full):
                b_k = packed_k_desc.load([base + i * BLOCK_N, 0]).T
                b_v = packed_v_desc.load([base + i * BLOCK_N, 0])
                b_x = tl.dot(b_q, b_k, input_precision="ieee")
                b_max, b_sum, b_acc = _step(b_x, b_v, b_max, b_sum, b_acc, scale_log2)
        for i in range(num_full if TMA else 0, num_full + num_clear):
            is_packed = i < num_full
            row = tl.where(is_packed, i, num_flagged + i - num_full) * BLOCK_N + tl.where(is_packed, 0, band)
            b_k, b_v = _load_keys(
                tl.where(is_packed, p_packed_k, p_chunk_k), tl.where(is_packed, p_packed_v, p_chunk_v), row, o_n, o_d,
                tl.where(is_packed, D, stride_k_token), tl.where(is_packed, D, stride_v_token), o_n < BLOCK_N,
                D, BLOCK_D != D,
            )  # fmt: skip
            b_x = tl.dot(b_q, b_k, input_precision="ieee")
            b_max, b_sum, b_acc = _step(b_x, b_v, b_max, b_sum, b_acc, scale_log2)

        # Of tokens in the ring and of the chunk's own: the last query that sees them.
        p_late = lists_ptr + (i_b * HKV + i_h).to(tl.int64) * (5 * (WINDOW + 1)) + (WINDOW + 1)
        p_until = until_ptr + i_h.to(tl.int64) * tokens + begin
        num_tail = tl.cdiv(num_packed, BLOCK_N) - num_full
        num_edge = num_tail + tl.where(first_query < WINDOW, tl.cdiv(num_late, BLOCK_N), 0)
        for i in range(0, num_edge + num_band - num_clear):
            is_tail = i < num_tail
            is_packed = i < num_edge
            is_late = (i >= num_tail) & (i < num_edge)
            tile = i - tl.where(is_packed, num_tail, num_edge)
            tile += tl.where(i >= num_edge + num_flagged, num_clear, 0)
            # Keys of this kind before the tile, and how many of the kind there are.
            first = tl.where(is_tail, num_full, tile) * BLOCK_N + tl.where(is_packed, 0, band)
            m_n = first + o_n < tl.where(is_tail, num_packed, tl.where(is_packed, num_late, stop))
            row = first + tl.where(is_late, num_old + end - begin, 0)
            b_k, b_v = _load_keys(
                tl.where(is_packed, p_packed_k, p_chunk_k), tl.where(is_packed, p_packed_v, p_chunk_v), row, o_n, o_d,
                tl.where(is_packed, D, stride_k_token), tl.where(is_packed, D, stride_v_token), m_n, D, True,
            )  # fmt: skip
            m_until = first + o_n < tl.where(is_tail, 0, tl.where(is_packed, num_late, stop))
            b_until = tl.load(tl.where(is_late, p_late, p_until) + first + o_n, mask=m_until, other=FOREVER)
            b_until = tl.where(m_n, b_until, -1)
            b_from = first + o_n - tl.where(is_packed, FOREVER, 0)
            visible = (b_from[None, :] <= query[:, None]) & (query[:, None] <= b_until[None, :])
            b_x = tl.dot(b_q, b_k, tl.where(visible, 0.0, float("-inf")), input_precision="ieee")
            b_max, b_sum, b_acc = _step(b_x, b_v, b_max, b_sum, b_acc, scale_log2)
        b_out = b_acc / tl.where(m_r, b_sum, 1.0)[:, None]
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q)
