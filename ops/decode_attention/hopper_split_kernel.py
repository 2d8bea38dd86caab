"""``split_kernel`` in Gluon, done before the wait: which tiles are a program's, and where what it needs for them lies.

A program plans while the append may still be at work, by lengths of which each is the old or the new one, so that after
the wait it has only to load. A plan depends on the lengths by nothing but how many tiles each span has. So the early
one holds if the final lengths give every span as many; if not, which is when a span has begun another tile, the program
plans anew. Either way its plan is that of the final lengths, by which all other programs and the merge go as well.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastdms.ops.gluon_common import add
from fastdms.ops.triton_common import WAIT_KNOWING

# Lets one thread ask L2 for so many bytes, a multiple of 16, from the last such multiple on.
ASK_L2 = gl.constexpr("""{
.reg .pred p;
.reg .b64 a;
and.b64 a, $1, -16;
elect.sync _|p, -1;
@p cp.async.bulk.prefetch.L2.global [a], $2;
mov.b32 $0, 0;
}""")


@gluon.jit
def _first_tile(program, total, PROGRAMS: gl.constexpr, LEAST: gl.constexpr):
    """``first_tile`` of split_kernel."""
    programs = gl.maximum(gl.minimum((total + LEAST - 1) // LEAST, PROGRAMS), gl.minimum(total, PROGRAMS // 4))
    programs = gl.maximum(programs, 1)
    each = total // programs
    extra = total - each * programs
    return gl.minimum(program * each + gl.minimum(program, extra), total)


@gluon.jit
def plan(tiles_of, program, PROGRAMS: gl.constexpr, RESTART: gl.constexpr, LEAST: gl.constexpr):
    """The cut for ``meet``, and where a program's share begins and ends. tiles_of: of each span, ``[S]``."""
    empty = gl.minimum(gl.sum(tiles_of, 0) // (6 * PROGRAMS), RESTART)  # as with_restarts does
    tiles_of = gl.where(tiles_of > 0, tiles_of + empty, 0)
    total = gl.sum(tiles_of, 0)
    cut = (tiles_of, gl.associative_scan(tiles_of, 0, add), empty)
    return cut, _first_tile(program, total, PROGRAMS, LEAST), _first_tile(program + 1, total, PROGRAMS, LEAST)


@gluon.jit
def meet(tile, end, cut, batch, HKV: gl.constexpr, G: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The span that a program has ``tile`` of, which tile it goes on with after that span, the first and the last tile
    of the span's tokens that it has (last < first: none), the span's row of the page table, and three addresses: of the
    numbers of the first tile's page and the next one's, and of the queries.

    What is there can always be read: of a program without a tile it is the last span's, without tokens the first page.
    """
    tiles_of, cumulative, empty = cut
    o_s, num_spans, row, page_table_ptr, max_pages, q_ptr, stride_q_token, stride_q_head = batch
    span = gl.minimum(gl.sum((cumulative <= tile).to(gl.int32), 0), num_spans - 1)
    own = o_s == span
    span_end = gl.sum(gl.where(own, cumulative, 0), 0)
    begin = span_end - gl.sum(gl.where(own, tiles_of, 0), 0) + empty
    stop = gl.minimum(span_end, end)
    first = gl.maximum(tile - begin, 0)
    last = stop - begin - 1
    stored_span = gl.sum(gl.where(own, row, 0), 0).to(gl.int64) * HKV + span % HKV
    table = page_table_ptr + stored_span * max_pages
    p_page = table + gl.minimum(first, gl.maximum(last, 0)) * BLOCK_N // PAGE
    p_page_after = table + gl.minimum(first + 1, gl.maximum(last, 0)) * BLOCK_N // PAGE
    p_q = q_ptr + (span // HKV).to(gl.int64) * stride_q_token + (span % HKV * G).to(gl.int64) * stride_q_head
    return span, stop, first, last, table, p_page, p_page_after, p_q


@gluon.jit
def first_slot(page, tile, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where a tile's tokens begin in the pool, int64; page: the number of its page."""
    return page.to(gl.int64) * PAGE + tile * BLOCK_N % PAGE


@gluon.jit
def ask_ahead(
    k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, p_page, tile, num_pages, WORDS: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Asks L2, and nothing nearer, for a tile of a span. Its page's number may be an old one, so it is read past the
    multiprocessor's cache, and whatever it is, a page of the pool is asked for."""
    page = gl.minimum(gl.maximum(gl.load(p_page, cache_modifier=".cg"), 0), num_pages - 1)
    slot = first_slot(page, tile, PAGE, BLOCK_N)
    _ask_l2(k_ptr + slot * WORDS, BLOCK_N * WORDS * 4)
    _ask_l2(v_ptr + slot * WORDS, BLOCK_N * WORDS * 4)
    _ask_l2(k_scales_ptr + slot // 2, BLOCK_N * 2)
    _ask_l2(v_scales_ptr + slot // 2, BLOCK_N * 2)


@gluon.jit
def _ask_l2(pointer, NUM_BYTES: gl.constexpr):
    gl.static_assert(NUM_BYTES % 16 == 0)
    gl.inline_asm_elementwise(ASK_L2, "=r,l,r", [pointer, NUM_BYTES], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_knowing(stop, p_page, p_page_after, p_q):
    """``gdc_wait_knowing`` of triton_common, of these."""
    addresses = p_page.to(gl.int64) ^ p_page_after.to(gl.int64) ^ p_q.to(gl.int64)
    number = addresses.to(gl.int32) ^ stop
    gl.inline_asm_elementwise(WAIT_KNOWING, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
