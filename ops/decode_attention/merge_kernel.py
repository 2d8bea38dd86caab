"""The partial results of a span put together, by the programs that met it."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastdms.ops.decode_attention.split_kernel import owner, span_tiles, with_restarts
from fastdms.ops.decode_attention.tile_kernel import LOWEST
from fastdms.ops.triton_common import gdc_wait_knowing


@triton.jit
def _load_pieces(max_ptr, sum_ptr, acc_ptr, i_p, o_p, last, span, i_g, o_d, m_d, G: tl.constexpr, D: tl.constexpr):
    """Maxima and sums of the programs ``i_p + o_p``, and what they accumulated; nothing past program ``last``."""
    m_p = i_p + o_p <= last
    partial = (i_p + o_p + span).to(tl.int64) * G + i_g
    b_m = tl.load(max_ptr + partial, mask=m_p, other=LOWEST)
    b_s = tl.load(sum_ptr + partial, mask=m_p, other=0.0)
    b_a = tl.load(acc_ptr + partial[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)
    return b_m, b_s, b_a


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
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RESTART: tl.constexpr,
    LEAST: tl.constexpr,
    PIECES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[s, g] = sum_p exp2(max_p - max) acc_p / sum_p exp2(max_p - max) sum_p over the programs that met span s.

    BLOCK_C: channels of a program.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    span = tl.program_id(0)
    i_g = tl.program_id(1)
    tiles_of = span_tiles(positions_ptr, rows_ptr, live_len_ptr, num_spans, S, HKV, BLOCK_N, False)
    tiles_of, _ = with_restarts(tiles_of, RESTART, PROGRAMS)
    o_s = tl.arange(0, S)
    total = tl.sum(tiles_of, 0)
    own = tl.sum(tl.where(o_s == span, tiles_of, 0), 0)
    begin = tl.sum(tl.where(o_s < span, tiles_of, 0), 0)
    o_d = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, PIECES)
    m_d = o_d < D
    b_max = LOWEST
    b_sum = 0.0
    b_acc = tl.zeros([BLOCK_C], tl.float32)
    first = 0
    last = -1
    if own > 0:
        first = owner(begin, total, PROGRAMS, LEAST)
        last = owner(begin + own - 1, total, PROGRAMS, LEAST)
    if DEPENDENT:  # for what those programs left; who they are is known before
        gdc_wait_knowing(first + last)
    pieces = _load_pieces(max_ptr, sum_ptr, acc_ptr, first, o_p, last, span, i_g, o_d, m_d, G, D)
    for i_p in range(first, last + 1, PIECES):
        b_m, b_s, b_a = pieces
        pieces = _load_pieces(max_ptr, sum_ptr, acc_ptr, i_p + PIECES, o_p, last, span, i_g, o_d, m_d, G, D)
        b_new = tl.maximum(b_max, tl.max(b_m, 0))
        b_old = tl.exp2(b_max - b_new)
        b_w = tl.where(i_p + o_p <= last, tl.exp2(b_m - b_new), 0.0)
        b_sum = b_sum * b_old + tl.sum(b_w * b_s, 0)
        b_acc = b_acc * b_old + tl.sum(b_w[:, None] * b_a, 0)
        b_max = b_new
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(out_ptr + (span.to(tl.int64) * G + i_g) * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)
