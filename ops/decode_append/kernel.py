"""Triton backend of decode_append: one program per (batch entry, KV head)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.triton_common import (
    ZERO_BOTH,
    ask_l2,
    dependent_launch,
    divide_by_scale,
    element_strides,
    pop_pages,
    rms_norm,
    token_scale,
)


@triton.jit
def _decide(
    lead_first, lead_second, w_first, w_second, norm_eps, decision_scale, decision_threshold, o_half,
    HALF: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """s * decision_scale > decision_threshold; s is ``lead_second``, or the last channel of the normed halves."""
    s = lead_second
    if HAS_NORM and not HAS_ALPHA:
        _, normed = rms_norm(
            lead_first.to(tl.float32), lead_second.to(tl.float32), w_first.to(tl.float32), w_second.to(tl.float32),
            norm_eps, HALF,
        )  # fmt: skip
        s = tl.sum(tl.where(o_half == HALF - 1, normed, 0.0), 0)
    return (s.to(tl.float32) * decision_scale > decision_threshold).to(tl.int32)


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
    BLOCK_G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Token t: slot = flagged(t - W - 1) ? its slot : live_len++; ring[t mod (W + 1)] = slot << 1 | flagged.

    A chain of three loads, each of them together with all that wait for no more: position and row; what the kernel
    before has made, ring entry and length; page. What is computed from the first two hides behind the third, and only a
    pop branches.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    o_g = tl.arange(0, BLOCK_G)
    o_half = tl.arange(0, BLOCK_HALF)
    m_half = o_half < HALF
    m_q = (o_g < G)[:, None] & m_half[None, :]

    position = tl.load(positions_ptr + i_b)
    row = tl.load(rows_ptr + i_b)
    q_norm_first, q_norm_second, lead_first = 0.0, 0.0, 0.0
    if HAS_NORM:
        q_norm_first = tl.load(q_norm_ptr + o_half, mask=m_half, other=0.0)
        q_norm_second = tl.load(q_norm_ptr + HALF + o_half, mask=m_half, other=0.0)
        k_norm_first = tl.load(k_norm_ptr + o_half, mask=m_half, other=0.0)
        k_norm_second = tl.load(k_norm_ptr + HALF + o_half, mask=m_half, other=0.0)
    at = tl.maximum(position, 0)  # padding reads what position 0 of row 0 would, and writes nothing
    row = tl.maximum(row, 0).to(tl.int64)
    cos = tl.load(cos_ptr + at.to(tl.int64) * HALF + o_half, mask=m_half, other=0.0)
    sin = tl.load(sin_ptr + at.to(tl.int64) * HALF + o_half, mask=m_half, other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
    span = row * HKV + i_h
    p_entry = ring_ptr + span * (WINDOW + 1) + at % (WINDOW + 1)
    if DEPENDENT:
        ask_l2(starved_ptr + row)
        ask_l2(num_free_ptr)
        # Old or new, these only decide what else L2 is asked for; they are read past the multiprocessor's cache.
        entry = tl.load(p_entry, cache_modifier=".cg")
        likely = tl.load(live_len_ptr + span, cache_modifier=".cg")
        likely = tl.where((position > WINDOW) & (entry & 1 == 1), entry >> 1, likely)
        ask_l2(page_table_ptr + span * max_pages + tl.minimum(tl.maximum(likely, 0) // PAGE, max_pages - 1))
        gdc_wait()
    p_before = ring_ptr + span * (WINDOW + 1) + (at + WINDOW) % (WINDOW + 1)
    leaving = tl.load(p_entry)
    live = tl.load(live_len_ptr + span)
    starved = tl.load(starved_ptr + row)
    free = tl.load(num_free_ptr)
    if SHIFT == 1:
        before = tl.load(p_before)
    p_q = q_ptr + i_b * stride_q_token + (i_h * G + o_g).to(tl.int64)[:, None] * stride_q_head + o_half[None, :]
    q_first = tl.load(p_q, mask=m_q, other=0.0)  # [BLOCK_G, BLOCK_HALF]
    q_second = tl.load(p_q + HALF, mask=m_q, other=0.0)
    p_k = k_ptr + i_b * stride_k_token + i_h.to(tl.int64) * stride_k_head + o_half
    k_first = tl.load(p_k, mask=m_half, other=0.0)
    k_second = tl.load(p_k + HALF, mask=m_half, other=0.0)
    p_v = v_ptr + i_b * stride_v_token + i_h.to(tl.int64) * stride_v_head + o_half
    v_first = tl.load(p_v, mask=m_half, other=0.0)
    v_second = tl.load(p_v + HALF, mask=m_half, other=0.0)
    # The decision's head once more, as prefill_rope has it: both sum its norm in the same order.
    p_lead = q_ptr + i_b * stride_q_token + (i_h * G).to(tl.int64) * stride_q_head
    if HAS_ALPHA:
        lead_second = tl.load(alpha_ptr + i_b * stride_alpha_token + i_h.to(tl.int64) * stride_alpha_head)
    elif HAS_NORM:
        lead_first = tl.load(p_lead + o_half, mask=m_half, other=0.0)
        lead_second = tl.load(p_lead + HALF + o_half, mask=m_half, other=0.0)
    else:
        lead_second = tl.load(p_lead + (2 * HALF - 1))
    tl.debug_barrier()  # else the compiler lets loads from above join or follow the page's

    # Only here has the slot to wait for the decision: the token leaving is the one that is being decided about.
    DECIDE_FIRST: tl.constexpr = SHIFT == 1 and WINDOW == 0
    flagged = leaving & 1
    if DECIDE_FIRST:
        decision = _decide(
            lead_first, lead_second, q_norm_first, q_norm_second, norm_eps, decision_scale, decision_threshold, o_half,
            HALF, HAS_ALPHA, HAS_NORM,
        )  # fmt: skip
        flagged = decision
    reuse = (position > WINDOW) & (flagged == 1)
    slot = tl.where(reuse, leaving >> 1, live)
    p_page = page_table_ptr + span * max_pages + slot // PAGE
    active = (position >= 0) & (starved == 0)  # what the ring of a starved row says is void
    page = tl.load(p_page, mask=active & (slot // PAGE < max_pages), other=-1)

    if not DECIDE_FIRST:
        decision = _decide(
            lead_first, lead_second, q_norm_first, q_norm_second, norm_eps, decision_scale, decision_threshold, o_half,
            HALF, HAS_ALPHA, HAS_NORM,
        )  # fmt: skip
    q_first, q_second = q_first.to(tl.float32), q_second.to(tl.float32)
    k_first, k_second = k_first.to(tl.float32), k_second.to(tl.float32)
    v_first, v_second = v_first.to(tl.float32), v_second.to(tl.float32)
    if HAS_NORM:
        q_first, q_second = rms_norm(
            q_first, q_second, q_norm_first.to(tl.float32)[None, :], q_norm_second.to(tl.float32)[None, :], norm_eps,
            HALF,
        )  # fmt: skip
        k_first, k_second = rms_norm(
            k_first, k_second, k_norm_first.to(tl.float32), k_norm_second.to(tl.float32), norm_eps, HALF
        )
    borrowed = (o_g == 0)[:, None] & (o_half == HALF - 1)[None, :]
    if ZERO > 0:
        q_second = tl.where(borrowed, 0.0, q_second)
    out_first = q_first * cos[None, :] - q_second * sin[None, :]
    out_second = q_second * cos[None, :] + q_first * sin[None, :]
    if ZERO == ZERO_BOTH:
        out_second = tl.where(borrowed, 0.0, out_second)
    out_first = tl.where(position >= 0, out_first, 0.0)
    out_second = tl.where(position >= 0, out_second, 0.0)
    p_out = out_ptr + (i_b * HKV * G + i_h * G + o_g)[:, None] * (2 * HALF) + o_half[None, :]
    tl.store(p_out, out_first.to(out_ptr.dtype.element_ty), mask=m_q)
    tl.store(p_out + HALF, out_second.to(out_ptr.dtype.element_ty), mask=m_q)

    rotated = k_first * cos - k_second * sin
    k_second = k_second * cos + k_first * sin
    k_first = rotated
    if HAS_SCALES:
        k_scale = token_scale(tl.maximum(tl.max(tl.abs(k_first), 0), tl.max(tl.abs(k_second), 0)))
        v_scale = token_scale(tl.maximum(tl.max(tl.abs(v_first), 0), tl.max(tl.abs(v_second), 0)))
        k_first, k_second = divide_by_scale(k_first, k_scale), divide_by_scale(k_second, k_scale)
        v_first, v_second = divide_by_scale(v_first, v_scale), divide_by_scale(v_second, v_scale)
    PAGES: tl.constexpr = k_pages_ptr.dtype.element_ty
    k_first, k_second, v_first, v_second = k_first.to(PAGES), k_second.to(PAGES), v_first.to(PAGES), v_second.to(PAGES)

    if active & (slot % PAGE == 0) & (reuse == 0) & (slot // PAGE < max_pages):
        index = pop_pages(num_free_ptr, free, 1, tl.num_programs(0) * HKV)
        page = tl.load(free_pages_ptr + index, mask=index >= 0, other=-1)
        tl.store(p_page, page, mask=index >= 0)
    tl.store(starved_ptr + row, 1, mask=active & (page < 0))
    stored = active & (page >= 0)
    own = decision
    if SHIFT == 1:
        own = 0
        if WINDOW > 0:
            tl.store(p_before, (before & ~1) | decision, mask=stored & (position > 0))
    tl.store(p_entry, (slot << 1) | own, mask=stored)
    tl.store(live_len_ptr + span, live + 1, mask=stored & (reuse == 0))
    target = page.to(tl.int64) * PAGE + slot % PAGE
    m_x = o_half < tl.where(stored, HALF, 0)  # the interpreter can't broadcast the result of a scalar comparison
    if HAS_SCALES:
        tl.store(k_scales_ptr + target, k_scale, mask=stored)
        tl.store(v_scales_ptr + target, v_scale, mask=stored)
    o_x = target * (2 * HALF) + o_half
    tl.store(k_pages_ptr + o_x, k_first, mask=m_x)
    tl.store(k_pages_ptr + o_x + HALF, k_second, mask=m_x)
    tl.store(v_pages_ptr + o_x, v_first, mask=m_x)
    tl.store(v_pages_ptr + o_x + HALF, v_second, mask=m_x)


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
    group = num_heads // num_kv_heads
    out = q.new_empty(q.shape)
    if batch == 0:
        return out
    # One warp: other programs change num_free and starved[row], which the warps of a program could read differently.
    _decode_append_kernel[(batch, num_kv_heads)](
        q, k, v, alpha, q_norm, k_norm, cos, sin, positions, rows,
        k_pages, v_pages, k_scales, v_scales, page_table, live_len, ring, free_pages, num_free, starved, out,
        *element_strides(q, k, v), *(alpha.stride() if alpha is not None else (0, 0)),
        page_table.shape[-1], norm_eps, decision_scale, decision_threshold,
        HKV=num_kv_heads, G=group, BLOCK_G=triton.next_power_of_2(group), HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), PAGE=k_pages.shape[1], WINDOW=ring.shape[-1] - 1,
        SHIFT=shift, ZERO=zero_borrowed, HAS_ALPHA=alpha is not None, HAS_NORM=q_norm is not None,
        HAS_SCALES=k_scales.numel() > 0, num_warps=1, **dependent_launch(q.device),
    )  # fmt: skip
    return out
