"""Attention under the soft DMS mask, differentiable: what a model is trained with."""

from __future__ import annotations

import torch

from fastdms.ops.soft_attention import schema as _schema  # noqa: F401  (defines the ops)
from fastdms.ops.span_cache import check

__all__ = ["soft_attention"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


def soft_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_keep: torch.Tensor,
    *,
    window_tokens: int,
    sm_scale: float,
) -> torch.Tensor:
    """Causal attention in which a key outside the window fades by its own ``log_keep``.

    ``out = softmax(s) v`` with ``s[i, j] = sm_scale q[i] . k[j] + (log_keep[j] if i - j > window_tokens else 0)`` for
    j <= i (the training mask of arXiv 2506.05345): 0 keeps key j, -inf evicts it. Differentiable once in q, k, v and
    log_keep; where log_keep is -inf its gradient is 0. Results are bitwise the same each run.

    q: ``[B, Hq, T, D]``, k, v: ``[B, Hkv, T, D]``, all fp32, fp16 or bf16, D <= 256; any strides but a unit last one.
    log_keep: ``[B, Hkv, T]`` fp32, ``log(1 - alpha)``, at most 0.
    Returns ``[B, Hq, T, D]`` in q's dtype, laid out as ``[B, T, Hq, D]``: ``out.transpose(1, 2)`` is contiguous.
    Raises ValueError on shapes or dtypes that don't fit, and on a negative window.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(
            x.dim() == 4 and x.dtype in _DTYPES and x.stride(-1) == 1,
            f"{name} must be fp32, fp16 or bf16 [B, H, T, D] with unit last stride, got {x.dtype} {tuple(x.shape)}",
        )
    check(q.dtype == k.dtype == v.dtype, f"q, k, v must be of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, heads, tokens, head_dim = q.shape
    check(
        k.shape == v.shape and (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, head_dim),
        f"q, k, v don't fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
    )
    check(
        k.shape[1] > 0 and heads > 0 and heads % k.shape[1] == 0,
        f"{heads} query heads are no multiple of {k.shape[1]} KV heads",
    )
    check(1 <= head_dim <= _MAX_HEAD_DIM, f"head_dim must be 1..{_MAX_HEAD_DIM}, got {head_dim}")
    check(
        log_keep.dtype == torch.float32 and log_keep.shape == k.shape[:3],
        f"log_keep must be fp32 {tuple(k.shape[:3])}, got {log_keep.dtype} {tuple(log_keep.shape)}",
    )
    check(window_tokens >= 0, f"window_tokens must be at least 0, got {window_tokens}")
    out: torch.Tensor = torch.ops.fastdms.soft_attention.default(q, k, v, log_keep, window_tokens, sm_scale)[0]
    return out
