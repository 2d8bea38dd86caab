"""Append one token to every row of a decode batch."""

from __future__ import annotations

import torch

from fastdms.ops.decode_append import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.rope_decide import zero_mode
from fastdms.ops.span_cache import SpanCache

__all__ = ["decode_append"]


def decode_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: SpanCache,
    *,
    positions: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    decision: tuple[float, float],
    shift: int,
    zero_borrowed: str,
    alpha: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
) -> torch.Tensor:
    """Decide, rotate, quantise and store one token per row; returns the rotated queries, ``[B, Hq, D]`` in q's dtype.

    q: ``[B, Hq, D]``, k, v: ``[B, Hkv, D]``, any float dtype, unit last stride (views of one fused projection are
        welcome). q_norm, k_norm: ``[D]`` RMSNorm weights applied to each head first (Qwen3), or None.
    positions: ``[B]`` int32, the token's position in its row; -1 marks padding, for which nothing is touched.
    rows: ``[B]`` int32, distinct rows of the cache. cos, sin: ``[max_positions, D / 2]`` fp32.
    alpha: ``[B, Hkv]`` decision inputs of an adapter; None takes them from the borrowed query channel.
    decision: ``(multiplier, threshold)`` of ``rope_decide.decision_constants``; threshold inf turns eviction off.

    On CUDA positions, rows, cos, sin and norms must not be what the kernel launched just before writes: they are read
    before it is waited for.

    Mutates the cache in place. The token that leaves the window (``t - W - 1``) gives its slot to the new one if it
    is flagged; otherwise the span grows by one, popping a page where one begins. Without a free page the span stays
    as it was and ``starved[row]`` becomes 1; rows already starved are left alone.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    out: torch.Tensor = torch.ops.fastdms.decode_append.default(
        q,
        k,
        v,
        alpha,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        rows,
        *cache,
        norm_eps,
        *decision,
        shift,
        zero_mode(zero_borrowed),
    )
    return out
