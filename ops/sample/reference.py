"""The definition of sample in plain PyTorch."""

from __future__ import annotations

import math

import torch

from fastdms.ops.sample.counts import MOST_COUNTED
from fastdms.ops.sample.schema import NOT_FINITE

_MASK = 0xFFFFFFFF
LARGEST_UNIFORM = 1.0 - 2.0**-24  # fp32 rounds the largest words up to 1, and -log(1 - 1) would rule a token out


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) 32 bits of a * b for 32-bit values held in int64, which can't hold the product itself."""
    low_product = a * (b & 0xFFFF)
    high_product = a * (b >> 16)
    middle = high_product + (low_product >> 16)
    return middle >> 16, ((middle << 16) | (low_product & 0xFFFF)) & _MASK


def philox(seed: torch.Tensor, counter: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """First word of Philox4x32-10 (Salmon et al., SC 2011) at counter (counter, position, 0, 0), as int64."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter, (position & _MASK) + torch.zeros_like(counter)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """Exponential variates, fp32, of 32 random bits: -log(1 - u), by its series where u is small."""
    u = ((bits.double() * 2.0**-32).float() + 2.0**-33).clamp_max(LARGEST_UNIFORM)
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return torch.where(u < 2.0**-6, small, -torch.log1p(-u))


def keep_mask(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens of one row stay; ``scaled [V]`` fp32 has its maximum at 0."""
    ordered = scaled.sort(descending=True).values
    if 0 < top_k < ordered.numel():
        ordered = ordered[: int((scaled >= ordered[top_k - 1]).sum())]
    threshold = ordered[-1]
    if top_p < 1.0:
        p = ordered.softmax(0)
        threshold = ordered[(p.cumsum(0) - p < top_p).nonzero()[-1, 0]]
    keep = scaled >= threshold
    if min_p > 0.0:
        keep &= scaled >= math.log(min_p)  # probabilities would round to equal ones where the temperature is high
    return keep


def penalised(x: torch.Tensor, counts: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
    """One row's logits ``[V]`` under its presence, frequency and repetition penalty."""
    presence, frequency, repetition = penalties.unbind()
    times = counts & MOST_COUNTED
    x = torch.where(counts != 0, torch.where(x > 0.0, x / repetition, x * repetition), x)
    return x - (frequency * times + presence * (times > 0))


def sample(
    logits: torch.Tensor,
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
    tokens = logits.new_zeros(logits.shape[0], dtype=torch.int64)
    drawn = (temperature > 0.0).nonzero().flatten()
    ids = torch.arange(logits.shape[1], device=logits.device)
    noise = exponential(philox(seeds[drawn, None], ids, positions[drawn, None].long())).log()
    noise_of = dict(zip(drawn.tolist(), noise, strict=True))
    for b, count_row in enumerate(count_rows.tolist()):
        x = logits[b]
        if count_row >= 0:
            x = penalised(x, counts[count_row], penalties[b])
        if bool(positions[b] < banned_until[b]):
            banned = end_ids[b][end_ids[b] >= 0].long()
            x = x.index_fill(0, banned, float("-inf"))
        largest = x.max()
        if b in noise_of and bool(largest.isfinite()):
            scaled = (x - largest) / temperature[b]
            keep = keep_mask(scaled, int(top_k[b]), float(top_p[b]), float(min_p[b]))
            x = (scaled - noise_of[b]).masked_fill(~keep, float("-inf"))
        tokens[b] = x.argmax()
        if count_row >= 0:
            count = counts[count_row, int(tokens[b])]
            count += (count & MOST_COUNTED) < MOST_COUNTED
    ends = (tokens[:, None] == end_ids).any(1) & (positions + 1 >= banned_until)
    return torch.where(logits.amax(-1).isfinite(), tokens, NOT_FINITE), ends  # amax hands NaN on
