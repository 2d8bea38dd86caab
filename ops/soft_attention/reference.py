"""The definition of soft_attention and its derivative in plain PyTorch: fp32, or fp64 where the inputs are."""

from __future__ import annotations

import torch

from fastdms.ops.soft_attention.schema import empty_token_major


def soft_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor, window_tokens: int, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    score = _score(q, k, log_keep, window_tokens, sm_scale)
    lse = torch.logsumexp(score, -1)
    out = torch.exp(score - lse[..., None]) @ _wide(v)[:, :, None]
    return empty_token_major(q).copy_(out.flatten(1, 2)), lse.flatten(1, 2)


def soft_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_keep: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_tokens: int,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = k.shape[1]
    d_out, delta = _grouped(grad_out, heads), (_wide(grad_out) * _wide(out)).sum(-1)
    p = torch.exp(_score(q, k, log_keep, window_tokens, sm_scale) - _grouped(lse, heads)[..., None])
    d_score = p * (d_out @ _wide(v)[:, :, None].mT - _grouped(delta, heads)[..., None])
    d_q = ((sm_scale * d_score) @ _wide(k)[:, :, None]).flatten(1, 2)
    d_k = ((sm_scale * d_score.mT) @ _grouped(q, heads)).sum(2)
    d_v = (p.mT @ d_out).sum(2)
    d_log_keep = torch.where(_distance(q) > window_tokens, d_score, 0.0).sum((2, 3))
    return (
        empty_token_major(q).copy_(d_q),
        empty_token_major(k).copy_(d_k),
        empty_token_major(v).copy_(d_v),
        d_log_keep.to(log_keep.dtype),
    )


def _score(
    q: torch.Tensor, k: torch.Tensor, log_keep: torch.Tensor, window_tokens: int, sm_scale: float
) -> torch.Tensor:
    """``[B, Hkv, G, T, T]``: queries, then keys."""
    distance = _distance(q)
    score = (sm_scale * _grouped(q, k.shape[1])) @ _wide(k)[:, :, None].mT
    score = score + torch.where(distance > window_tokens, log_keep[:, :, None, None, :], 0.0)
    return score.masked_fill(distance < 0, -torch.inf)


def _distance(q: torch.Tensor) -> torch.Tensor:
    """How far key j lies behind query i, ``[T, T]``."""
    positions = torch.arange(q.shape[2], device=q.device)
    return positions[:, None] - positions


def _grouped(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[B, Hq, T, ...]`` as ``[B, Hkv, G, T, ...]``, at least fp32."""
    return _wide(x).reshape(x.shape[0], num_kv_heads, x.shape[1] // num_kv_heads, *x.shape[2:])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
