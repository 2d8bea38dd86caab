"""What both appends do to a token before it is stored: normalise, decide, zero the borrowed channel, rotate."""

from __future__ import annotations

import torch

from fastdms.ops.span_cache import check, check_heads, check_ints

__all__ = ["ZERO_MODES", "check_tokens", "decision_constants", "head_norm", "rope_and_decide", "rotate", "zero_mode"]

ZERO_MODES = ("none", "pre_rope", "pre_and_post_rope")


def decision_constants(alpha_scale: float, alpha_offset: float) -> tuple[float, float]:
    """``(multiplier, threshold)`` with ``alpha_scale * s - alpha_offset > 0  <=>  s * multiplier > threshold`` in fp32.

    Dividing by a positive scale, rather than multiplying ``s``, is what the published runtimes compare.
    """
    return (1.0, alpha_offset / alpha_scale) if alpha_scale > 0 else (alpha_scale, alpha_offset)


def zero_mode(zero_borrowed: str) -> int:
    """What the ops take: the index in ``ZERO_MODES``."""
    if zero_borrowed not in ZERO_MODES:
        raise ValueError(f"zero_borrowed must be one of {ZERO_MODES}, got {zero_borrowed!r}")
    return ZERO_MODES.index(zero_borrowed)


def check_tokens(
    q: torch.Tensor, k: torch.Tensor, *, alpha: torch.Tensor | None, q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
) -> None:  # fmt: skip
    """Refuse tokens that can't be rotated and decided about; shapes and dtypes only."""
    check_heads(q=q, k=k)
    check_ints(1, positions=positions)
    tokens, num_heads, head_dim = q.shape
    check(
        k.shape[0] == tokens and k.shape[2] == head_dim and num_heads % k.shape[1] == 0,
        f"q and k don't fit: tokens, heads and head_dim are {tuple(q.shape)} and {tuple(k.shape)}",
    )
    check(head_dim % 2 == 0, f"head_dim must be even, got {head_dim}")
    check(positions.shape[0] == tokens, f"positions must be [{tokens}], got {tuple(positions.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check(
            table.dtype == torch.float32 and table.shape[1:] == (head_dim // 2,) and table.is_contiguous(),
            f"{name} must be contiguous fp32 [N, {head_dim // 2}], got {table.dtype} {tuple(table.shape)}",
        )
    check(alpha is None or alpha.shape == k.shape[:2], f"alpha must be [{tokens}, {k.shape[1]}]")
    check((q_norm is None) == (k_norm is None), "q_norm and k_norm come together")
    for norm in (q_norm, k_norm):
        check(norm is None or (norm.shape == (head_dim,) and norm.is_contiguous()), f"norms must be [{head_dim}]")


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over each head: ``x [T, H, D]`` -> fp32; ``weight [D]`` or None for no norm at all."""
    x = x.float()
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split RoPE in fp32: ``x [T, H, D]``, ``cos, sin [T, D / 2]``; pair i is channels (i, i + D / 2)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rope_and_decide(
    q: torch.Tensor,
    k: torch.Tensor,
    alpha: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    norm_eps: float,
    decision_scale: float,
    decision_threshold: float,
    zero_borrowed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(q, k, decision)`` in fp32, fp32 and bool ``[T, Hkv]``; padding positions (-1) rotate as position 0."""
    num_kv_heads, head_dim = k.shape[1], k.shape[2]
    borrowed = slice(None, None, q.shape[1] // num_kv_heads)  # the first query head of each group
    q, k = head_norm(q, q_norm, norm_eps), head_norm(k, k_norm, norm_eps)
    decision_input = q[:, borrowed, head_dim - 1] if alpha is None else alpha.float()
    decision = decision_input * decision_scale > decision_threshold
    at = positions.clamp_min(0).long()
    cos, sin = cos[at], sin[at]
    if zero_borrowed:
        q = q.clone()
        q[:, borrowed, head_dim - 1] = 0.0
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if zero_borrowed == ZERO_MODES.index("pre_and_post_rope"):
        q[:, borrowed, head_dim - 1] = 0.0
    return q, k, decision
