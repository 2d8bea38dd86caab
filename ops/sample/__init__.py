"""Choose each row's next token from its logits, under penalties, temperature, top-k, top-p and min-p."""

from __future__ import annotations

import torch

from fastdms.ops.sample.counts import count_tokens
from fastdms.ops.sample.schema import NOT_FINITE  # defines the op

__all__ = ["NOT_FINITE", "count_tokens", "sample"]


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    end_ids: torch.Tensor,
    banned_until: torch.Tensor,
    penalties: torch.Tensor,
    count_rows: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B]`` int64 token ids from ``logits [B, V]`` fp32, and ``[B]`` bool, which of them end their rows.

    Row b depends on row b's inputs alone. Its token is ``NOT_FINITE`` if the largest of its logits, as they are given,
    is infinite, or one of them NaN; an arbitrary id is counted all the same, and may be said to end it.

    temperature: ``[B]`` fp32; 0 takes the largest logit (the lowest id among equals) and ignores the next four.
    top_k: ``[B]`` int32, 0 off: keeps logits >= the k-th largest. top_p: ``[B]`` fp32: of what is left, keeps token i
        iff the probability of all tokens more likely than i is below top_p. min_p: ``[B]`` fp32 in
        [0, 1]: keeps p_i >= min_p * max p, compared as logarithms: 1 keeps the largest logits alone, however hot.
        Equal logits are kept or dropped together, and the likeliest token always stays.
        A row whose largest logit becomes NaN or infinite by its penalties or bans gives an arbitrary id.
    seeds: ``[B]`` int64 >= 0. positions: ``[B]`` int32, the position the token will have. The choice is
        argmax(log p_i - log e_i) with exponential e_i from Philox4x32-10, keyed by the seed, at counter
        (i, position, 0, 0), so a request repeats itself whatever runs beside it.
    end_ids: ``[B, K]`` int32, -1 unused: can't be chosen while ``positions < banned_until`` (``[B]`` int32), and end
        the row once ``positions + 1 >= banned_until``.
    penalties: ``[B, 3]`` fp32, presence, frequency and repetition; before all else each logit x whose token occurs in
        the row becomes x > 0 ? x / repetition : x * repetition, less frequency * (times in the output) and, if it is
        there at all, presence. Repetition is > 0.
    count_rows: ``[B]`` int32: the row of ``counts`` that says what occurs, and in which the token is counted; -1: the
        entry has no penalties, or is padding, and touches no counts. No row may occur twice.
    counts: ``[R, V]`` int16, mutated; a row is what ``count_tokens`` makes.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    out: tuple[torch.Tensor, torch.Tensor] = torch.ops.fastdms.sample.default(
        logits, temperature, top_k, top_p, min_p, seeds, positions, end_ids, banned_until, penalties, count_rows, counts
    )
    return out
