"""Triton backend of decode_append: one program per (batch entry, KV head)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.triton_common import element_strides, load_halves, pop_pages, store_rotated, store_token


@triton.jit
def _decode_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    alpha_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    page_table_ptr,
    live_len_ptr,
    ring_ptr,
    free_pages_ptr,
    num_free_ptr,
    starved_ptr,
    out_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_alpha_token,
    stride_alpha_head,
    max_pages,
    norm_eps,
    decision_scale,
    decision_threshold,
    HKV: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Token t: slot = flagged(t - W - 1) ? its slot : live_len++; ring[t mod (W + 1)] = slot << 1 | flagged."""
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    position = tl.load(positions_ptr + i_b)
    at = tl.maximum(position, 0).to(tl.int64)
    o_half = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    m_half = o_half < HALF
    cos = tl.load(cos_ptr + at * HALF + o_half, mask=m_half, other=0.0)
    sin = tl.load(sin_ptr + at * HALF + o_half, mask=m_half, other=0.0)
    cos = tl.where(position >= 0, cos, 0.0)  # a padded query comes out as zero
    sin = tl.where(position >= 0, sin, 0.0)

    decision_input = 0.0
    if HAS_ALPHA:
        decision_input = tl.load(alpha_ptr + i_b.to(tl.int64) * stride_alpha_token + i_h * stride_alpha_head).to(
            tl.float32
        )
    for g in tl.static_range(G):
        head = i_h * G + g
        first, second = load_halves(
            q_ptr + i_b.to(tl.int64) * stride_q_token + head * stride_q_head,
            q_norm_ptr, norm_eps, o_half, m_half, HALF, HAS_NORM,
        )  # fmt: skip
        if g == 0 and not HAS_ALPHA:
            decision_input = tl.sum(tl.where(o_half == HALF - 1, second, 0.0), 0)
        out = out_ptr + (i_b.to(tl.int64) * HKV * G + head) * (2 * HALF)
        store_rotated(out, first, second, cos, sin, g == 0, o_half, m_half, HALF, ZERO)
    decision = (decision_input * decision_scale > decision_threshold).to(tl.int32)

    row = tl.maximum(tl.load(rows_ptr + i_b), 0).to(tl.int64)
    if position >= 0 and tl.load(starved_ptr + row) == 0:
        span = row * HKV + i_h
        ring = ring_ptr + span * (WINDOW + 1)
        live = tl.load(live_len_ptr + span)
        leaving = tl.load(ring + position % (WINDOW + 1))
        flagged = leaving & 1
        if SHIFT == 1 and WINDOW == 0:  # the token leaving is the one that is being decided about
            flagged = decision
        reuse = (position > WINDOW) & (flagged == 1)
        slot = tl.where(reuse, leaving >> 1, live)
        table = page_table_ptr + span * max_pages + slot // PAGE
        page = -1
        if slot // PAGE < max_pages:
            if slot % PAGE == 0 and not reuse:
                index = pop_pages(num_free_ptr, 1)
                if index >= 0:
                    page = tl.load(free_pages_ptr + index)
                    tl.store(table, page)
            else:
                page = tl.load(table)
        if page < 0:
            tl.store(starved_ptr + row, 1)
        else:
            if SHIFT == 1 and WINDOW > 0:  # noqa: SIM102 (static, unlike the inner condition)
                if position > 0:
                    before = ring + (position - 1) % (WINDOW + 1)
                    tl.store(before, (tl.load(before) & ~1) | decision)
            own = decision
            if SHIFT == 1:
                own = 0
            tl.store(ring + position % (WINDOW + 1), (slot << 1) | own)
            tl.store(live_len_ptr + span, tl.where(reuse, live, live + 1))
            target = page.to(tl.int64) * PAGE + slot % PAGE
            first, second = load_halves(
                k_ptr + i_b.to(tl.int64) * stride_k_token + i_h * stride_k_head,
                k_norm_ptr, norm_eps, o_half, m_half, HALF, HAS_NORM,
            )  # fmt: skip
            rotated = first * cos - second * sin
            second = second * cos + first * sin
            store_token(rotated, second, k_pages_ptr, k_scales_ptr, target, o_half, m_half, HALF, HAS_SCALES)
            first, second = load_halves(
                v_ptr + i_b.to(tl.int64) * stride_v_token + i_h * stride_v_head,
                k_norm_ptr, norm_eps, o_half, m_half, HALF, False,
            )  # fmt: skip
            store_token(first, second, v_pages_ptr, v_scales_ptr, target, o_half, m_half, HALF, HAS_SCALES)


def decode_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
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
    norm_eps: float,
    decision_scale: float,
    decision_threshold: float,
    shift: int,
    zero_borrowed: int,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = q.new_empty(q.shape)
    if batch == 0:
        return out
    # One warp: other programs change num_free and starved[row], which the warps of a program could read differently.
    _decode_append_kernel[(batch, num_kv_heads)](
        q, k, v, alpha, q_norm, k_norm, cos, sin, positions, rows,
        k_pages, v_pages, k_scales, v_scales, page_table, live_len, ring, free_pages, num_free, starved, out,
        *element_strides(q, k, v), *(alpha.stride() if alpha is not None else (0, 0)),
        page_table.shape[-1], norm_eps, decision_scale, decision_threshold,
        HKV=num_kv_heads, G=num_heads // num_kv_heads, HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), PAGE=k_pages.shape[1], WINDOW=ring.shape[-1] - 1,
        SHIFT=shift, ZERO=zero_borrowed, HAS_ALPHA=alpha is not None, HAS_NORM=q_norm is not None,
        HAS_SCALES=k_scales.numel() > 0, num_warps=1,
    )  # fmt: skip
    return out
