"""Triton backend of prefill_rope: one program per (token, KV head)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import ZERO_BOTH, element_strides, rms_norm


@triton.jit
def _load_halves(x_ptr, weight_ptr, eps, o_half, m_half, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """One head as its two halves in fp32, ``[BLOCK_HALF]`` each, RMS-normalised where there is a weight."""
    first = tl.load(x_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
    if HAS_NORM:
        w_first = tl.load(weight_ptr + o_half, mask=m_half, other=0.0).to(tl.float32)
        w_second = tl.load(weight_ptr + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
        first, second = rms_norm(first, second, w_first, w_second, eps, HALF)
    return first, second


@triton.jit
def _store_rotated(out_ptr, first, second, cos, sin, borrowed, o_half, m_half, HALF: tl.constexpr, ZERO: tl.constexpr):
    """RoPE of one query or key head and its store; ``borrowed``: its last channel is the decision's."""
    last = o_half == HALF - 1
    if ZERO > 0 and borrowed:
        second = tl.where(last, 0.0, second)
    out_second = second * cos + first * sin
    if ZERO == ZERO_BOTH and borrowed:
        out_second = tl.where(last, 0.0, out_second)
    tl.store(out_ptr + o_half, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=m_half)
    tl.store(out_ptr + HALF + o_half, out_second.to(out_ptr.dtype.element_ty), mask=m_half)


@triton.jit
def _prefill_rope_kernel(
    q_ptr,
    k_ptr,
    alpha_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_out_ptr,
    k_out_ptr,
    decision_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_alpha_token,
    stride_alpha_head,
    norm_eps,
    decision_scale,
    decision_threshold,
    HKV: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """decision = s * decision_scale > decision_threshold; q', k' = RoPE(norm(q)), RoPE(norm(k)) at the position."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    at = tl.maximum(tl.load(positions_ptr + i_t), 0).to(tl.int64)
    o_half = tl.arange(0, BLOCK_HALF)
    m_half = o_half < HALF
    cos = tl.load(cos_ptr + at * HALF + o_half, mask=m_half, other=0.0)
    sin = tl.load(sin_ptr + at * HALF + o_half, mask=m_half, other=0.0)
    decision_input = 0.0
    if HAS_ALPHA:
        decision_input = tl.load(alpha_ptr + i_t * stride_alpha_token + i_h * stride_alpha_head).to(tl.float32)
    for g in tl.static_range(G):
        head = i_h * G + g
        p_q = q_ptr + i_t * stride_q_token + head * stride_q_head
        first, second = _load_halves(p_q, q_norm_ptr, norm_eps, o_half, m_half, HALF, HAS_NORM)
        if g == 0 and not HAS_ALPHA:
            decision_input = tl.sum(tl.where(o_half == HALF - 1, second, 0.0), 0)
        p_out = q_out_ptr + (i_t * HKV * G + head) * (2 * HALF)
        _store_rotated(p_out, first, second, cos, sin, g == 0, o_half, m_half, HALF, ZERO)
    decision = decision_input * decision_scale > decision_threshold
    tl.store(decision_ptr + i_t * HKV + i_h, decision.to(tl.int8))
    p_k = k_ptr + i_t * stride_k_token + i_h * stride_k_head
    first, second = _load_halves(p_k, k_norm_ptr, norm_eps, o_half, m_half, HALF, HAS_NORM)
    _store_rotated(
        k_out_ptr + (i_t * HKV + i_h) * (2 * HALF), first, second, cos, sin, False, o_half, m_half, HALF, ZERO
    )


def prefill_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    alpha: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    norm_eps: float,
    decision_scale: float,
    decision_threshold: float,
    zero_borrowed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    decisions = k.new_empty(k.shape[:2], dtype=torch.bool)
    if tokens:
        _prefill_rope_kernel[(tokens, num_kv_heads)](
            q, k, alpha, q_norm, k_norm, cos, sin, positions, q_out, k_out, decisions.view(torch.int8),
            *element_strides(q, k), *(alpha.stride() if alpha is not None else (0, 0)),
            norm_eps, decision_scale, decision_threshold,
            HKV=num_kv_heads, G=num_heads // num_kv_heads, HALF=head_dim // 2,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2), ZERO=zero_borrowed,
            HAS_ALPHA=alpha is not None, HAS_NORM=q_norm is not None, num_warps=1,
        )  # fmt: skip
    return q_out, k_out, decisions
