"""The flash loop of prefill_attention on Hopper by warps that each do one thing: one fetches, twelve multiply.

One program on each multiprocessor goes from block to block, the longest first. Its fetching warp runs ahead, so that a
block's first tiles are there when the last block's are done, and while one consumer computes weights the others have
the matrix units.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from fastdms.ops.chunk import has_specialised_warps
from fastdms.ops.gluon_common import barrier, load_tile, reinterpret
from fastdms.ops.prefill_attention.consumer_kernel import NOTES, ROWS, consume, note, phase_of, stage_of
from fastdms.ops.prefill_attention.hopper_block_kernel import (
    blocks_of,
    described,
    fetch_tile,
    find_chunk,
    is_matrix,
    load_plan,
    tiles_of,
)


class Ring(NamedTuple):
    """keys: of a tile; stages: tiles in the ring, a power of two."""

    keys: int
    stages: int


# What measured best (docs/lab-notes.md): more keys at a time where many are seen by all queries.
_RING, _WIDE_RING = Ring(keys=64, stages=8), Ring(keys=128, stages=4)
_CONSUMERS = gl.constexpr(3)
_REGISTERS = gl.constexpr(160)  # of a consumer's thread; with 152, ptxas has each product waited for at once
_FEW_REGISTERS = gl.constexpr(24)


@gluon.jit
def _turn(i, pid, num_programs):
    """Programs take blocks in turns, there and back, so that none always gets the longest."""
    return gl.where((i & 1) == 1, num_programs - 1 - pid, pid)


@gluon.jit
def _produce(
    given, rings, descs, tables, B: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, WINDOW: gl.constexpr,
    STAGES: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Fetch queries, keys and values of the program's blocks, and note down what the consumers need to know of each.

    q_parts: ``[2 * CONSUMERS * G, ROWS / G, D]``, what the consumers take for their rows, head by head.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    chunk_indptr_ptr, plan_ptr, kept_before_ptr = tables
    pid, num_programs, num_blocks, num_chunks, tokens, start, q_desc, q_parts = given
    k_ring, v_ring, notes, q_here, q_free, here, free = rings
    QUERIES: gl.constexpr = ROWS // G
    BLOCK_M: gl.constexpr = QUERIES * _CONSUMERS
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    n = 0
    for i in range(0, note(notes, NOTES - 1, FLAT)):
        at = i * num_programs + _turn(i, pid, num_programs)
        i_h = at % HKV
        block = num_blocks - 1 - at // HKV
        if DENSE:
            i_b, begin, end = 0, -start, tokens
            base, num_old, num_late, num_packed = 0, 0, 0, 0
            first_query = start + block * BLOCK_M
        else:
            i_b, block, begin, end = find_chunk(block, chunk_indptr_ptr, num_chunks, B, BLOCK_M, FLAT)
            first_query = block * BLOCK_M
            base, num_old, num_late, num_packed = load_plan(
                plan_ptr, kept_before_ptr, i_b, i_h, begin, first_query, tokens, HKV, WINDOW
            )
        band, _, packed, late, _, _, total = tiles_of(
            first_query, end - begin, num_packed, num_late, WINDOW, BLOCK_M, BLOCK_N
        )
        slot = i & 1
        mbarrier.wait(q_free.index(slot), ((i >> 1) & 1) ^ 1)
        noted = (begin, end, first_query, num_packed, num_late, i_b, i_h)
        for k in gl.static_range(len(noted)):
            notes.index(slot * NOTES + k).store(gl.full([1], noted[k], gl.int32, FLAT))
        fence_async_shared()
        barrier()
        mbarrier.expect(q_here.index(slot), BLOCK_M * G * D * 2)
        for part in gl.static_range(_CONSUMERS):
            row = gl.minimum(begin + first_query + part * QUERIES, tokens - 1)
            for g in gl.static_range(G):
                q_part = q_parts.index((slot * _CONSUMERS + part) * G + g)
                load_tile(q_desc, [row, (i_h * G + g) * D], q_here.index(slot), q_part)
        rows = (base, base + num_old + end - begin, begin + start + band)
        for tile in range(0, total):
            stage = stage_of(n, STAGES)
            mbarrier.wait(free.index(stage), phase_of(n, STAGES) ^ 1)
            mbarrier.expect(here.index(stage), 4 * BLOCK_N * D)
            fetch_tile(
                tile, packed, late, rows, descs, i_h * D, here.index(stage), here.index(stage), k_ring.index(stage),
                v_ring.index(stage),
            )  # fmt: skip
            n += 1


@gluon.jit(do_not_specialize=["num_chunks", "tokens", "start"])
def _specialised_kernel(
    chunk_indptr_ptr, plan_ptr, lists_ptr, kept_before_ptr, until_ptr, q_desc, packed_k_desc, packed_v_desc, k_desc,
    v_desc, out_ptr, num_chunks, tokens, start, scale_log2, B: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr, DENSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What ``_attend_kernel`` does, tiles in the order of ``_attend_hopper_kernel``.

    DENSE: of one chunk whose keys begin ``start`` tokens before it, and a window that is never left; what is counted
    from the chunk's beginning otherwise is from there. Nothing is packed, and nothing given by pointers.
    """
    gl.static_assert(STAGES & (STAGES - 1) == 0)
    DTYPE: gl.constexpr = k_desc.dtype
    SHARED: gl.constexpr = k_desc.layout
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    QUERIES: gl.constexpr = ROWS // G
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    pid = gl.program_id(0)
    num_programs = gl.num_programs(0)
    if DEPENDENT:
        gdc_wait()
    if DENSE:
        num_blocks = gl.cdiv(tokens, QUERIES * _CONSUMERS)
    else:
        _, _, blocks = blocks_of(chunk_indptr_ptr, num_chunks, B, QUERIES * _CONSUMERS, FLAT)
        num_blocks = gl.sum(blocks, 0)
    rounds = num_blocks * HKV // num_programs
    left = num_blocks * HKV - rounds * num_programs
    mine = rounds + gl.where(_turn(rounds, pid, num_programs) < left, 1, 0)

    if not DENSE:  # the tokens after the last row's are padding
        last = gl.load(chunk_indptr_ptr + num_chunks)
        o_r = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
        o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))[None, :]
        for first in range(pid * ROWS, (tokens - last) * (HKV * G), num_programs * ROWS):
            p_out = out_ptr + last.to(gl.int64) * (HKV * G * D) + (first + o_r).to(gl.int64)[:, None] * D + o_d
            m_r = (first + o_r < (tokens - last) * (HKV * G))[:, None]
            gl.store(p_out, gl.zeros([ROWS, D], DTYPE, WIDE), mask=m_r)

    q_parts = gl.allocate_shared_memory(DTYPE, [2 * _CONSUMERS * G, QUERIES, D], q_desc.layout)
    q_rows = reinterpret(q_parts, DTYPE, [2 * _CONSUMERS, ROWS, D], SHARED)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
    notes = gl.allocate_shared_memory(gl.int32, [2 * NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_here = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_here.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=_CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(here.index(stage), count=1)
        mbarrier.init(free.index(stage), count=_CONSUMERS)
    notes.index(NOTES - 1).store(gl.full([1], mine, gl.int32, FLAT))
    fence_async_shared()
    barrier()
    rings = (k_ring, v_ring, notes, q_here, q_free, here, free)
    consumed = (tokens, scale_log2, lists_ptr, until_ptr, out_ptr, q_rows)
    fetched = (pid, num_programs, num_blocks, num_chunks, tokens, start, q_desc, q_parts)
    descs = (packed_k_desc, packed_v_desc, k_desc, v_desc)
    tables = (chunk_indptr_ptr, plan_ptr, kept_before_ptr)
    gl.warp_specialize(
        [
            (consume, (consumed, rings, 0, HKV, G, WINDOW, _CONSUMERS, STAGES, DENSE)),
            (consume, (consumed, rings, 1, HKV, G, WINDOW, _CONSUMERS, STAGES, DENSE)),
            (consume, (consumed, rings, 2, HKV, G, WINDOW, _CONSUMERS, STAGES, DENSE)),
            (_produce, (fetched, rings, descs, tables, B, HKV, G, WINDOW, STAGES, DENSE)),
        ],
        [4, 4, 1],
        [_REGISTERS, _REGISTERS, _FEW_REGISTERS],
    )


def is_supported(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether shapes and strides fit, of what ``hopper_kernel`` supports."""
    _, num_heads, head_dim = q.shape
    return q.dtype == k.dtype and has_specialised_warps(q.dtype, head_dim, num_heads // k.shape[1]) and is_matrix(q)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_indptr: torch.Tensor, plan: torch.Tensor,
    lists: torch.Tensor, kept_before: torch.Tensor, until: torch.Tensor, packed_k: torch.Tensor,
    packed_v: torch.Tensor, out: torch.Tensor, num_chunks: int, scale_log2: float, **shared: int,
) -> None:  # fmt: skip
    """As that of ``hopper_kernel``."""
    given = (chunk_indptr, plan, lists, kept_before, until)
    keys_and_values = (packed_k, packed_v, k, v)
    _launch(given, q, keys_and_values, out, num_chunks, 0, scale_log2, _RING, DENSE=False, **shared)


def attend_densely(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, out: torch.Tensor, scale_log2: float
) -> None:
    """Causal attention of the chunk ``q [T, Hq, D]`` to all keys ``[start + T, Hkv, D]``; each ``is_matrix``."""
    shared = {"B": 1, "HKV": k.shape[1], "WINDOW": 2**30, "DEPENDENT": False}
    _launch((None,) * 5, q, (k, v, k, v), out, 1, start, scale_log2, _WIDE_RING, DENSE=True, **shared)


def _launch(
    given: tuple[torch.Tensor | None, ...], q: torch.Tensor, keys_and_values: tuple[torch.Tensor, ...],
    out: torch.Tensor, num_chunks: int, start: int, scale_log2: float, ring: Ring, **constants: int,
) -> None:  # fmt: skip
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = constants["HKV"]
    queries = ROWS.value // (num_heads // num_kv_heads)
    most = (triton.cdiv(tokens, queries * _CONSUMERS.value) + num_chunks) * num_kv_heads
    _specialised_kernel[(min(_num_processors(q.device), most),)](
        *given, described(q, queries, head_dim), *(described(x, ring.keys, head_dim) for x in keys_and_values), out,
        num_chunks, tokens, start, scale_log2, G=num_heads // num_kv_heads, STAGES=ring.stages, num_warps=4,
        **constants,
    )  # fmt: skip


def _num_processors(device: torch.device) -> int:
    """Multiprocessors; an emulated device has few, so that its programs have several blocks."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
