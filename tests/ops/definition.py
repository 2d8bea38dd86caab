"""What the ops must do, written down once more in fp64 and plain loops, independently of their references."""

from __future__ import annotations

import math

import torch


def prepare_token(
    q: torch.Tensor,
    k: torch.Tensor,
    alpha: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    norm_eps: float,
    angles: tuple[torch.Tensor, torch.Tensor],
    decision: tuple[float, float],
    zero_borrowed: str,
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """One token, fp64: q ``[Hq, D]``, k ``[Hkv, D]``, angles (cos, sin) ``[D / 2]`` -> rotated q, k, decisions."""
    group = q.shape[0] // k.shape[0]
    q_norm, k_norm = norms or (None, None)
    queries, keys = [_rms_norm(x, q_norm, norm_eps) for x in q], [_rms_norm(x, k_norm, norm_eps) for x in k]
    decisions = []
    for head in range(k.shape[0]):
        borrowed = queries[head * group]
        strength = float(borrowed[-1]) if alpha is None else float(alpha[head])
        decisions.append(strength * decision[0] > decision[1])
        if zero_borrowed != "none":
            borrowed[-1] = 0.0
    queries, keys = [_rope(x, *angles) for x in queries], [_rope(x, *angles) for x in keys]
    if zero_borrowed == "pre_and_post_rope":
        for head in range(k.shape[0]):
            queries[head * group][-1] = 0.0
    return torch.stack(queries), torch.stack(keys), decisions


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x.clone()
    return x / math.sqrt(float((x * x).sum()) / x.shape[0] + eps) * weight


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[0] // 2
    out = torch.empty_like(x)
    out[:half] = x[:half] * cos - x[half:] * sin
    out[half:] = x[half:] * cos + x[:half] * sin
    return out


def attend(queries: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Softmax attention of fp64 queries ``[G, D]`` over the same keys; no keys give zeros."""
    if not keys:
        return torch.zeros_like(queries)
    weights = torch.softmax(queries @ torch.stack(keys).T * scale, 1)
    return weights @ torch.stack(values)


class Token:
    """key, value: ``[D]`` fp64 as given. ``as_stored``: as the cache holds them, once they have been read back."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, flagged: bool) -> None:
        self.key, self.value, self.flagged = key, value, flagged
        self.as_stored = (key, value)


class History:
    """Everything that one (row, KV head) was ever given, and what of it has to be there."""

    def __init__(self, window: int, shift: int) -> None:
        self.window, self.shift = window, shift
        self.tokens: list[Token] = []
        self.stored_at: dict[int, int] = {}  # position -> slot, as last read back

    def append(self, key: torch.Tensor, value: torch.Tensor, decision: bool) -> None:
        """The next token; ``decision`` flags it or, with shift 1, the one before it."""
        if self.shift and self.tokens:
            self.tokens[-1].flagged = decision
        self.tokens.append(Token(key, value, decision and not self.shift))

    def visible(self, query: int) -> list[int]:
        """Positions that the query at position ``query`` sees."""
        return [j for j in range(query + 1) if query - j <= self.window or not self.tokens[j].flagged]

    def stored(self) -> list[int]:
        """Positions that the span holds now: those which its newest token sees."""
        return self.visible(len(self.tokens) - 1)

    def recent(self) -> list[int]:
        """Positions that the ring holds."""
        return list(range(max(0, len(self.tokens) - self.window - 1), len(self.tokens)))

    def keys(self) -> torch.Tensor:
        """``[n, D]`` as given."""
        return torch.stack([token.key for token in self.tokens])

    def values(self) -> torch.Tensor:
        """``[n, D]`` as given."""
        return torch.stack([token.value for token in self.tokens])
