"""Grouped-query attention of one token per row over the row's spans."""

from __future__ import annotations

import torch

from fastdms.ops.decode_attention import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.span_cache import SpanCache, check_cache

__all__ = ["decode_attention"]


def decode_attention(
    q: torch.Tensor, cache: SpanCache, *, positions: torch.Tensor, rows: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """``softmax(sm_scale * q k^T) v`` over every live token of each row's span; returns ``[B, Hq, D]`` in q's dtype.

    q: ``[B, Hq, D]`` after RoPE. positions, rows: ``[B]`` int32; entries with position -1 (padding) and spans without
    tokens give zeros. Of each span only ``live_len`` slots count, whatever else its pages hold. On CUDA positions and
    rows must not be what the kernel launched just before writes: they are read before it is waited for.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    if not torch.compiler.is_compiling():  # the op has no use for ring and free pages
        check_cache(cache)
    out: torch.Tensor = torch.ops.fastdms.decode_attention.default(
        q, positions, rows, *cache[:4], cache.page_table, cache.live_len, sm_scale
    )
    return out
