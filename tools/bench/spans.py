"""Compact caches of prescribed live lengths, without a model that fills them."""

from __future__ import annotations

import random

import torch

from fastdms.cache import CacheConfig, CompactCache
from fastdms.ops.quantise import quantise

__all__ = ["LONGEST", "filled_cache", "span_lengths"]

LONGEST = 8  # times the mean: the span that keeps all, beside others that keep what 8x compression leaves
_FILL_PAGES = 4096  # at a time, so that the fp32 numbers stay small beside the pool


def span_lengths(kind: str, num_spans: int, mean: int, *, least: int = 1, seed: int = 0) -> list[int]:
    """Live tokens of each span, ``num_spans * mean`` together as far as ``least`` allows, in random order.

    kind: ``"uniform"``; ``"zipf"``: the span of rank r has a share proportional to 1 / r; ``"one-keeps-all"``: one has
    8 times the mean, or with few spans what the others leave that keep an eighth of the mean, and they are all alike.
    Raises ValueError for another kind.
    """
    total = num_spans * mean
    if kind == "uniform":
        shares = [1.0 / num_spans] * num_spans
    elif kind == "zipf":
        harmonic = sum(1 / rank for rank in range(1, num_spans + 1))
        shares = [1 / rank / harmonic for rank in range(1, num_spans + 1)]
    elif kind == "one-keeps-all":
        rest = max(num_spans - LONGEST, (num_spans - 1) / LONGEST) / num_spans
        shares = [1 - rest] + [rest / max(1, num_spans - 1)] * (num_spans - 1)
    else:
        raise ValueError(f"spans must be uniform, zipf or one-keeps-all, got {kind!r}")
    lengths = [int(share * total) for share in shares]
    for rank in range(total - sum(lengths)):  # what rounding down left
        lengths[rank % num_spans] += 1
    random.Random(seed).shuffle(lengths)
    return [max(least, length) for length in lengths]


def filled_cache(
    lengths: torch.Tensor,
    *,
    head_dim: int,
    kv_dtype: torch.dtype,
    window_tokens: int,
    page_size: int,
    flagged_share: float,
    device: torch.device,
    seed: int = 0,
) -> tuple[CompactCache, torch.Tensor]:
    """A cache whose spans hold ``lengths [L, R, Hkv]`` (int64, CPU) random tokens, and how many each row has seen.

    The pages of a span lie anywhere in the pool, which has one more free page for each span. A row has seen as many
    tokens as its longest span holds, ``[R]`` int32; the ring says of each span's last W + 1 slots that they hold the
    last W + 1 tokens, of which a share of ``flagged_share`` is flagged.
    Raises ValueError where a span is shorter than its window.
    """
    seen = lengths.amax((0, 2))
    recent = seen.clamp_max(window_tokens + 1)
    if bool((lengths < recent[None, :, None]).any()):
        raise ValueError(f"a span holds at least the tokens of its window, {window_tokens + 1}, got {lengths.min()}")
    layers, rows, heads = lengths.shape
    held = -(-lengths // page_size)
    config = CacheConfig(
        num_layers=layers, num_rows=rows, num_kv_heads=heads, head_dim=head_dim, window_tokens=window_tokens,
        max_context=(int(held.max()) + 1) * page_size, kv_dtype=kv_dtype, num_pages=int(held.sum()) + held.numel(),
        page_size=page_size,
    )  # fmt: skip
    cache = CompactCache(config, device)
    generator = torch.Generator(device).manual_seed(seed)
    _fill_pages(cache, generator)
    order = torch.randperm(config.num_pages, generator=generator, device=device).int()
    taken, free = order[: int(held.sum())], order[int(held.sum()) :]
    slots = torch.arange(config.max_pages, device=device)
    cache.page_table[slots < held.to(device)[..., None]] = taken
    cache.free_pages[: free.numel()] = free
    cache.num_free.fill_(free.numel())
    cache.live_len.copy_(lengths)
    _fill_rings(cache, seen.to(device), flagged_share, generator)
    return cache, seen.int().to(device)


def _fill_pages(cache: CompactCache, generator: torch.Generator) -> None:
    for pages, scales in ((cache.k_pages, cache.k_scales), (cache.v_pages, cache.v_scales)):
        for at in range(0, pages.shape[0], _FILL_PAGES):
            part = slice(at, at + _FILL_PAGES)
            numbers = torch.randn(pages[part].shape, generator=generator, device=pages.device)
            data, scale = quantise(numbers, pages.dtype)
            pages[part] = data
            if scale is not None:
                scales[part] = scale


def _fill_rings(cache: CompactCache, seen: torch.Tensor, flagged_share: float, generator: torch.Generator) -> None:
    size = cache.config.window_tokens + 1
    place = torch.arange(size, device=seen.device)
    behind = (seen[:, None] - 1 - place) % size  # [R, W + 1]: how far each entry's token lies behind the newest
    slot = (cache.live_len[..., None] - 1 - behind[:, None]).clamp_min(0)  # below 0: no such token yet
    flagged = torch.rand(slot.shape, generator=generator, device=seen.device) < flagged_share
    cache.ring.copy_(slot << 1 | flagged.int())
