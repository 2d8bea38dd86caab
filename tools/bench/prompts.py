"""Inputs of the ops that work on a prompt: its last chunk, over a cache that holds what is kept of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastdms.cache import CacheConfig, CompactCache
from fastdms.ops import KV_DTYPES, prefill_append
from fastdms.tools.bench.spec import DTYPE, Case, Spec
from fastdms.tools.bench.timing import cold_sets

__all__ = ["build_prompt"]

_HISTORY_CHUNK = 8192


def build_prompt(spec: Spec, device: torch.device, num_sets: int | None, generator: torch.Generator) -> Case:
    """Random q, k and v of the chunk; each token is flagged with probability ``1 - spec.kept``."""
    if spec.op == "soft_attention":  # which trains on whole sequences
        spec = replace(spec, chunk=0)
    start, tokens, heads, dim = spec.start, spec.length - spec.start, spec.kv_heads, spec.head_dim
    flags = torch.rand((spec.length, heads), generator=generator, device=device) >= spec.kept
    num_bytes = _moved_bytes(spec, flags)
    dense_pairs = heads * (spec.length * (spec.length + 1) - start * (start + 1)) // 2
    pairs = dense_pairs if spec.op == "dense_attention" else _visible_pairs(spec, flags)
    layers = num_sets or cold_sets(num_bytes, device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    cache = None
    if spec.op.startswith("prefill"):
        cache = _empty_cache(spec, layers, device)
        for layer in range(layers):
            for at in range(0, start, _HISTORY_CHUNK):
                piece = _chunk(at, min(start, at + _HISTORY_CHUNK), flags)
                k, v = (normal(piece["positions"].numel(), heads, dim) for _ in "kv")
                prefill_append(k, v, cache=cache.layer(layer), **piece, shift=0)
    chunk = _chunk(start, spec.length, flags)
    sets: list[dict[str, torch.Tensor]] = []
    for _ in range(layers):
        q, k, v = normal(tokens, heads * spec.group, dim), normal(tokens, heads, dim), normal(tokens, heads, dim)
        if spec.op == "prefill_attention":
            sets.append({"q": q, "k": k, "v": v, **chunk})
        elif spec.op == "prefill_append":
            sets.append({"k": k, "v": v, **chunk})
        elif spec.op == "dense_attention":
            history = {f"{name}_history": normal(spec.length, heads, dim) for name in "kv"}
            sets.append({"q": q, "k": k, "v": v, **history})
        else:
            # Evicted keys are gone, kept ones untouched: the hard mask as a case of the soft one.
            log_keep = torch.where(flags, -torch.inf, 0.0).T[None].contiguous()
            one = {name: x.transpose(0, 1)[None] for name, x in (("q", q), ("k", k), ("v", v))}
            sets.append({**one, "log_keep": log_keep})
    attends = spec.op.endswith("attention")
    return Case(
        spec=spec,
        sets=sets,
        cache=cache,
        num_bytes=num_bytes,
        flops=4 * dim * spec.group * pairs if attends else None,
        dense_flops=4 * dim * spec.group * dense_pairs if attends else None,
        kept=None if spec.op == "dense_attention" else 1 - float(flags.float().mean()),
    )


def _chunk(start: int, end: int, flags: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a chunk of row 0; with shift 0 a token's decision is its flag."""
    ints: dict[str, Any] = {"dtype": torch.int32, "device": flags.device}
    return {
        "positions": torch.arange(start, end, **ints),
        "rows": torch.zeros(1, **ints),
        "chunk_indptr": torch.tensor([0, end - start], **ints),
        "decisions": flags[start:end].contiguous(),
    }


def _empty_cache(spec: Spec, layers: int, device: torch.device) -> CompactCache:
    stores = spec.op == "prefill_append" or spec.start > 0
    pages = -(-spec.length // spec.page_size) if stores else 1
    config = CacheConfig(
        num_layers=layers, num_rows=1, num_kv_heads=spec.kv_heads, head_dim=spec.head_dim,
        window_tokens=spec.window_tokens, max_context=spec.length, kv_dtype=KV_DTYPES[spec.kv_dtype],
        num_pages=layers * spec.kv_heads * pages, page_size=spec.page_size,
    )  # fmt: skip
    return CompactCache(config, device)


def _moved_bytes(spec: Spec, flags: torch.Tensor) -> int:
    start, tokens = spec.start, spec.length - spec.start
    token_bytes = spec.head_dim * DTYPE.itemsize
    kv = 2 * tokens * spec.kv_heads * token_bytes
    if spec.op == "prefill_append":
        survivors = _survivors(spec, flags, spec.length, start)
        recent = min(start, spec.window_tokens + 1) + min(tokens, spec.window_tokens + 1)  # ring entries, read, written
        bookkeeping = tokens * spec.kv_heads + spec.kv_heads * 4 * (recent + 1) + 4 * -(-survivors // spec.page_size)
        return survivors * (2 * token_bytes + spec.stored_bytes) + bookkeeping
    q_and_out = 2 * tokens * spec.kv_heads * spec.group * token_bytes
    if spec.op == "dense_attention":
        return q_and_out + 2 * kv + 2 * spec.length * spec.kv_heads * token_bytes  # read, stored; the history is read
    if spec.op == "soft_attention":
        return q_and_out + kv + 4 * flags.numel()
    held = _survivors(spec, flags, start, 0)
    return q_and_out + kv + tokens * spec.kv_heads + held * spec.stored_bytes + 4 * -(-held // spec.page_size)


def _survivors(spec: Spec, flags: torch.Tensor, seen: int, first: int) -> int:
    """Tokens from ``first`` on that the spans hold once ``seen`` tokens have been appended."""
    position = torch.arange(first, seen, device=flags.device)[:, None]
    return int((~flags[first:seen] | (position >= seen - spec.window_tokens - 1)).sum())


def _visible_pairs(spec: Spec, flags: torch.Tensor) -> int:
    """Pairs of the chunk's queries and all keys under the mask, of all KV heads."""
    key, end = torch.arange(spec.length, device=flags.device)[:, None], spec.length - 1
    last = torch.where(flags, (key + spec.window_tokens).clamp_max(end), end)
    return int((last - key.clamp_min(spec.start) + 1).clamp_min(0).sum())
