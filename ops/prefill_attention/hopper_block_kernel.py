"""What both loops of prefill_attention on Hopper know of a block of queries: whose it is, and which keys it meets."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdms.ops.gluon_common import add, load_tile
from fastdms.ops.prefill_attention.pack_kernel import FOREVER

__all__ = [
    "FOREVER",
    "blocks_of",
    "described",
    "fetch_tile",
    "find_chunk",
    "is_matrix",
    "keys_of",
    "lasts_of",
    "load_plan",
    "load_until",
    "tiles_of",
]  # fmt: skip


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
def load_plan(
    plan_ptr, kept_before_ptr, i_b, i_h, begin, first_query, tokens, HKV: gl.constexpr, WINDOW: gl.constexpr
):  # fmt: skip
    """Where a span's packed keys begin, how many of them are older than the chunk, how many keys are late, and how many
    packed ones a block meets, those of the chunk that left its window among them."""
    plan = plan_ptr + (i_b * HKV + i_h) * 4
    base, num_old, num_late = gl.load(plan), gl.load(plan + 1), gl.load(plan + 2)
    first_key = begin + gl.maximum(first_query - WINDOW, 0)
    return base, num_old, num_late, num_old + gl.load(kept_before_ptr + i_h.to(gl.int64) * tokens + first_key)


@gluon.jit
def fetch_tile(tile, packed, late, rows, descs, column, k_here, v_here, b_k, b_v):
    """Start the copies of a tile's keys and values. rows: where packed keys begin, late ones, and the block's band."""
    packed_k_desc, packed_v_desc, k_desc, v_desc = descs
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    if tile < late:
        row = gl.where(tile < packed, rows[0] + tile * BLOCK_N, rows[1] + (tile - packed) * BLOCK_N)
        load_tile(packed_k_desc, [row, 0], k_here, b_k)
        load_tile(packed_v_desc, [row, 0], v_here, b_v)
    else:
        row = rows[2] + (tile - late) * BLOCK_N
        load_tile(k_desc, [row, column], k_here, b_k)
        load_tile(v_desc, [row, column], v_here, b_v)


@gluon.jit
def keys_of(tile, packed, late, num_packed, num_late, num_own, BLOCK_N: gl.constexpr):
    """A tile's first key, counted among those of its kind, and how many of them there are from it on. num_own: keys of
    the chunk from the band's first on."""
    first = (tile - gl.where(tile < packed, 0, gl.where(tile < late, packed, late))) * BLOCK_N
    return first, gl.where(tile < packed, num_packed, gl.where(tile < late, num_late, num_own)) - first


@gluon.jit
def lasts_of(
    lists_ptr, until_ptr, i_b, i_h, begin, tokens, packed, late, flagged, num_late, band, stop, HKV: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """What ``load_until`` takes: of tokens in the ring and of the chunk's own the last query that sees them."""
    p_late = lists_ptr + (i_b * HKV + i_h).to(gl.int64) * (5 * (WINDOW + 1)) + (WINDOW + 1)
    return packed, late, flagged, num_late, band, stop, p_late, until_ptr + i_h.to(gl.int64) * tokens + begin


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


def is_matrix(x: torch.Tensor) -> bool:
    """Whether the tokens of ``[T, heads, D]`` are rows that TMA can read, of all heads."""
    _, heads, head_dim = x.shape
    is_row = x.stride(2) == 1 and (heads == 1 or x.stride(1) == head_dim) and x.stride(0) >= heads * head_dim
    return is_row and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def described(x: torch.Tensor, rows: int, head_dim: int) -> TensorDescriptor:
    """``[T, heads, D]`` that ``is_matrix``, or packed ``[T, D]``, for copies of ``rows`` tokens of one head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [x.shape[0], x.shape[1:].numel()], [x.stride(0), 1], [rows, head_dim], layout)
