"""Causal attention of a prompt chunk that forgets nothing."""

from __future__ import annotations

import torch

from fastdms.ops.dense_attention import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.dense_attention.choice import dense_kernel
from fastdms.ops.span_cache import check, check_heads

__all__ = ["dense_attention", "dense_kernel"]


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    k_history: torch.Tensor,
    v_history: torch.Tensor,
    start: int,
    sm_scale: float,
) -> torch.Tensor:
    """Store the chunk in the history and attend causally to all of it; returns ``[T, Hq, D]`` in q's dtype.

    One row's chunk: q ``[T, Hq, D]``, k, v ``[T, Hkv, D]`` after RoPE, at the positions from ``start`` on.
    k_history, v_history: ``[N, Hkv, D]`` in k's dtype, indexed by position, mutated in place; N >= start + T and
    everything before the chunk is already there. Which kernel it is on CUDA, ``dense_kernel`` says.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check_heads(q=q, k=k, v=v, k_history=k_history, v_history=v_history)
    check(
        k.shape == v.shape and q.shape[0] == k.shape[0],
        f"q, k, v don't fit: {tuple(q.shape)}, {tuple(k.shape)}",
    )
    check(
        q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0,
        f"heads don't fit: {tuple(q.shape)}, {tuple(k.shape)}",
    )
    check(k_history.shape == v_history.shape and k_history.shape[1:] == k.shape[1:], "history must be [N, Hkv, D]")
    check(k_history.dtype == k.dtype == v_history.dtype, f"history must be {k.dtype}, got {k_history.dtype}")
    check(k_history.is_contiguous() and v_history.is_contiguous(), "history must be contiguous")
    tokens, room = q.shape[0], k_history.shape[0]
    check(start >= 0 and start + tokens <= room, f"start must be in [0, {room} - {tokens}], got {start}")
    out: torch.Tensor = torch.ops.fastdms.dense_attention.default(q, k, v, k_history, v_history, start, sm_scale)
    return out
