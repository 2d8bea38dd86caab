"""Decode attention over fp8 pages in Gluon: keys and values go from memory straight into the registers that the matrix
units read, past shared memory, so that many small programs fit a multiprocessor.

A thread of the matrix units needs channels of some tokens of the keys and tokens of some channels of the values, but
which of them stand side by side in a product is free, as long as both of its operands agree. So it reads whole words of
four channels; each of the four places in a word is a product of its own. Row ``m`` of a tile is token
``m % 8 * T + m // 8``, by which a thread's T tokens, and their scales, lie side by side, too.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from fastdms.ops.decode_attention.hopper_split_kernel import ask_ahead, first_slot, meet, plan, wait_knowing
from fastdms.ops.decode_attention.split_kernel import Tiles
from fastdms.ops.gluon_common import barrier, registers

# What measured best (docs/lab-notes.md), by head dim.
TILES = {
    64: Tiles(tokens=32, warps=1, stages=1, programs=16, least=2),
    128: Tiles(tokens=32, warps=1, stages=1, programs=8, least=2),
}
_COLUMNS = 8  # query heads that a product of the matrix units takes
_WARP = 32
_LOWEST = gl.constexpr(-1.0e30)
# Four fp8 numbers in each of two words to fp16: what goes side by side into a product has the same place in both.
_FP8_TO_FP16 = gl.constexpr("""{
.reg .b32 p, q;
.reg .b16 a, b, c, d;
prmt.b32 p, $4, $5, 0x5140;
prmt.b32 q, $4, $5, 0x7362;
mov.b32 {a, b}, p;
mov.b32 {c, d}, q;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
cvt.rn.f16x2.e4m3x2 $2, c;
cvt.rn.f16x2.e4m3x2 $3, d;
}""")


@gluon.jit
def _power_of_two(largest):
    """``power_of_two`` of triton_common."""
    exponent = gl.ceil(gl.log2(gl.where(largest > 0.0, largest, 1.0)))
    return gl.exp2(gl.minimum(gl.maximum(exponent, -126.0), 126.0))


@gluon.jit
def _places(words):
    """The fp8 numbers of each word in fp16, a tensor for each of the four places in a word."""
    return gl.inline_asm_elementwise(
        _FP8_TO_FP16, "=r,=r,=r,=r,r,r", [words], dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _load_queries(p_q, stride_q_head, G: gl.constexpr, D: gl.constexpr):
    """``[D, 8]``; a thread has 16 of each 64 channels of a head."""
    OWN: gl.constexpr = [[1, 0], [2, 0], [4, 0], [8, 0]] + ([[64, 0]] if D == 128 else [])
    LANES: gl.constexpr = [[16, 0], [32, 0], [0, 1], [0, 2], [0, 4]]
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(OWN, LANES, [], [], [D, 8])
    o_h = gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(1, LAYOUT))
    p_q += o_h.to(gl.int64)[None, :] * stride_q_head + o_d[:, None]
    return gl.load(p_q, mask=(o_h < G)[None, :], other=0.0)


@gluon.jit
def _meet_and_load(
    tile, end, cut, batch, stride_q_head, HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """``meet``, and what lies at its addresses."""
    span, stop, first, last, table, p_page, p_page_after, p_q = meet(tile, end, cut, batch, HKV, G, PAGE, BLOCK_N)
    page, page_after = gl.load(p_page), gl.load(p_page_after)
    return span, stop, first, last, table, page, page_after, _load_queries(p_q, stride_q_head, G, D)


@gluon.jit
def _query_places(b_q, WORDS: gl.constexpr, QUERIES: gl.constexpr):
    """Queries ``[D, 8]`` in fp32 as ``[WORDS, 8]``, for each of the four places in a word."""
    even, odd = gl.split(b_q.to(gl.float32).reshape([WORDS, 2, 2, 8]).permute([0, 3, 1, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, QUERIES, assert_trivial=True), gl.convert_layout(second, QUERIES, assert_trivial=True),
        gl.convert_layout(third, QUERIES, assert_trivial=True), gl.convert_layout(fourth, QUERIES, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def _store_places(acc_ptr, b_acc, partial, G: gl.constexpr, D: gl.constexpr):
    """The four of ``_accumulate`` as ``[8, D]``, channels in order; a thread has an eighth of a head's."""
    OWN: gl.constexpr = [[0, 1], [0, 2], [0, 4]] + ([[0, 8]] if D == 128 else []) + [[1, 0]]
    LANES: gl.constexpr = [[2, 0], [4, 0], [0, D // 8], [0, D // 4], [0, D // 2]]
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(OWN, LANES, [], [], [8, D])
    b_x = gl.join(gl.join(b_acc[0], b_acc[2]), gl.join(b_acc[1], b_acc[3]))  # [WORDS, 8, 2, 2]
    b_x = b_x.reshape([D // 32, 8, 8, 2, 2]).permute([2, 1, 0, 3, 4]).reshape([8, D])
    o_g = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    p_acc = acc_ptr + (partial.to(gl.int64) * G + o_g)[:, None] * D + o_d[None, :]
    gl.store(p_acc, gl.convert_layout(b_x, LAYOUT, assert_trivial=True), mask=(o_g < G)[:, None])


@gluon.jit
def _load_keys(k_ptr, slot, WORDS: gl.constexpr, BLOCK_N: gl.constexpr, KEYS: gl.constexpr):
    """``[BLOCK_N, WORDS]`` int32. Offsets are of 64 bits throughout: what is constant of them joins the instruction."""
    o_m = gl.arange(0, BLOCK_N, gl.SliceLayout(1, KEYS))
    o_w = gl.arange(0, WORDS, gl.SliceLayout(0, KEYS)).to(gl.int64)
    token = (o_m % 8).to(gl.int64) * (BLOCK_N // 8) + (o_m // 8).to(gl.int64)
    return gl.load(k_ptr + slot * WORDS + (token[:, None] * WORDS + o_w[None, :]))


@gluon.jit
def _value_tokens(BLOCK_N: gl.constexpr, VALUES: gl.constexpr, DTYPE: gl.constexpr):
    """``[8, T]``: token ``r * T + t`` at ``[r, t]``."""
    PAIR: gl.constexpr = gl.SliceLayout(2, VALUES)
    o_r = gl.arange(0, 8, gl.SliceLayout(1, PAIR)).to(DTYPE)
    o_t = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, PAIR)).to(DTYPE)
    return o_r[:, None] * (BLOCK_N // 8) + o_t[None, :]


@gluon.jit
def _load_values(v_ptr, slot, WORDS: gl.constexpr, BLOCK_N: gl.constexpr, VALUES: gl.constexpr):
    """``[8, T, WORDS]`` int32."""
    o_w = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, VALUES))).to(gl.int64)
    tokens = _value_tokens(BLOCK_N, VALUES, gl.int64)
    return gl.load(v_ptr + slot * WORDS + (tokens[:, :, None] * WORDS + o_w[None, None, :]))


@gluon.jit
def _load_scales(scales_ptr, slot, BLOCK_N: gl.constexpr):
    """``[8, T / 2]`` int32, each the bf16 scales of two tokens."""
    PAIRS: gl.constexpr = BLOCK_N // 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, PAIRS], [8, 4], [1, 1], [1, 0])
    o_r = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT)).to(gl.int64)
    o_p = gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT)).to(gl.int64)
    return gl.load(scales_ptr + gl.multiple_of(slot // 2, BLOCK_N // 2) + (o_r[:, None] * PAIRS + o_p[None, :]))


@gluon.jit
def _by_row(pairs, BLOCK_N: gl.constexpr, ACC: gl.constexpr):
    """Scales in fp32, in the order of a tile's rows."""
    lower, upper = pairs << 16, pairs & -65536  # a bf16 is the upper half of the fp32 of its value
    scales = gl.join(lower, upper).permute([1, 2, 0]).reshape([BLOCK_N]).to(gl.float32, bitcast=True)
    return gl.convert_layout(scales, gl.SliceLayout(1, ACC), assert_trivial=True)


@gluon.jit
def _scores(b_k, b_q, BLOCK_N: gl.constexpr, ACC: gl.constexpr):
    """``k q^T [BLOCK_N, 8]``."""
    places = _places(b_k)
    b_x = gl.zeros([BLOCK_N, b_q[0].shape[1]], gl.float32, ACC)
    for i in gl.static_range(4):
        b_x = mma_v2(places[i], b_q[i], b_x)
    return b_x


@gluon.jit
def _softmax(
    b_x, b_max, b_sum, b_k_scales, b_v_scales, left, scale, BLOCK_N: gl.constexpr, ACC: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Weights of the scores, the new maximum and sum, and what the old ones shrink by; scales as in ``tile_step``."""
    b_k_scales, b_v_scales = _by_row(b_k_scales, BLOCK_N, ACC), _by_row(b_v_scales, BLOCK_N, ACC)
    o_m = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    m_n = o_m % 8 * (BLOCK_N // 8) + o_m // 8 < left
    if MASKED:
        b_v_scales = gl.where(m_n, b_v_scales, 1.0)
    b_log = gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_v_scales], dtype=gl.float32, is_pure=True, pack=1
    )
    b_x = b_x * (b_k_scales * scale)[:, None] + b_log[:, None]
    if MASKED:
        b_x = gl.where(m_n[:, None], b_x, _LOWEST)
    b_new = gl.maximum(b_max, gl.max(b_x, 0))
    b_old = gl.exp2(b_max - b_new)
    b_w = gl.exp2(b_x - b_new[None, :])
    if MASKED:
        b_w = gl.where(m_n[:, None], b_w, 0.0)
    b_sum = b_sum * b_old[None, :] + b_w * gl.exp2(-b_log)[:, None]
    return b_w, b_new, b_sum, b_old


@gluon.jit
def _accumulate(
    b_v, b_w, b_old, b_acc, left, WORDS: gl.constexpr, BLOCK_N: gl.constexpr, ACC: gl.constexpr, MASKED: gl.constexpr,
    VALUES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """``acc * old + v^T w``, for each place in a word; row ``m`` of it is word ``m % 8 * WORDS / 8 + m // 8``."""
    if MASKED:
        b_v = gl.where((_value_tokens(BLOCK_N, VALUES, gl.int32) < left)[:, :, None], b_v, 0)
    b_w = gl.convert_layout(b_w.to(gl.float16), gl.DotOperandLayout(1, ACC, 2))
    places = _places(gl.convert_layout(b_v, PAIRED, assert_trivial=True))
    b_next = ()
    for i in gl.static_range(4):
        b_place = places[i].reshape([8, BLOCK_N // 8, 8, WORDS // 8]).permute([3, 2, 1, 0]).reshape([WORDS, BLOCK_N])
        b_place = gl.convert_layout(b_place, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
        b_next += (mma_v2(b_place, b_w, b_acc[i] * b_old[None, :]),)
    return b_next


@gluon.jit(do_not_specialize=["num_spans"])
def _decode_hopper_kernel(
    q_ptr, positions_ptr, rows_ptr, k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, page_table_ptr, live_len_ptr,
    max_ptr, sum_ptr, acc_ptr, stride_q_token, stride_q_head, num_spans, max_pages, scale_log2, num_pages,
    S: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    PROGRAMS: gl.constexpr, RESTART: gl.constexpr, LEAST: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """What ``_decode_attention_kernel`` does, by one warp: groups of at most eight heads of 64 or 128, tiles of 16 or
    32 tokens.

    Pages and scales are read in words of 32 bits. The next tile's keys are asked for as soon as this one's are
    multiplied, and so are its values. What is done before the wait, and by which right, says ``hopper_split_kernel``.
    """
    WORDS: gl.constexpr = D // 4
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    KEYS: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    QUERIES: gl.constexpr = gl.DotOperandLayout(1, ACC, 4)
    # Bits of [r, t, word]: a thread has words and all t of two r, its warp the other r and words.
    OWN: gl.constexpr = [[0, 0, 1]] + ([[0, 0, 2]] if WORDS == 32 else [])
    TIMES: gl.constexpr = [[0, 1, 0]] + ([[0, 2, 0]] if BLOCK_N == 32 else [])
    LANES: gl.constexpr = [[2, 0, 0], [4, 0, 0], [0, 0, WORDS // 8], [0, 0, WORDS // 4], [0, 0, WORDS // 2]]
    SHAPE: gl.constexpr = [8, BLOCK_N // 8, WORDS]
    VALUES: gl.constexpr = gl.DistributedLinearLayout(OWN + [[1, 0, 0]] + TIMES, LANES, [], [], SHAPE)  # noqa: RUF005
    PAIRED: gl.constexpr = gl.DistributedLinearLayout([[1, 0, 0]] + OWN + TIMES, LANES, [], [], SHAPE)  # noqa: RUF005
    i_p = gl.program_id(0)
    o_s = gl.arange(0, S, gl.BlockedLayout([S // 32], [32], [1], [0]))
    m_s = o_s < num_spans
    position = gl.load(positions_ptr + o_s // HKV, mask=m_s, other=-1)
    row = gl.maximum(gl.load(rows_ptr + o_s // HKV, mask=m_s, other=0), 0)
    m_s = m_s & (position >= 0)
    p_lengths = live_len_ptr + row * HKV + o_s % HKV
    batch = (o_s, num_spans, row, page_table_ptr, max_pages, q_ptr, stride_q_token, stride_q_head)
    # Past the multiprocessor's cache: the append may be about to change them.
    lengths = gl.load(p_lengths, mask=m_s, other=0, cache_modifier=".cg")
    tiles_of = (lengths + BLOCK_N - 1) // BLOCK_N
    cut, tile, end = plan(tiles_of, i_p, PROGRAMS, RESTART, LEAST)
    span, stop, first, last, table, p_page, p_page_after, p_q = meet(tile, end, cut, batch, HKV, G, PAGE, BLOCK_N)
    if tile < end:
        ask_ahead(
            k_pages_ptr, v_pages_ptr, k_scales_ptr, v_scales_ptr, p_page, first, num_pages, WORDS, PAGE, BLOCK_N
        )  # fmt: skip
    if DEPENDENT:
        wait_knowing(stop, p_page, p_page_after, p_q)
    page, page_after = gl.load(p_page), gl.load(p_page_after)
    b_q = _load_queries(p_q, stride_q_head, G, D)
    lengths = gl.load(p_lengths, mask=m_s, other=0)
    if DEPENDENT:  # not before the wait: the merge, which may come up from now on, reads the lengths without waiting
        gdc_launch_dependents()
    final_tiles_of = (lengths + BLOCK_N - 1) // BLOCK_N
    if gl.sum((final_tiles_of != tiles_of).to(gl.int32), 0) > 0:
        cut, tile, end = plan(final_tiles_of, i_p, PROGRAMS, RESTART, LEAST)
        span, stop, first, last, table, page, page_after, b_q = _meet_and_load(
            tile, end, cut, batch, stride_q_head, HKV, G, D, PAGE, BLOCK_N
        )
    o_g = gl.arange(0, 8, gl.SliceLayout(0, ACC))
    while tile < end:
        live = gl.sum(gl.where(o_s == span, lengths, 0), 0)
        slot = first_slot(page, first, PAGE, BLOCK_N)
        after = first_slot(page_after, gl.minimum(first + 1, last), PAGE, BLOCK_N)
        b_k = _load_keys(k_pages_ptr, slot, WORDS, BLOCK_N, KEYS)
        b_k_scales = _load_scales(k_scales_ptr, slot, BLOCK_N)
        b_v_scales = _load_scales(v_scales_ptr, slot, BLOCK_N)
        b_v = _load_values(v_pages_ptr, slot, WORDS, BLOCK_N, VALUES)
        barrier()  # else the compiler asks for them only after what is done to queries
        b_max = gl.full([8], _LOWEST, gl.float32, gl.SliceLayout(0, ACC))
        b_sum = gl.zeros([BLOCK_N, 8], gl.float32, ACC)
        b_acc = ()
        for _ in gl.static_range(4):
            b_acc += (gl.zeros([WORDS, 8], gl.float32, ACC),)
        if first <= last:
            b_p = _query_places(b_q, WORDS, QUERIES)
            largest = gl.zeros([WORDS, 8], gl.float32, QUERIES)
            for i in gl.static_range(4):
                largest = gl.maximum(largest, gl.abs(b_p[i]))
            power = _power_of_two(gl.max(gl.max(largest, 1), 0))  # fp16 can't hold every bf16 query
            scale = scale_log2 * power
            b_h = ()
            for i in gl.static_range(4):
                b_h += ((b_p[i] / power).to(gl.float16),)
            for now in range(first, last):
                slot = after
                ahead = gl.minimum(now + 2, last)
                after = first_slot(gl.load(table + ahead * BLOCK_N // PAGE), ahead, PAGE, BLOCK_N)
                b_x = _scores(b_k, b_h, BLOCK_N, ACC)
                b_k = _load_keys(k_pages_ptr, slot, WORDS, BLOCK_N, KEYS)
                b_w, b_max, b_sum, b_old = _softmax(
                    b_x, b_max, b_sum, b_k_scales, b_v_scales, BLOCK_N, scale, BLOCK_N, ACC, False
                )
                b_k_scales = _load_scales(k_scales_ptr, slot, BLOCK_N)
                b_v_scales = _load_scales(v_scales_ptr, slot, BLOCK_N)
                b_acc = _accumulate(b_v, b_w, b_old, b_acc, BLOCK_N, WORDS, BLOCK_N, ACC, False, VALUES, PAIRED)
                b_v = _load_values(v_pages_ptr, slot, WORDS, BLOCK_N, VALUES)
            left = live - last * BLOCK_N
            b_x = _scores(b_k, b_h, BLOCK_N, ACC)
            b_w, b_max, b_sum, b_old = _softmax(
                b_x, b_max, b_sum, b_k_scales, b_v_scales, left, scale, BLOCK_N, ACC, True
            )
            b_acc = _accumulate(b_v, b_w, b_old, b_acc, left, WORDS, BLOCK_N, ACC, True, VALUES, PAIRED)
        partial = (i_p + span).to(gl.int64) * G + o_g
        gl.store(max_ptr + partial, b_max, mask=o_g < G)
        gl.store(sum_ptr + partial, gl.sum(b_sum, 0), mask=o_g < G)
        _store_places(acc_ptr, b_acc, i_p + span, G, D)
        tile = stop
        if tile < end:
            span, stop, first, last, table, page, page_after, b_q = _meet_and_load(
                tile, end, cut, batch, stride_q_head, HKV, G, D, PAGE, BLOCK_N
            )


def is_supported(q: torch.Tensor, live_len: torch.Tensor, *stored: torch.Tensor) -> bool:
    """stored: pages of keys and of values, and their scales."""
    pages = stored[0]
    if pages.dtype != torch.float8_e4m3fn or q.dtype == torch.float32 or q.shape[2] not in TILES:
        return False
    few = q.shape[1] // live_len.shape[1] <= _COLUMNS
    return few and pages.shape[1] % TILES[q.shape[2]].tokens == 0 and all(x.data_ptr() % 4 == 0 for x in stored)


def attend(
    programs: int, batch: tuple[torch.Tensor, ...], stored: tuple[torch.Tensor, ...], others: tuple[Any, ...], S: int,
    **options: Any,
) -> None:  # fmt: skip
    """Partial results as ``_decode_attention_kernel`` leaves them, of what ``is_supported``.

    batch: q, positions, rows. stored: pages and scales. others: that kernel's arguments after these. options: its
    constants, and those of the launch.
    """
    words = [x.view(torch.int32) for x in stored]
    cut = TILES[batch[0].shape[2]]
    _decode_hopper_kernel[(programs,)](
        *batch, *words, *others, stored[0].shape[0], S=max(_WARP, S), num_warps=cut.warps,
        maxnreg=registers(cut.warps, cut.programs), **options,
    )  # fmt: skip
