"""The flash loop of prefill_attention on Hopper, in Gluon: keys come by TMA, and products run beside the softmax."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from fastdms.ops.gluon_common import barrier, registers
from fastdms.ops.prefill_attention.hopper_block_kernel import (
    FOREVER,
    described,
    fetch_tile,
    find_chunk,
    is_matrix,
    keys_of,
    lasts_of,
    load_plan,
    load_until,
    tiles_of,
)


@gluon.jit
def _fetch(tile, ends, first_rows, descs, ring, STAGES: gl.constexpr):
    """Start the copies of a tile's keys and values into the ring, where the tile STAGES before was."""
    packed, late, total, column = ends
    k_ring, v_ring, k_here, v_here = ring
    NUM_BYTES: gl.constexpr = k_ring.shape[1] * k_ring.shape[2] * 2
    stage = tile % STAGES
    mbarrier.expect(k_here.index(stage), NUM_BYTES, pred=tile < total)
    mbarrier.expect(v_here.index(stage), NUM_BYTES, pred=tile < total)
    barrier()  # no warp reads the old tile any more
    if tile < total:
        fetch_tile(
            tile, packed, late, first_rows, descs, column, k_here.index(stage), v_here.index(stage),
            k_ring.index(stage), v_ring.index(stage),
        )  # fmt: skip


@gluon.jit
def _wait(tile, total, here, STAGES: gl.constexpr):
    """Until a tile's keys, or its values, are there; not if it is past the last one."""
    mbarrier.wait(here.index(tile % STAGES), (tile // STAGES) & 1, pred=tile < total)


@gluon.jit
def _scores(tile, b_q, ring, X: gl.constexpr, STAGES: gl.constexpr):
    """Start q k^T of a tile; past the last one, of keys that nobody asks for."""
    b_k = ring[0].index(tile % STAGES)
    nothing = gl.full([b_q.shape[0], b_k.shape[0]], 0.0, gl.float32, X)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _softmax(b_x, b_max, b_sum, scale_log2):
    """Weights of the scores ``[R, N]``, the new maximum and sum, and what the old ones shrink by."""
    b_new = gl.maximum(b_max, gl.max(b_x, 1) * scale_log2)
    b_w = gl.exp2(b_x * scale_log2 - b_new[:, None])
    b_old = gl.exp2(b_max - b_new)
    return b_w, b_new, b_sum * b_old + gl.sum(b_w, 1), b_old


@gluon.jit
def _accumulate(tile, b_w, b_old, b_acc, ring, ACC: gl.constexpr, STAGES: gl.constexpr):
    """Start acc * old + w v."""
    b_v = ring[1].index(tile % STAGES)
    b_acc = b_acc * gl.convert_layout(b_old, gl.SliceLayout(1, ACC))[:, None]
    b_w = gl.convert_layout(b_w.to(b_v.dtype), gl.DotOperandLayout(0, ACC, 2))
    return warpgroup_mma(b_w, b_v, b_acc, is_async=True)


@gluon.jit(do_not_specialize=["num_chunks", "tokens"])
def _attend_hopper_kernel(
    q_ptr,
    chunk_indptr_ptr,
    plan_ptr,
    lists_ptr,
    kept_before_ptr,
    until_ptr,
    packed_k_desc,
    packed_v_desc,
    k_desc,
    v_desc,
    out_ptr,
    stride_q_token,
    stride_q_head,
    num_chunks,
    tokens,
    scale_log2,
    B: gl.constexpr,
    HKV: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What ``_attend_kernel`` does; packed tiles and their tail come first, then late ones, then the band's in order.

    While a tile's weights are computed, the tensor cores have the values of the tile before.
    """
    gl.static_assert(STAGES >= 3)  # what is waited for has been fetched
    DTYPE: gl.constexpr = packed_k_desc.dtype
    SHARED: gl.constexpr = packed_k_desc.layout
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, X)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, X)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])

    i_h = gl.program_id(1)
    pid = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest first
    if DEPENDENT:
        gdc_wait()
    i_b, block, begin, end = find_chunk(pid, chunk_indptr_ptr, num_chunks, B, BLOCK_M, FLAT)
    if i_b == num_chunks:  # the tokens after the last row's: padding
        begin = gl.load(chunk_indptr_ptr + num_chunks)
        end = tokens
    first_query = block * BLOCK_M  # counted from the chunk's beginning, like all queries and keys below
    o_r = gl.arange(0, BLOCK_R, gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))[None, :]
    token = (begin + first_query + o_r // G).to(gl.int64)
    m_q = ((o_r < BLOCK_M * G) & (token < end))[:, None]
    head = i_h * G + o_r % G
    p_out = out_ptr + (token * HKV * G + head)[:, None] * D + o_d
    if i_b == num_chunks:
        gl.store(p_out, gl.zeros([BLOCK_R, D], DTYPE, WIDE), mask=m_q)
    else:
        p_q = q_ptr + (token * stride_q_token + head.to(gl.int64) * stride_q_head)[:, None] + o_d
        b_queries = gl.load(p_q, mask=m_q, other=0.0)  # on their way while the plan is read
        base, num_old, num_late, num_packed = load_plan(
            plan_ptr, kept_before_ptr, i_b, i_h, begin, first_query, tokens, HKV, WINDOW
        )
        band, stop, packed, late, flagged, clear, total = tiles_of(
            first_query, end - begin, num_packed, num_late, WINDOW, BLOCK_M, BLOCK_N
        )
        clear = gl.maximum(clear, flagged)
        whole = num_packed // BLOCK_N
        ends = (packed, late, total, i_h * D)
        first_rows = (base, base + num_old + end - begin, begin + band)
        descs = (packed_k_desc, packed_v_desc, k_desc, v_desc)

        k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
        v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
        k_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        ring = (k_ring, v_ring, k_here, v_here)
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_here.index(stage), count=1)
            mbarrier.init(v_here.index(stage), count=1)
        fence_async_shared()
        for tile in range(0, STAGES - 1):
            _fetch(tile, ends, first_rows, descs, ring, STAGES)
        b_q = gl.allocate_shared_memory(DTYPE, [BLOCK_R, D], SHARED)
        b_q.store(b_queries)
        fence_async_shared()
        barrier()

        b_max = gl.full([BLOCK_R], -1.0e30, gl.float32, ROWS)
        b_sum = gl.full([BLOCK_R], 0.0, gl.float32, ROWS)
        b_acc = gl.zeros([BLOCK_R, D], gl.float32, ACC)
        _wait(0, total, k_here, STAGES)
        b_x = warpgroup_mma_wait(0, [_scores(0, b_q, ring, X, STAGES)])

        # Of tokens in the ring and of the chunk's own: the last query that sees them, loaded a tile ahead.
        o_n = gl.arange(0, BLOCK_N, FLAT)
        lasts = lasts_of(
            lists_ptr, until_ptr, i_b, i_h, begin, tokens, packed, late, flagged, num_late, band, stop, HKV, WINDOW
        )  # fmt: skip
        b_until = load_until(whole, lasts, o_n)

        b_acc = warpgroup_mma_init(b_acc)
        for tile in range(0, whole):
            _wait(tile + 1, total, k_here, STAGES)
            _wait(tile, total, v_here, STAGES)
            b_w, b_max, b_sum, b_old = _softmax(b_x, b_max, b_sum, scale_log2)
            b_acc = warpgroup_mma_wait(0, [b_acc])
            b_next = _scores(tile + 1, b_q, ring, X, STAGES)
            b_acc = _accumulate(tile, b_w, b_old, b_acc, ring, ACC, STAGES)
            _fetch(tile + STAGES - 1, ends, first_rows, descs, ring, STAGES)
            b_x = warpgroup_mma_wait(1, [b_next])

        query = first_query + gl.arange(0, BLOCK_R, ROWS) // G
        for tile in range(whole, total):
            _wait(tile + 1, total, k_here, STAGES)
            _wait(tile, total, v_here, STAGES)
            first, num_keys = keys_of(tile, packed, late, num_packed, num_late, end - begin - band, BLOCK_N)
            b_ahead = load_until(tile + 1, lasts, o_n)
            if (tile < flagged) | (tile >= clear):
                # A key is visible if its row's number is no more than its column's: the query and the last one that
                # sees the key, or, both negative, the query and the key.
                b_column = b_until
                if (tile < packed) | (tile >= flagged):
                    b_column = gl.where(tile < packed, gl.where(o_n < num_keys, FOREVER, -1), -(first + band + o_n))
                b_column = gl.convert_layout(b_column, COLUMNS)
                b_row = gl.where(tile < flagged, query, -query)
                b_x = gl.where(b_row[:, None] <= b_column[None, :], b_x, float("-inf"))
                if WINDOW < BLOCK_M + BLOCK_N:  # keys out of some query's window may come after another
                    b_from = gl.where(tile < late, -1, first + band) + gl.arange(0, BLOCK_N, COLUMNS)
                    b_row = gl.where(tile < late, FOREVER, query)
                    b_x = gl.where(b_from[None, :] <= b_row[:, None], b_x, float("-inf"))
            b_until = b_ahead
            b_w, b_max, b_sum, b_old = _softmax(b_x, b_max, b_sum, scale_log2)
            b_acc = warpgroup_mma_wait(0, [b_acc])
            # Rows after these keys are someone else's or nobody's, and a weight of zero leaves a NaN.
            if num_keys < BLOCK_N:
                b_v = v_ring.index(tile % STAGES)
                m_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, WIDE)) < num_keys
                b_values = b_v.load(WIDE)
                b_v.store(gl.where(m_n[:, None], b_values, gl.zeros_like(b_values)))
                fence_async_shared()
                barrier()
            b_next = _scores(tile + 1, b_q, ring, X, STAGES)
            b_acc = _accumulate(tile, b_w, b_old, b_acc, ring, ACC, STAGES)
            _fetch(tile + STAGES - 1, ends, first_rows, descs, ring, STAGES)
            b_x = warpgroup_mma_wait(1, [b_next])
        b_acc = warpgroup_mma_wait(0, [b_acc])
        b_out = b_acc / gl.convert_layout(b_sum, gl.SliceLayout(1, ACC))[:, None]
        b_q.store(b_out.to(DTYPE))
        gl.store(p_out, b_q.load(WIDE), mask=m_q)


class Tile(NamedTuple):
    """rows: queries times grouped heads; keys; stages: tiles in the ring; programs: on a multiprocessor at once, which
    the registers are shared among."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    programs: int


def hopper_tile(head_dim: int) -> Tile:
    """What measured best (``docs/lab-notes.md``)."""
    if head_dim == 64:
        return Tile(rows=128, keys=64, num_warps=4, stages=4, programs=2)
    return Tile(rows=128, keys=64, num_warps=8, stages=4, programs=1)


def is_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether shapes and strides fit; k and v in the type of the product."""
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    if k.dtype.itemsize != 2 or head_dim not in (64, 128) or group > hopper_tile(head_dim).rows:
        return False
    return all(is_matrix(x) for x in (k, v))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_indptr: torch.Tensor, plan: torch.Tensor,
    lists: torch.Tensor, kept_before: torch.Tensor, until: torch.Tensor, packed_k: torch.Tensor,
    packed_v: torch.Tensor, out: torch.Tensor, num_chunks: int, scale_log2: float, **shared: int,
) -> None:  # fmt: skip
    """What ``_attend_kernel`` does, of inputs that ``is_supported``.

    shared: B, HKV and WINDOW of it, and what ``dependent_launch`` gives.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group, tile = num_heads // num_kv_heads, hopper_tile(head_dim)
    block_m = tile.rows // group
    _attend_hopper_kernel[(triton.cdiv(tokens, block_m) + num_chunks, num_kv_heads)](
        q, chunk_indptr, plan, lists, kept_before, until,
        *(described(x, tile.keys, head_dim) for x in (packed_k, packed_v, k, v)), out, *q.stride()[:2], num_chunks,
        tokens, scale_log2, G=group, D=head_dim, BLOCK_M=block_m, BLOCK_R=tile.rows, BLOCK_N=tile.keys,
        STAGES=tile.stages, num_warps=tile.num_warps, **shared,
        maxnreg=registers(tile.num_warps, tile.programs),
    )  # fmt: skip
