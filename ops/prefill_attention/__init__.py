"""Attention of a chunk of prompt tokens under the exact DMS mask."""

from __future__ import annotations

import torch

from fastdms.ops.chunk import check_chunk
from fastdms.ops.prefill_attention import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.span_cache import SpanCache, check, check_cache, check_queries

__all__ = ["prefill_attention"]


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decisions: torch.Tensor,
    cache: SpanCache,
    *,
    positions: torch.Tensor,
    rows: torch.Tensor,
    chunk_indptr: torch.Tensor,
    shift: int,
    sm_scale: float,
) -> torch.Tensor:
    """Attention of the chunk over what its rows hold and over the chunk itself; returns ``[T, Hq, D]`` in q's dtype.

    Key j is visible to query i >= j iff ``i - j <= W`` or j is not flagged. Call it **before** ``prefill_append`` of
    the same chunk: the append overwrites slots that some queries of the chunk still see.

    q: ``[T, Hq, D]``, k, v: ``[T, Hkv, D]``, decisions: ``[T, Hkv]`` bool, as ``prefill_rope`` gives them (v as
        projected). The chunk's own keys are read from k and v, unquantised.
    rows: ``[B]`` int32, distinct. chunk_indptr: ``[B + 1]`` int32 offsets of each row's tokens; those from
        ``chunk_indptr[B]`` on are padding and give zeros. positions: ``[T]`` int32, consecutive within a row and
        continuing what the row holds.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check_cache(cache)
    check_queries(q, positions, rows, cache.k_pages, cache.live_len)
    check_chunk(cache, k, v, decisions, positions, rows, chunk_indptr, shift)
    check(q.shape[0] == k.shape[0], f"q and k must have as many tokens, got {q.shape[0]} and {k.shape[0]}")
    out: torch.Tensor = torch.ops.fastdms.prefill_attention.default(
        q,
        k,
        v,
        decisions,
        positions,
        rows,
        chunk_indptr,
        *cache[:4],
        cache.page_table,
        cache.live_len,
        cache.ring,
        shift,
        sm_scale,
    )
    return out
