"""What the prefill ops share: the checks of a ragged chunk, and what its decisions mean for each token."""

from __future__ import annotations

import torch

from fastdms.ops.span_cache import SpanCache, check, check_heads, check_ints

__all__ = ["check_chunk", "has_specialised_warps", "positive_scale", "token_flags", "window_flags"]


def check_chunk(
    cache: SpanCache, k: torch.Tensor, v: torch.Tensor, decisions: torch.Tensor, positions: torch.Tensor,
    rows: torch.Tensor, chunk_indptr: torch.Tensor, shift: int,
) -> None:  # fmt: skip
    """Refuse chunks that don't fit the cache; shapes and dtypes only."""
    check_heads(k=k, v=v)
    check_ints(1, positions=positions, rows=rows, chunk_indptr=chunk_indptr)
    tokens, heads = k.shape[0], cache.live_len.shape[1]
    check(
        k.shape == v.shape and k.shape[1:] == (heads, cache.k_pages.shape[2]),
        f"k and v must be [T, {heads}, {cache.k_pages.shape[2]}], got {tuple(k.shape)} and {tuple(v.shape)}",
    )
    check(decisions.dtype == torch.bool and decisions.shape == (tokens, heads), "decisions must be bool [T, Hkv]")
    check(positions.shape[0] == tokens, f"positions must be [{tokens}], got {tuple(positions.shape)}")
    check(chunk_indptr.shape[0] == rows.shape[0] + 1, f"chunk_indptr must be [B + 1], got {tuple(chunk_indptr.shape)}")
    check(shift in (0, 1), f"shift must be 0 or 1, got {shift!r}")


def has_specialised_warps(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether prefill's loop of specialised warps on Hopper takes such heads: their queries come in eights of rows."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim == 64 and group in (1, 2, 4, 8)


def positive_scale(q: torch.Tensor, sm_scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a normal positive scale of the same scores, for kernels that take maxima before they scale."""
    if abs(sm_scale) < torch.finfo(torch.float32).tiny:
        return torch.zeros_like(q), 1.0
    return (-q, -sm_scale) if sm_scale < 0 else (q, sm_scale)


def token_flags(decisions: torch.Tensor, shift: int) -> torch.Tensor:
    """Whether each token of one row's chunk is flagged; ``[n, Hkv]`` bool.

    With shift 1 the last token's flag is still open: it counts as kept, which no query of the chunk can notice.
    """
    if not shift:
        return decisions
    return torch.cat((decisions[1:], torch.zeros_like(decisions[:1])))


def window_flags(ring: torch.Tensor, decisions: torch.Tensor, start: int, shift: int) -> tuple[torch.Tensor, ...]:
    """The tokens in one span's ring before a chunk that starts at position ``start``: ``(positions, slots, flags)``.

    ring: ``[W + 1]`` int32 of one head; decisions: ``[n]`` bool of that head (with shift 1 the first one completes the
    flag of token ``start - 1``). Each result is ``[min(start, W + 1)]``, in order of position.
    """
    size = ring.shape[0]
    positions = torch.arange(max(0, start - size), start, device=ring.device)
    entries = ring[positions % size]
    flags = entries & 1 == 1
    if shift and start > 0:
        flags[-1] = decisions[0]
    return positions, (entries >> 1).long(), flags
