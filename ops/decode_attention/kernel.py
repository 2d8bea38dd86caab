"""Triton backend of decode_attention: equal pieces of work for every program, cut on the device from ``live_len``.

Programs and spans are both in order, so each pair (program p, span s) that meets owns partial ``p + s``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastdms.ops.decode_attention.merge_kernel import _merge_kernel
from fastdms.ops.decode_attention.split_kernel import Tiles, first_tile, span_tiles, with_restarts
from fastdms.ops.decode_attention.tile_kernel import LOWEST, tile_step
from fastdms.ops.triton_common import LOG2_E, dependent_launch, dot_dtype, on_hopper, power_of_two


def tiles(head_dim: int, element_bytes: int) -> Tiles:
    """The cut that measured best for pages of this size (``docs/lab-notes.md``)."""
    if element_bytes == 4:
        return Tiles(tokens=32, warps=4, stages=2, programs=2)
    if head_dim * element_bytes <= 64:
        return Tiles(tokens=64, warps=1, stages=7, programs=8)
    if head_dim * element_bytes <= 128:
        return Tiles(tokens=32, warps=1, stages=5, programs=6, restart=4)
    return Tiles(tokens=64 if head_dim * element_bytes <= 256 else 32, warps=4, stages=3, programs=2)


def merge_tile(programs: int, spans: int, head_dim: int) -> tuple[int, int]:
    """Partials that the merge takes at once, about as many as a span has if all are of one length, and channels."""
    pieces: int = min(64, max(16, triton.next_power_of_2(programs // spans + 2)))
    channels: int = min(triton.next_power_of_2(head_dim), 1024 // pieces)
    return pieces, channels


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
    RESTART: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    FAST: tl.constexpr,
    DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """acc[p + s] = sum_n exp2(x_n - max) v_n over span s's tiles that fall to program p; x = scale q k^T log2(e)."""
    i_p = tl.program_id(0)
    tiles_of = span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N, DEPENDENT)
    if DEPENDENT:  # not before: the merge, which may come up from now on, reads the lengths without waiting
        gdc_launch_dependents()
    tiles_of, empty = with_restarts(tiles_of, RESTART, PROGRAMS)
    cumulative = tl.cumsum(tiles_of, 0)
    total = tl.sum(tiles_of, 0)
    tile = first_tile(i_p, total, PROGRAMS, LEAST)
    end = first_tile(i_p + 1, total, PROGRAMS, LEAST)
    o_s = tl.arange(0, S)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_D // PARTS)
    m_q = (o_g[None, :] < G) & (o_d[:, None] < D)
    m_acc = (o_g[None, :] < G) & (o_v[:, None] * PARTS < D)
    while tile < end:
        span = tl.sum((cumulative <= tile).to(tl.int32), 0)
        span_end = tl.sum(tl.where(o_s == span, cumulative, 0), 0)
        span_begin = span_end - tl.sum(tl.where(o_s == span, tiles_of, 0), 0)
        stop = tl.minimum(span_end, end)
        i_b = span // HKV
        i_h = span % HKV
        stored_span = tl.maximum(tl.load(rows_ptr + i_b), 0).to(tl.int64) * HKV + i_h
        live = tl.load(live_len_ptr + stored_span)
        table = page_table_ptr + stored_span * max_pages
        head = (i_h * G + o_g[None, :]).to(tl.int64)
        p_q = q_ptr + i_b.to(tl.int64) * stride_q_token + head * stride_q_head + o_d[:, None]
        b_q = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_G]
        scale = scale_log2
        if HAS_SCALES:  # fp8 becomes fp16, which can't hold every bf16 query
            power = power_of_two(tl.max(tl.max(tl.abs(b_q), 1), 0))
            b_q /= power
            scale *= power
        b_q = b_q.to(DOT)
        b_max = tl.full([BLOCK_G], LOWEST, tl.float32)
        b_sum = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
        b_acc = ()
        for _ in tl.static_range(PARTS):
            b_acc += (tl.zeros([BLOCK_D // PARTS, BLOCK_G], tl.float32),)
        begin = tl.maximum(tile - span_begin - empty, 0) * BLOCK_N
        last = tl.maximum(stop - span_begin - empty, 0) * BLOCK_N
        whole = tl.minimum(last, live // BLOCK_N * BLOCK_N)
        for first in range(begin, whole, BLOCK_N):
            b_max, b_sum, b_acc = tile_step(
                b_q, b_max, b_sum, b_acc, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, table, first, live,
                scale, D, BLOCK_D, PAGE, BLOCK_N, HAS_SCALES, PARTS == 2, FAST, False,
            )  # fmt: skip
        if whole < last:
            b_max, b_sum, b_acc = tile_step(
                b_q, b_max, b_sum, b_acc, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, table, whole, live,
                scale, D, BLOCK_D, PAGE, BLOCK_N, HAS_SCALES, PARTS == 2, FAST, True,
            )  # fmt: skip
        partial = (i_p + span).to(tl.int64) * G + o_g
        tl.store(max_ptr + partial, b_max, mask=o_g < G)
        tl.store(sum_ptr + partial, tl.sum(b_sum, 0), mask=o_g < G)
        p_acc = acc_ptr + partial[None, :] * D + o_v[:, None] * PARTS
        if PARTS == 2:  # neighbours again, which a thread stores at once
            tl.store(p_acc[:, :, None] + tl.arange(0, 2), tl.join(b_acc[0], b_acc[1]), mask=m_acc[:, :, None])  # type: ignore[misc]
        else:
            tl.store(p_acc, b_acc[0], mask=m_acc)  # type: ignore[misc]
        tile = stop


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
    hopper = _hopper_kernel(q, live_len, k_pages, v_pages, k_scales, v_scales)
    cut = hopper.TILES[head_dim] if hopper else tiles(head_dim, k_pages.element_size() if dot != tl.float32 else 4)
    most = cut.programs * _num_processors(q.device)
    programs = min(most, spans * triton.cdiv(page_table.shape[-1] * page_size, cut.tokens))
    partials = q.new_empty((programs + spans) * group * (head_dim + 2), dtype=torch.float32)
    acc, maxima, sums = partials.split([(programs + spans) * group * n for n in (head_dim, 1, 1)])
    sizes = {
        "S": triton.next_power_of_2(spans), "HKV": num_kv_heads, "G": group, "D": head_dim, "BLOCK_N": cut.tokens,
        "PROGRAMS": programs, "RESTART": cut.restart, "LEAST": cut.least if programs == most else 1,
    }  # fmt: skip
    dependent = dependent_launch(q.device)
    others = (page_table, live_len, maxima, sums, acc, *q.stride()[:2], spans, page_table.shape[-1], sm_scale * LOG2_E)
    if hopper:
        stored = (k_pages, v_pages, k_scales, v_scales)
        hopper.attend(programs, (q, positions, rows), stored, others, PAGE=page_size, **sizes, **dependent)
    else:
        if page_size % cut.tokens == 0:
            k_scales, v_scales = _pairs(k_scales), _pairs(v_scales)
        pairs = k_scales.numel() > 0 and head_dim >= 32 and head_dim % 2 == 0 and v_pages.storage_offset() % 2 == 0
        if pairs:  # at least 16 in a head, as many as the matrix units have rows
            v_pages = v_pages.view(torch.int16)
        _decode_attention_kernel[(programs,)](
            q, positions, rows, k_pages, v_pages, k_scales, v_scales, *others,
            BLOCK_G=max(8, triton.next_power_of_2(group)), BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            PAGE=page_size, HAS_SCALES=k_scales.numel() > 0, PARTS=2 if pairs else 1,
            FAST=q.device.type == "cuda" and dot == tl.float16, DOT=dot, num_warps=cut.warps, num_stages=cut.stages,
            **sizes, **dependent,
        )  # fmt: skip
    pieces, channels = merge_tile(programs, spans, head_dim)
    _merge_kernel[(spans, group, triton.cdiv(head_dim, channels))](
        positions, rows, live_len, maxima, sums, acc, out, spans, PIECES=pieces, BLOCK_C=channels,
        num_warps=1, **sizes, **dependent,
    )  # fmt: skip
    return out


def _hopper_kernel(q: torch.Tensor, live_len: torch.Tensor, *stored: torch.Tensor) -> ModuleType | None:
    """The kernel for fp8 pages on Hopper, where it takes what is ``stored``."""
    if not on_hopper(q.device):
        return None
    from fastdms.ops.decode_attention import hopper_kernel  # Gluon only where it is used

    return hopper_kernel if hopper_kernel.is_supported(q, live_len, *stored) else None


def _pairs(scales: torch.Tensor) -> torch.Tensor:
    if scales.storage_offset() % 2:
        raise ValueError("scales are read in pairs, so they must not begin at an odd element of their storage")
    return scales.view(torch.int32)


def _num_processors(device: torch.device) -> int:
    """Multiprocessors; the interpreter gets few, so that pieces still cut through spans."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
