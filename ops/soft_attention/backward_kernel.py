"""Triton backend of soft_attention_backward: one kernel by queries, then one by keys; no atomics."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.soft_attention.kernel import FAR, MIXED, NEAR, key_ranges, load_bias, load_heads, soft_mask
from fastdms.ops.soft_attention.schema import empty_token_major
from fastdms.ops.triton_common import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _over_keys(
    b_q, b_do, b_lse, b_delta, b_dq, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m,
    first, last, tokens, window_tokens, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """dq += dscore k over keys ``first..last``."""
    o_d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        b_k = load_heads(k_ptr, key, stride_k_token, tokens, o_d, D, BLOCK_D, PLACE == MIXED)
        b_v = load_heads(v_ptr, key, stride_v_token, tokens, o_d, D, BLOCK_D, PLACE == MIXED)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_bias = tl.zeros([BLOCK_N], tl.float32)
        if PLACE != NEAR:
            b_bias = load_bias(log_keep_ptr, key, stride_keep_token, tokens, PLACE == MIXED)
        b_x = soft_mask(b_x, b_bias[None, :], o_m[:, None] - key[None, :], window_tokens, PLACE)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = tl.exp2(b_x - b_lse[:, None]) * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _soft_attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, log_keep_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token, stride_keep_batch, stride_keep_head, stride_keep_token,
    stride_out_batch, stride_out_head, stride_out_token, stride_do_batch, stride_do_head, stride_do_token,
    stride_dq_batch, stride_dq_head, stride_dq_token,
    tokens, window_tokens, sm_scale, scale_log2,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do out); dscore = p (do v^T - delta); dq = scale dscore k. BLOCK_M queries of one head."""
    i_b, i_h = (tl.program_id(0) // HQ).to(tl.int64), (tl.program_id(0) % HQ).to(tl.int64)
    i_first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    o_m, o_d = i_first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < tokens
    q_ptr += i_b * stride_q_batch + i_h * stride_q_head
    k_ptr += i_b * stride_k_batch + i_h // G * stride_k_head
    v_ptr += i_b * stride_v_batch + i_h // G * stride_v_head
    log_keep_ptr += i_b * stride_keep_batch + i_h // G * stride_keep_head
    out_ptr += i_b * stride_out_batch + i_h * stride_out_head
    do_ptr += i_b * stride_do_batch + i_h * stride_do_head
    at = tl.program_id(0).to(tl.int64) * tokens + o_m
    b_out = load_heads(out_ptr, o_m, stride_out_token, tokens, o_d, D, BLOCK_D, True)
    b_do = load_heads(do_ptr, o_m, stride_do_token, tokens, o_d, D, BLOCK_D, True)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta_ptr + at, b_delta, mask=m_m)
    b_lse = tl.load(lse_ptr + at, mask=m_m, other=0.0) * _LOG2_E
    b_q = load_heads(q_ptr, o_m, stride_q_token, tokens, o_d, D, BLOCK_D, True)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    far_end, near_begin, near_end, end = key_ranges(i_first, i_first + BLOCK_M - 1, tokens, window_tokens, BLOCK_N)
    b_dq = _over_keys(
        b_q, b_do, b_lse, b_delta, b_dq, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token,
        o_m, 0, far_end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, FAR,
    )  # fmt: skip
    b_dq = _over_keys(
        b_q, b_do, b_lse, b_delta, b_dq, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token,
        o_m, far_end, near_begin, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, MIXED,
    )  # fmt: skip
    b_dq = _over_keys(
        b_q, b_do, b_lse, b_delta, b_dq, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token,
        o_m, near_begin, near_end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, NEAR,
    )  # fmt: skip
    b_dq = _over_keys(
        b_q, b_do, b_lse, b_delta, b_dq, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token,
        o_m, near_end, end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, MIXED,
    )  # fmt: skip
    dq_ptr += i_b * stride_dq_batch + i_h * stride_dq_head
    p_dq = dq_ptr + o_m.to(tl.int64)[:, None] * stride_dq_token + o_d[None, :]
    tl.store(p_dq, (b_dq * sm_scale).to(dq_ptr.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def _over_queries(
    b_k, b_v, b_bias, b_dk, b_dv, b_dbias, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_q_token, stride_do_token, o_n,
    first, last, tokens, window_tokens, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """dk += dscore^T q, dv += p^T do, dbias += dscore outside the window, over one head's queries ``first..last``."""
    o_d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        m_m = query < tokens
        b_q = load_heads(q_ptr, query, stride_q_token, tokens, o_d, D, BLOCK_D, True)
        b_do = load_heads(do_ptr, query, stride_do_token, tokens, o_d, D, BLOCK_D, True)
        # A query past the end adds nothing: its q, do and delta are 0.
        b_lse = tl.load(lse_ptr + query, mask=m_m, other=0.0) * _LOG2_E
        b_delta = tl.load(delta_ptr + query, mask=m_m, other=0.0)
        distance = query[None, :] - o_n[:, None]
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2
        b_p = tl.exp2(soft_mask(b_x, b_bias[:, None], distance, window_tokens, PLACE) - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        if PLACE == FAR:
            b_dbias += tl.sum(b_ds, 1)
        elif PLACE == MIXED:
            b_dbias += tl.sum(tl.where(distance > window_tokens, b_ds, 0.0), 1)
    return b_dk, b_dv, b_dbias


@triton.jit
def _soft_attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, log_keep_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dlog_keep_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token, stride_keep_batch, stride_keep_head, stride_keep_token,
    stride_do_batch, stride_do_head, stride_do_token, stride_dk_batch, stride_dk_head, stride_dk_token,
    tokens, window_tokens, sm_scale, scale_log2,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk = scale dscore^T q, dv = p^T do, dlog_keep = sum of dscore outside the window; BLOCK_N keys, G heads."""
    i_b, i_h = (tl.program_id(0) // HKV).to(tl.int64), (tl.program_id(0) % HKV).to(tl.int64)
    j_first = tl.program_id(1) * BLOCK_N
    o_n, o_d = j_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptr += i_b * stride_k_batch + i_h * stride_k_head
    v_ptr += i_b * stride_v_batch + i_h * stride_v_head
    log_keep_ptr += i_b * stride_keep_batch + i_h * stride_keep_head
    b_k = load_heads(k_ptr, o_n, stride_k_token, tokens, o_d, D, BLOCK_D, True)
    b_v = load_heads(v_ptr, o_n, stride_v_token, tokens, o_d, D, BLOCK_D, True)
    b_bias = load_bias(log_keep_ptr, o_n, stride_keep_token, tokens, True)
    b_dk, b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dbias = tl.zeros([BLOCK_N], tl.float32)
    # Queries from the diagonal on: mixed, near, mixed, far. Each bound is a multiple of BLOCK_M, which divides BLOCK_N.
    near_begin = tl.minimum(j_first + BLOCK_N, tokens)
    near_end = tl.minimum(tl.maximum((j_first + window_tokens + 1) // BLOCK_M * BLOCK_M, near_begin), tokens)
    far_begin = tl.minimum(tl.cdiv(j_first + BLOCK_N + window_tokens, BLOCK_M) * BLOCK_M, tokens)
    for g in range(0, G):
        head = i_h * G + g
        p_q = q_ptr + i_b * stride_q_batch + head * stride_q_head
        p_do = do_ptr + i_b * stride_do_batch + head * stride_do_head
        at = (i_b * HKV * G + head) * tokens
        b_dk, b_dv, b_dbias = _over_queries(
            b_k, b_v, b_bias, b_dk, b_dv, b_dbias, p_q, p_do, lse_ptr + at, delta_ptr + at, stride_q_token,
            stride_do_token, o_n, j_first, near_begin, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_M, MIXED,
        )  # fmt: skip
        b_dk, b_dv, b_dbias = _over_queries(
            b_k, b_v, b_bias, b_dk, b_dv, b_dbias, p_q, p_do, lse_ptr + at, delta_ptr + at, stride_q_token,
            stride_do_token, o_n, near_begin, near_end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_M, NEAR,
        )  # fmt: skip
        b_dk, b_dv, b_dbias = _over_queries(
            b_k, b_v, b_bias, b_dk, b_dv, b_dbias, p_q, p_do, lse_ptr + at, delta_ptr + at, stride_q_token,
            stride_do_token, o_n, near_end, far_begin, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_M, MIXED,
        )  # fmt: skip
        b_dk, b_dv, b_dbias = _over_queries(
            b_k, b_v, b_bias, b_dk, b_dv, b_dbias, p_q, p_do, lse_ptr + at, delta_ptr + at, stride_q_token,
            stride_do_token, o_n, far_begin, tokens, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_M, FAR,
        )  # fmt: skip
    m_n = o_n < tokens
    tl.store(dlog_keep_ptr + tl.program_id(0).to(tl.int64) * tokens + o_n, b_dbias, mask=m_n)
    # dk and dv are laid out alike.
    at_heads = i_b * stride_dk_batch + i_h * stride_dk_head + o_n.to(tl.int64)[:, None] * stride_dk_token + o_d[None, :]
    m_heads = m_n[:, None] & (o_d < D)[None, :]
    tl.store(dk_ptr + at_heads, (b_dk * sm_scale).to(dk_ptr.dtype.element_ty), mask=m_heads)
    tl.store(dv_ptr + at_heads, b_dv.to(dv_ptr.dtype.element_ty), mask=m_heads)


def soft_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_keep: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_tokens: int,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, head_dim = q.shape
    num_kv_heads = k.shape[1]
    d_q, d_k, d_v = map(empty_token_major, (q, k, v))
    d_log_keep = log_keep.new_empty(log_keep.shape)
    if q.numel() == 0:
        return d_q, d_k, d_v, d_log_keep
    if grad_out.stride(-1) != 1:  # the gradient of a sum is one number everywhere
        grad_out = grad_out.contiguous()
    delta = torch.empty_like(lse)
    block_d = max(16, triton.next_power_of_2(head_dim))
    strides = [s for x in (q, k, v, log_keep) for s in x.stride()[:3]]
    numbers = (tokens, min(window_tokens, tokens), sm_scale, sm_scale * _LOG2_E.value)
    shape = {"G": heads // num_kv_heads, "D": head_dim, "BLOCK_D": block_d}
    block_m, block_n, num_warps, num_stages = _queries_tile(q.dtype, block_d)
    _soft_attention_backward_queries_kernel[(batch * heads, triton.cdiv(tokens, block_m))](
        q, k, v, log_keep, out, grad_out, lse, delta, d_q, *strides, *out.stride()[:3], *grad_out.stride()[:3],
        *d_q.stride()[:3], *numbers, HQ=heads, **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    block_m, block_n, num_warps, num_stages = _keys_tile(q.dtype, block_d)
    _soft_attention_backward_keys_kernel[(batch * num_kv_heads, triton.cdiv(tokens, block_n))](
        q, k, v, log_keep, grad_out, lse, delta, d_k, d_v, d_log_keep, *strides, *grad_out.stride()[:3],
        *d_k.stride()[:3], *numbers, HKV=num_kv_heads, **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return d_q, d_k, d_v, d_log_keep


def _queries_tile(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages); small in fp32, which is unrolled into multiply-adds."""
    if dtype == torch.float32:
        return 32, 32, 8, 1
    return (128, 64, 8, 3 if block_d <= 64 else 2) if block_d <= 128 else (64, 32, 4, 2)


def _keys_tile(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages), as ``_queries_tile``."""
    if dtype == torch.float32:
        return 32, 32, 8, 1
    return (64, 128, 8, 3 if block_d <= 64 else 2) if block_d <= 128 else (32, 64, 8, 1)
