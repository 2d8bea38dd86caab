"""What both loops of prefill_attention on Hopper know of a block of queries: whose it is, and which keys it meets."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastdms.ops.gluon_common import add

FOREVER = gl.constexpr(2**31 - 1)  # later than any query


@gluon.jit
def blocks_of(chunk_indptr_ptr, num_chunks, B: gl.constexpr, BLOCK_M: gl.constexpr, FLAT: gl.constexpr):
    """Of each chunk the first token, the one after the last, and how many blocks of BLOCK_M queries it has, ``[B]``."""
    o_b = gl.arange(0, B, FLAT)
    m_b = o_b < num_chunks
    begins = gl.load(chunk_indptr_ptr + o_b, mask=m_b, other=0)
    ends = gl.load(chunk_indptr_ptr + o_b + 1, mask=m_b, other=0)
    return begins, ends, (ends - begins + BLOCK_M - 1) // BLOCK_M


@gluon.jit
def find_chunk(block, chunk_indptr_ptr, num_chunks, B: gl.constexpr, BLOCK_M: gl.constexpr, FLAT: gl.constexpr):
    """``find_chunk`` of triton_common."""
    begins, ends, blocks = blocks_of(chunk_indptr_ptr, num_chunks, B, BLOCK_M, FLAT)
    cumulative = gl.associative_scan(blocks, 0, add)
    o_b = gl.arange(0, B, FLAT)
    chunk = gl.sum(((o_b < num_chunks) & (cumulative <= block)).to(gl.int32), 0)
    own = o_b == chunk
    before = gl.sum(gl.where(own, cumulative - blocks, 0), 0)
    return chunk, block - before, gl.sum(gl.where(own, begins, 0), 0), gl.sum(gl.where(own, ends, 0), 0)


@gluon.jit
def tiles_of(
    first_query, length, num_packed, num_late, WINDOW: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """The first key of a block's band and the one after its last, and where each kind of its tiles ends: packed ones,
    late ones, those with keys that are out of some query's window, those with keys that every query sees (which ends
    before the kind ahead of it if some keys are neither), and those with keys that come after some query."""
    band = gl.maximum(first_query - WINDOW, 0)
    stop = gl.minimum(first_query + BLOCK_M, length)
    packed = gl.cdiv(num_packed, BLOCK_N)
    late = packed + gl.where(first_query < WINDOW, gl.cdiv(num_late, BLOCK_N), 0)
    total = late + gl.cdiv(stop - band, BLOCK_N)
    flagged = late + gl.cdiv(gl.maximum(first_query + BLOCK_M - 1 - WINDOW - band, 0), BLOCK_N)
    clear = late + (first_query + 1 - band) // BLOCK_N
    return band, stop, packed, late, gl.minimum(flagged, total), clear, total


@gluon.jit
def load_until(tile, lasts, o_n):
    """The last query that sees each key of a flagged tile: late keys, or the chunk's own."""
    packed, late, flagged, num_late, band, stop, p_late, p_until = lasts
    BLOCK_N: gl.constexpr = o_n.shape[0]
    is_late = tile < late
    o_k = (tile - gl.where(is_late, packed, late)) * BLOCK_N + gl.where(is_late, 0, band) + o_n
    end = gl.where(is_late, num_late, stop)
    m_n = (tile >= packed) & (tile < flagged) & (o_k < end)
    return gl.load(gl.where(is_late, p_late, p_until) + o_k, mask=m_n, other=-1)
