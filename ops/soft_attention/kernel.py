"""Triton backend of soft_attention: a flash loop that looks at each key block's place first; tiles of the backward."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.soft_attention.schema import empty_token_major
from fastdms.ops.triton_common import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)

# A tile of queries x keys lies wholly outside the window, wholly within it and below the diagonal, or anywhere.
FAR, NEAR, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_heads(
    ptr, token, stride_token, tokens, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_TOKEN: tl.constexpr
):
    """Rows ``[len(token), BLOCK_D]`` of one head; zero where masked."""
    p_x = ptr + token.to(tl.int64)[:, None] * stride_token + o_d[None, :]
    if CHECK_TOKEN:
        b_x = tl.load(p_x, mask=(token < tokens)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def load_bias(log_keep_ptr, key, stride_token, tokens, CHECK_TOKEN: tl.constexpr):
    """``log_keep`` of the keys, in units of log2."""
    p_x = log_keep_ptr + key.to(tl.int64) * stride_token
    b_x = tl.load(p_x, mask=key < tokens, other=0.0) if CHECK_TOKEN else tl.load(p_x)
    return b_x * _LOG2_E


@triton.jit
def soft_mask(b_x, b_bias, distance, window_tokens, PLACE: tl.constexpr):
    """Scores in units of log2 under the mask; ``distance`` is query minus key, and all three broadcast."""
    if PLACE == FAR:
        b_x += b_bias
    elif PLACE == MIXED:
        b_x += tl.where(distance > window_tokens, b_bias, 0.0)
        b_x = tl.where(distance >= 0, b_x, float("-inf"))
    return b_x


@triton.jit
def key_ranges(i_first, i_last, tokens, window_tokens, BLOCK_N: tl.constexpr):
    """Where the keys of queries ``i_first..i_last`` change their place: far, mixed, near, mixed, end.

    ``(far_end, near_begin, near_end, end)``, all but the last multiples of BLOCK_N, which divides ``i_first``.
    """
    far_end = tl.maximum(i_first - window_tokens, 0) // BLOCK_N * BLOCK_N
    near_begin = tl.cdiv(tl.maximum(i_last - window_tokens, 0), BLOCK_N) * BLOCK_N
    return far_end, tl.minimum(near_begin, i_first), i_first, tl.minimum(i_last + 1, tokens)


@triton.jit
def _attend(
    b_q, b_max, b_sum, b_acc, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m, first,
    last, tokens, window_tokens, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys ``first..last``. Its maximum starts finite: scores of -inf weigh nothing."""
    o_d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        b_k = load_heads(k_ptr, key, stride_k_token, tokens, o_d, D, BLOCK_D, PLACE == MIXED)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_bias = tl.zeros([BLOCK_N], tl.float32)
        if PLACE != NEAR:
            b_bias = load_bias(log_keep_ptr, key, stride_keep_token, tokens, PLACE == MIXED)
        b_x = soft_mask(b_x, b_bias[None, :], o_m[:, None] - key[None, :], window_tokens, PLACE)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_old = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_x - b_new[:, None])
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_v = load_heads(v_ptr, key, stride_v_token, tokens, o_d, D, BLOCK_D, PLACE == MIXED)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_acc


@triton.jit
def _soft_attention_kernel(
    q_ptr, k_ptr, v_ptr, log_keep_ptr, out_ptr, lse_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token, stride_keep_batch, stride_keep_head, stride_keep_token,
    stride_out_batch, stride_out_head, stride_out_token,
    tokens, window_tokens, scale_log2,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + [i - j > W] log_keep, causal) v and its log-sum-exp; BLOCK_M queries of one head."""
    i_b, i_h = (tl.program_id(0) // HQ).to(tl.int64), (tl.program_id(0) % HQ).to(tl.int64)
    i_first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    o_m, o_d = i_first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += i_b * stride_q_batch + i_h * stride_q_head
    k_ptr += i_b * stride_k_batch + i_h // G * stride_k_head
    v_ptr += i_b * stride_v_batch + i_h // G * stride_v_head
    log_keep_ptr += i_b * stride_keep_batch + i_h // G * stride_keep_head
    b_q = load_heads(q_ptr, o_m, stride_q_token, tokens, o_d, D, BLOCK_D, True)
    far_end, near_begin, near_end, end = key_ranges(i_first, i_first + BLOCK_M - 1, tokens, window_tokens, BLOCK_N)
    b_max, b_sum = tl.full([BLOCK_M], -1.0e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m,
        0, far_end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, FAR,
    )  # fmt: skip
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m,
        far_end, near_begin, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, MIXED,
    )  # fmt: skip
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m,
        near_begin, near_end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, NEAR,
    )  # fmt: skip
    b_max, b_sum, b_acc = _attend(
        b_q, b_max, b_sum, b_acc, k_ptr, v_ptr, log_keep_ptr, stride_k_token, stride_v_token, stride_keep_token, o_m,
        near_end, end, tokens, window_tokens, scale_log2, D, BLOCK_D, BLOCK_N, MIXED,
    )  # fmt: skip
    m_m = o_m < tokens
    tl.store(lse_ptr + tl.program_id(0).to(tl.int64) * tokens + o_m, (b_max + tl.log2(b_sum)) / _LOG2_E, mask=m_m)
    out_ptr += i_b * stride_out_batch + i_h * stride_out_head
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * stride_out_token + o_d[None, :]
    b_out = (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=m_m[:, None] & (o_d < D)[None, :])


def soft_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor, window_tokens: int, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, head_dim = q.shape
    out, lse = empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, num_warps, num_stages = _tile(q.dtype, block_d)
    _soft_attention_kernel[(batch * heads, triton.cdiv(tokens, block_m))](
        q, k, v, log_keep, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *log_keep.stride(),
        *out.stride()[:3], tokens, min(window_tokens, tokens), sm_scale * _LOG2_E.value,
        HQ=heads, G=heads // k.shape[1], D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _tile(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages); small in fp32, which is unrolled into multiply-adds."""
    if dtype == torch.float32:
        return 32, 32, 8, 1
    if block_d <= 64:
        return 128, 64, 4, 3
    return (128, 64, 8, 3) if block_d <= 128 else (128, 32, 8, 2)
