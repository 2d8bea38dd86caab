"""Triton backend of prefill_attention: pack what the chunk's queries see of each span, then attend to it.

The cost follows the keys that are kept, not the prompt squared: a block of queries visits the packed keys before its
window and the window itself. On Hopper, 16-bit products of head dims 64 and 128 have loops of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdms.ops.chunk import positive_scale
from fastdms.ops.prefill_attention.attend_kernel import _attend_kernel
from fastdms.ops.prefill_attention.pack_kernel import _pack_kernel, _plan_kernel
from fastdms.ops.triton_common import LOG2_E, dependent_launch, dot_dtype, element_strides, on_hopper

_TILE = 64  # tokens or slots that a program packs at a time
_RING_TILE = 1024  # tokens of the window that a program plans at a time
_PACK_PROGRAMS = 2048  # that share the spans' slots, or one for each span if there are more
_WORKSPACE_BYTES = 2**30  # a call whose rows could need more takes them in turns


class Tile(NamedTuple):
    """rows: queries times grouped heads; keys; tma: whether whole tiles of packed keys come by tensor descriptor."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    tma: bool = False


def attend_tile(group: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a product in ``dtype``; of nothing else, so that a result doesn't hang on what is computed beside it.

    Small in fp32, which is unrolled into multiply-adds.
    """
    rows = max(32 if dtype == torch.float32 else 128, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(rows, 32, 4, 2) if head_dim <= 64 else Tile(rows, 16, 8, 1)
    if head_dim <= 64:
        return Tile(rows, 64, 4, 3, tma=True)
    if head_dim <= 128:
        return Tile(rows, 64, 8, 3, tma=True)
    return Tile(rows, 32, 8, 2)


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decisions: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    chunk_indptr: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    ring: torch.Tensor,
    shift: int,
    sm_scale: float,
) -> torch.Tensor:
    tokens, _, head_dim = q.shape
    num_kv_heads, num_chunks = k.shape[1], rows.shape[0]
    if tokens == 0 or num_chunks == 0:
        return q.new_zeros(q.shape)
    out = q.new_empty(q.shape)
    q, sm_scale = positive_scale(q, sm_scale)
    dtype = torch.float32 if dot_dtype(q.dtype, k_pages.dtype) == tl.float32 else q.dtype
    k, v, flags = k.to(dtype), v.to(dtype), decisions.contiguous().view(torch.int8)
    # The lengths are the device's to know, so make room for the longest: as many rows of the cache at a time as fit.
    row_slots = num_kv_heads * page_table.shape[-1] * k_pages.shape[1]
    num_rows = min(num_chunks, max(1, _WORKSPACE_BYTES // (row_slots * 2 * head_dim * dtype.itemsize)))
    packed_slots = min(num_rows * row_slots, k_pages.shape[0] * k_pages.shape[1]) + tokens * num_kv_heads
    packed_k, packed_v = (torch.empty((packed_slots, head_dim), dtype=dtype, device=q.device) for _ in "kv")
    for first in range(0, num_chunks, num_rows):
        last = min(first + num_rows, num_chunks)
        _attend_rows(
            q, k, v, flags, positions, rows[first:last], chunk_indptr[first : last + 1], k_pages, v_pages, k_scales,
            v_scales, page_table, live_len, ring, packed_k, packed_v, out, shift, sm_scale,
        )  # fmt: skip
    return out


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flags: torch.Tensor, positions: torch.Tensor,
    rows: torch.Tensor, chunk_indptr: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    k_scales: torch.Tensor, v_scales: torch.Tensor, page_table: torch.Tensor, live_len: torch.Tensor,
    ring: torch.Tensor, packed_k: torch.Tensor, packed_v: torch.Tensor, out: torch.Tensor, shift: int, sm_scale: float,
) -> None:  # fmt: skip
    """Outputs of these rows' tokens; those after them become zeros."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, num_chunks = k.shape[1], k_pages.shape[1], rows.shape[0]
    group, max_pages, window = num_heads // num_kv_heads, page_table.shape[-1], ring.shape[-1] - 1
    num_tiles = triton.cdiv(tokens, _TILE) + num_chunks
    parts = min(triton.cdiv(max_pages * page_size, _TILE), triton.cdiv(_PACK_PROGRAMS, num_chunks * num_kv_heads))

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=q.device)

    counts, kept_before, until = ints(num_kv_heads, num_tiles), ints(num_kv_heads, tokens), ints(num_kv_heads, tokens)
    plan, lists = ints(num_chunks, num_kv_heads, 4), ints(num_chunks, num_kv_heads, 5, window + 1)
    block_d = max(16, triton.next_power_of_2(head_dim))
    shared = {"B": triton.next_power_of_2(num_chunks + 1), "HKV": num_kv_heads, "WINDOW": window}
    sizes = {"SHIFT": shift, "TILE": _TILE}
    block_w = min(_RING_TILE, triton.next_power_of_2(window + 1))
    dependent = dependent_launch(q.device)
    _plan_kernel[(num_tiles, num_kv_heads)](
        flags, positions, rows, chunk_indptr, live_len, ring, counts, plan, lists, num_chunks,
        BLOCK_H=triton.next_power_of_2(num_kv_heads), BLOCK_W=block_w, **shared, **sizes, **dependent,
    )  # fmt: skip
    _pack_kernel[(num_tiles + num_chunks * parts, num_kv_heads)](
        k, v, flags, rows, chunk_indptr, k_pages, v_pages, k_scales, v_scales, page_table, counts, plan, lists,
        packed_k, packed_v, kept_before, until, *element_strides(k, v), num_chunks, tokens, num_tiles, parts, max_pages,
        D=head_dim, BLOCK_D=block_d, PAGE=page_size, BLOCK_W=min(32, block_w),
        HAS_SCALES=k_scales.numel() > 0, **shared, **sizes, **dependent,
    )  # fmt: skip
    if on_hopper(q.device):
        from fastdms.ops.prefill_attention import hopper_kernel, specialised_kernel  # Gluon only where it is used

        if hopper_kernel.is_supported(q, k, v):
            loop = specialised_kernel if specialised_kernel.is_supported(q, k) else hopper_kernel
            loop.attend(
                q, k, v, chunk_indptr, plan, lists, kept_before, until, packed_k, packed_v, out, num_chunks,
                sm_scale * LOG2_E, **shared, **dependent,
            )  # fmt: skip
            return
    tile = attend_tile(group, head_dim, packed_k.dtype)
    block_m = tile.rows // group
    tma = tile.tma and head_dim * packed_k.element_size() % 16 == 0
    described = [
        TensorDescriptor.from_tensor(packed, [tile.keys, block_d]) if tma else packed for packed in (packed_k, packed_v)
    ]
    _attend_kernel[(triton.cdiv(tokens, block_m) + num_chunks, num_kv_heads)](
        q, k, v, chunk_indptr, plan, lists, kept_before, until, packed_k, packed_v, *described, out,
        *element_strides(q, k, v), num_chunks, tokens, sm_scale * LOG2_E,
        G=group, D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_R=tile.rows, BLOCK_N=tile.keys, TMA=tma,
        **shared, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
