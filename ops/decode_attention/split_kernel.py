"""How the work is cut: the tiles of all spans in a row, and an equal share of them for every program."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


class Tiles(NamedTuple):
    """How the work is cut: tokens of a tile, warps and pipeline stages of a program, programs per multiprocessor, what
    a program takes to go on to another span, in tiles, and how many tiles a program should have at least."""

    tokens: int
    warps: int
    stages: int
    programs: int
    restart: int = 2
    least: int = 1


@triton.jit
def span_tiles(
    positions_ptr,
    rows_ptr,
    live_len_ptr,
    num_spans,
    S: tl.constexpr,
    HKV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Tiles of BLOCK_N tokens in each span of the batch, ``[S]``; none for padded entries.

    WAIT: for the kernels before this one, as soon as what they may have written is to be read. Who doesn't wait reads
    the lengths past the cache of its multiprocessor, in which old ones may lie.
    """
    o_s = tl.arange(0, S)
    m_s = o_s < num_spans
    position = tl.load(positions_ptr + o_s // HKV, mask=m_s, other=-1)
    row = tl.maximum(tl.load(rows_ptr + o_s // HKV, mask=m_s, other=0), 0)  # on its way together with the position
    if WAIT:
        gdc_wait()
    p_live = live_len_ptr + row * HKV + o_s % HKV
    live = tl.load(p_live, mask=m_s & (position >= 0), other=0, cache_modifier="" if WAIT else ".cg")
    return tl.cdiv(live, BLOCK_N)


@triton.jit
def with_restarts(tiles_of, RESTART: tl.constexpr, PROGRAMS: tl.constexpr):
    """``tiles_of`` and empty tiles before each span's first, for what it takes a program to go on to another span: at
    most RESTART, and none where programs have few tiles. Returns them and how many are empty in each span."""
    empty = tl.minimum(tl.sum(tiles_of, 0) // (6 * PROGRAMS), RESTART)
    return tl.where(tiles_of > 0, tiles_of + empty, 0), empty


@triton.jit
def sharers(total, PROGRAMS: tl.constexpr, LEAST: tl.constexpr):
    """How many programs share ``total`` tiles: so many that each has LEAST, but a quarter of PROGRAMS in any case."""
    return tl.maximum(tl.minimum(tl.cdiv(total, LEAST), PROGRAMS), tl.minimum(total, PROGRAMS // 4))


@triton.jit
def first_tile(program, total, PROGRAMS: tl.constexpr, LEAST: tl.constexpr):
    """Where a program's share of ``total`` tiles begins, ``total`` if it has none.

    None is without a tile before one that has some: its partial would never be written.
    """
    programs = tl.maximum(sharers(total, PROGRAMS, LEAST), 1)
    each = total // programs
    extra = total - each * programs
    return tl.minimum(program * each + tl.minimum(program, extra), total)


@triton.jit
def owner(tile, total, PROGRAMS: tl.constexpr, LEAST: tl.constexpr):
    """The program whose share has ``tile < total``."""
    programs = sharers(total, PROGRAMS, LEAST)
    each = total // programs
    extra = total - each * programs
    wide = extra * (each + 1)
    return tl.where(tile < wide, tile // (each + 1), extra + (tile - wide) // each)
