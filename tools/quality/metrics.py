"""What two runs over the same tokens differ by: pure functions of logits and of live token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Steps", "Summary", "compare", "live_share_outside_window", "summarise"]

Floats = npt.NDArray[np.float64]

# Rows of fp64 logits at a time: 128 of a vocabulary of 128k take 128 MiB.
_CHUNK_ROWS = 128
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last serves for all above, on the safe side.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Steps(NamedTuple):
    """One sequence, step by step: arrays ``[N]``.

    kld: KL(off || on) of the next-token distribution, nats. match: whether both prefer the same token. nll_off,
    nll_on: negative log-likelihood of the token that followed, nats.
    """

    kld: Floats
    match: npt.NDArray[np.bool_]
    nll_off: Floats
    nll_on: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Over all steps of some sequences.

    steps: how many were compared. kld: mean, nats per token; kld_low, kld_high: its 95 % interval by the spread
    between sequences (Student's t), None for a single one; kld_max: the largest of a step. greedy_match: share of
    steps with the same most likely token. perplexity_change: on / off - 1.
    """

    steps: int
    kld: float
    kld_low: float | None
    kld_high: float | None
    kld_max: float
    greedy_match: float
    perplexity_off: float
    perplexity_on: float
    perplexity_change: float


def compare(off: torch.Tensor, on: torch.Tensor, targets: Sequence[int], device: torch.device | None = None) -> Steps:
    """off, on: logits ``[N, V]`` of the same steps without and with eviction; targets: the N tokens that followed.

    Computed in fp64 on ``device`` (None: where the logits are). Raises ValueError for logits that aren't finite.
    """
    if off.shape != on.shape or off.shape[0] != len(targets):
        raise ValueError(f"logits {tuple(off.shape)} and {tuple(on.shape)} for {len(targets)} targets")
    place = device or off.device
    wanted = torch.tensor(targets, dtype=torch.int64, device=place)[:, None]
    columns: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, len(targets), _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        log_p, log_q = (logits[rows].to(place).double().log_softmax(-1) for logits in (off, on))
        kld = (log_p.exp() * (log_p - log_q)).sum(-1)
        match = log_p.argmax(-1) == log_q.argmax(-1)
        nll_off, nll_on = (-log.gather(-1, wanted[rows])[:, 0] for log in (log_p, log_q))
        columns.append((kld, match, nll_off, nll_on))
    steps = Steps(*(torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)))
    if not np.isfinite(steps.kld).all():
        raise ValueError("the logits are not finite: the model's weights or its dtype can't carry this text")
    return steps


def summarise(sequences: Sequence[Steps]) -> Summary:
    """The figures over all steps of ``sequences``, at least one with at least one step."""
    kld, match, nll_off, nll_on = (
        np.concatenate([getattr(steps, name) for steps in sequences]) for name in ("kld", "match", "nll_off", "nll_on")
    )
    low, high = _interval(np.array([steps.kld.mean() for steps in sequences]))
    off, on = math.exp(nll_off.mean()), math.exp(nll_on.mean())
    return Summary(
        steps=len(kld),
        kld=float(kld.mean()),
        kld_low=low,
        kld_high=high,
        kld_max=float(kld.max()),
        greedy_match=float(match.mean()),
        perplexity_off=off,
        perplexity_on=on,
        perplexity_change=on / off - 1.0,
    )


def live_share_outside_window(live_tokens: npt.ArrayLike, num_tokens: int, window_tokens: int) -> Floats:
    """``(live - w) / (T - w)`` with ``w = window_tokens + 1``: the kept share of the tokens that could be evicted.

    live_tokens: ``[L, Hkv]``, of a row that has seen ``num_tokens`` T, more than w.
    """
    recent = window_tokens + 1
    return (np.asarray(live_tokens, np.float64) - recent) / (num_tokens - recent)


def _interval(means: Floats) -> tuple[float | None, float | None]:
    if len(means) < 2:
        return None, None
    quantile = _STUDENT_T[min(len(means) - 1, len(_STUDENT_T)) - 1]
    half = quantile * float(means.std(ddof=1)) / math.sqrt(len(means))
    return max(0.0, float(means.mean()) - half), float(means.mean()) + half
