"""The project's own kernel of dense_attention, for any dtype: a plain flash loop up to each block's diagonal."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import LOG2_E, dot_dtype


def _tile(group: int, head_dim: int, dot: tl.dtype) -> tuple[int, int]:
    """(queries times grouped heads, keys) of a tile; small in fp32, which is unrolled into multiply-adds."""
    rows, keys = (32, 32) if dot == tl.float32 else (64, 64 if head_dim <= 128 else 32)
    return max(rows, triton.next_power_of_2(group)), keys


@triton.jit
def _flash_step(b_q, b_k, b_v, visible, b_max, b_sum, b_acc, scale_log2, DOT: tl.constexpr):
    """One tile of the online softmax: q ``[R, D]``, k ``[D, N]``, v ``[N, D]``, visible ``[R, N]``."""
    b_x = tl.dot(b_q, b_k.to(tl.float32).to(DOT), input_precision="ieee") * scale_log2
    b_x = tl.where(visible, b_x, -1.0e30)
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_old = tl.exp2(b_max - b_new)
    b_w = tl.where(visible, tl.exp2(b_x - b_new[:, None]), 0.0)
    b_sum = b_sum * b_old + tl.sum(b_w, 1)
    b_acc = b_acc * b_old[:, None] + tl.dot(b_w.to(DOT), b_v.to(tl.float32).to(DOT), input_precision="ieee")
    return b_new, b_sum, b_acc


@triton.jit(do_not_specialize=["start", "tokens"])
def _dense_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_q_token,
    stride_q_head,
    start,
    tokens,
    scale_log2,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """out = softmax(scale q k^T, causal) v over the history; BLOCK_M positions x G grouped heads share a tile."""
    i_h = tl.program_id(1)
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    token = tl.program_id(0) * BLOCK_M + o_r // G
    m_r = (o_r < BLOCK_M * G) & (token < tokens)
    position = tl.where(m_r, start + token, -1)
    head = i_h * G + o_r % G
    p_q = q_ptr + token.to(tl.int64)[:, None] * stride_q_token + head[:, None] * stride_q_head + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32).to(DOT)
    b_max = tl.full([BLOCK_R], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, tl.max(position, 0) + 1, BLOCK_N):
        key = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = key <= tl.max(position, 0)
        at = key * HKV + i_h
        b_k = tl.load(k_ptr + at[None, :] * D + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(v_ptr + at[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        visible = key[None, :] <= position[:, None]
        b_max, b_sum, b_acc = _flash_step(b_q, b_k, b_v, visible, b_max, b_sum, b_acc, scale_log2, DOT)
    p_out = out_ptr + (token.to(tl.int64)[:, None] * HKV * G + head[:, None]) * D + o_d[None, :]
    b_out = b_acc / tl.where(m_r, b_sum, 1.0)[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


def flash_attention(
    q: torch.Tensor, k_history: torch.Tensor, v_history: torch.Tensor, start: int, sm_scale: float
) -> torch.Tensor:
    """Causal attention of the chunk ``q [T, Hq, D]`` from position ``start`` on; the history holds the chunk too."""
    tokens, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    num_kv_heads = k_history.shape[1]
    group = num_heads // num_kv_heads
    dot = dot_dtype(q.dtype, k_history.dtype)
    block_r, block_n = _tile(group, head_dim, dot)
    _dense_attention_kernel[(triton.cdiv(tokens, block_r // group), num_kv_heads)](
        q, k_history, v_history, out, *q.stride()[:2], start, tokens, sm_scale * LOG2_E,
        HKV=num_kv_heads, G=group, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=block_r // group, BLOCK_R=block_r, BLOCK_N=block_n,
        DOT=dot, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
