"""Decision, zeroing and RoPE of a chunk of prompt tokens."""

from __future__ import annotations

import torch

from fastdms.ops.prefill_rope import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.rope_decide import check_tokens, zero_mode

__all__ = ["prefill_rope"]


def prefill_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    decision: tuple[float, float],
    zero_borrowed: str,
    alpha: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated ``q [T, Hq, D]`` and ``k [T, Hkv, D]`` in their dtypes, and the decisions ``[T, Hkv]`` bool.

    The arguments are those of ``decode_append``; ``decisions[t]`` is what token t decides, about itself or, with
    shift 1, about token t - 1. Padding (position -1) rotates as position 0 and is meaningless.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check_tokens(q, k, alpha=alpha, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin, positions=positions)
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.fastdms.prefill_rope.default(
        q, k, alpha, q_norm, k_norm, cos, sin, positions, norm_eps, *decision, zero_mode(zero_borrowed)
    )
    return out
