"""What must hold of the cache after an append or a release, given the reference's result on a pool that never ends."""

from __future__ import annotations

import torch

from fastdms.ops import SpanCache
from fastdms.ops.quantise import FP8_MAX
from fastdms.tools.fuzz.budget import FP32_ROUNDING, WrongAnswer, rounding_band
from fastdms.tools.fuzz.calls import same_bytes
from fastdms.tools.fuzz.state import Snapshot, span_contents

__all__ = ["check_append", "check_release"]

Tokens = tuple[torch.Tensor, torch.Tensor]  # keys and values of all spans


def check_append(
    op: str, layer: int, before: Snapshot, after: Snapshot, granted: SpanCache, touched: torch.Tensor, key_slack: float
) -> None:
    """Each touched span took all that it was given, or, its row being starved for a reason, nothing; else WrongAnswer.

    Which spans go without when pages run out is left open. granted: the layer after the reference appended to a copy
    of ``before`` with pages enough. touched: ``[R]`` bool, rows of the batch. key_slack: what arithmetic in fp32 may
    change in new keys besides one step of the stored dtype; negative if they are stored as given.
    """
    after.check_owners(op)
    _check_unchanged(op, layer, before, after)
    mine, old = after.layer(layer), before.layer(layer)
    new, given, kept = span_contents(mine), span_contents(granted), span_contents(old)
    took = _same_ints(mine, granted) & _same_tokens(new, given, kept, before.k_pages.dtype, key_slack)
    idle = _same_ints(mine, old) & _same_tokens(new, kept, kept, before.k_pages.dtype, -1.0)
    _fail(op, ~(took | idle), "the span holds neither what it held nor what it was given", granted, mine)
    starved, was = mine.starved != 0, before.starved != 0
    _fail(op, (mine.starved != 0) & (mine.starved != 1), "starved is neither 0 nor 1", granted, mine)
    _fail(op, was & ~starved, "an append took the mark of a starved row away", granted, mine)
    _fail(op, starved & ~was & ~touched, "a row that was given nothing starved", granted, mine)
    _fail(op, ~took & ~starved[:, None], "tokens were dropped and the row was not marked as starved", granted, mine)
    pages = -(-granted.live_len // before.page_size) - before.pages_held[layer]
    short = (~took & (pages > mine.num_free)).any(1) | (granted.starved != 0)
    _fail(op, starved & ~was & ~short, "a row starved while there were pages for it", granted, mine)


def check_release(before: Snapshot, after: Snapshot, rows: torch.Tensor, expected: SpanCache) -> None:
    """expected: the reference's ``live_len [L, R, Hkv]``, ``num_free``, ``starved`` and ``free_pages``."""
    op = "release"
    for name in ("k_pages", "v_pages", "k_scales", "v_scales", "page_table", "ring"):
        if not same_bytes(getattr(before, name), getattr(after, name)):
            raise WrongAnswer(op, f"{name} was written to")
    for name in ("live_len", "num_free", "starved"):
        if not torch.equal(getattr(after, name), getattr(expected, name)):
            raise WrongAnswer(op, f"{name} is wrong after the release of rows {rows.tolist()}")
    free = int(after.num_free)
    if not torch.equal(after.free_pages[:free].sort().values, expected.free_pages[:free].sort().values):
        raise WrongAnswer(op, "the free stack does not hold the pages that were free or given back")
    if not torch.equal(after.free_pages[free:], before.free_pages[free:]):
        raise WrongAnswer(op, "the free stack was written to above its top")
    after.check_owners(op)


def _check_unchanged(op: str, layer: int, before: Snapshot, after: Snapshot) -> None:
    if not torch.equal(before.free_pages, after.free_pages):
        raise WrongAnswer(op, "an append wrote to the free stack")
    others = [i for i in range(before.live_len.shape[0]) if i != layer]
    for name in ("page_table", "live_len", "ring"):
        if not torch.equal(getattr(before, name)[others], getattr(after, name)[others]):
            raise WrongAnswer(op, f"{name} of another layer was written to")
    kept = before.is_held | ~after.is_held
    if not torch.equal(before.page_table[kept], after.page_table[kept]):
        raise WrongAnswer(op, "a page table changed where the span did not grow")
    unwritten = ~after.is_written
    for name in ("k_pages", "v_pages", "k_scales", "v_scales"):
        old, new = getattr(before, name), getattr(after, name)
        if new.numel() and not same_bytes(_raw(old)[unwritten], _raw(new)[unwritten]):
            raise WrongAnswer(op, f"{name}: a slot that holds no token was written to")


def _raw(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x  # indexing does not know fp8


def _same_ints(a: SpanCache, b: SpanCache) -> torch.Tensor:
    """``[R, Hkv]`` bool."""
    return (a.live_len == b.live_len) & (a.ring == b.ring).all(-1)


def _same_tokens(mine: Tokens, other: Tokens, old: Tokens, dtype: torch.dtype, key_slack: float) -> torch.Tensor:
    """``[R, Hkv]`` bool: all tokens are the other's, but that keys unlike ``old``'s may be a step of dtype off."""
    longest = max(mine[0].shape[2], other[0].shape[2], old[0].shape[2])
    keys, values, other_keys, other_values, old_keys = (
        torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[2])) for x in (*mine, *other, old[0])
    )
    same = (keys == other_keys).all(-1)  # [R, Hkv, longest]
    if key_slack >= 0:
        moved = ~same & ~(other_keys == old_keys).all(-1)
        same[moved] = _within_a_step(keys[moved], other_keys[moved], dtype, key_slack)
    return (same & (values == other_values).all(-1)).all(-1)


def _within_a_step(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, slack: float) -> torch.Tensor:
    """Which rows of ``[n, D]`` agree, ``[n]`` bool."""
    largest = torch.maximum(a.abs(), b.abs()).double()
    unit = torch.ones_like(largest[:, :1])
    if dtype == torch.float8_e4m3fn:  # a token's scale may be off by one rounding of bf16, too
        unit = largest.amax(-1, keepdim=True).clamp_min(1e-300) / FP8_MAX * (1 + torch.finfo(torch.bfloat16).eps)
    step = 2 * rounding_band(largest / unit, dtype) * unit
    return ((a.double() - b.double()).abs() <= step + slack * FP32_ROUNDING).all(-1)


def _fail(op: str, bad: torch.Tensor, message: str, granted: SpanCache, mine: SpanCache) -> None:
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        place = ", ".join(f"{name} {index}" for name, index in zip(("row", "KV head"), at, strict=False))
        lengths = f"live {mine.live_len[tuple(at)].tolist()}, reference {granted.live_len[tuple(at)].tolist()}"
        raise WrongAnswer(op, f"{int(bad.sum())} of {bad.numel()} spans or rows: {message}; first {place}, {lengths}")
