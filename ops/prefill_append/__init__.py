"""Pack a chunk's survivors into pages."""

from __future__ import annotations

import torch

from fastdms.ops.chunk import check_chunk
from fastdms.ops.prefill_append import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.span_cache import SpanCache, check_cache

__all__ = ["prefill_append"]


def prefill_append(
    k: torch.Tensor,
    v: torch.Tensor,
    decisions: torch.Tensor,
    cache: SpanCache,
    *,
    positions: torch.Tensor,
    rows: torch.Tensor,
    chunk_indptr: torch.Tensor,
    shift: int,
) -> None:
    """Leave each row's spans as if its chunk had been appended token by token (slot order may differ).

    Arguments as in ``prefill_attention``, to be called **after** it for the same chunk. Mutates the cache in place:
    slots of flagged tokens that leave the window go to the chunk's survivors, which fill them all: at most
    ``min(n, W + 1)`` leave, and the chunk's last ``min(n, W + 1)`` tokens always survive. A span that needs more
    pages than are free is left as it was and its row marked starved; rows already starved are left alone.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check_cache(cache)
    check_chunk(cache, k, v, decisions, positions, rows, chunk_indptr, shift)
    torch.ops.fastdms.prefill_append.default(k, v, decisions, positions, rows, chunk_indptr, *cache, shift)
