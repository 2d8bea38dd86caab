"""What is launched: inputs of each op in any size, with the bytes and operations of one launch counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastdms import ops
from fastdms.cache import CompactCache
from fastdms.ops import KV_DTYPES
from fastdms.tools.bench.linears import build_dequantise, build_linear, linear_options
from fastdms.tools.bench.prompts import build_prompt
from fastdms.tools.bench.spans import filled_cache, span_lengths
from fastdms.tools.bench.spec import DTYPE, Case, Spec
from fastdms.tools.bench.timing import cold_sets

__all__ = ["STATE", "build", "launch", "restorer"]

STATE = ("page_table", "live_len", "ring", "free_pages", "num_free", "starved")
_RELEASE_LAYERS = 16
_NEVER = (1.0, float("inf"))


def build(spec: Spec, device: torch.device, *, num_sets: int | None = None, seed: int = 0) -> Case:
    """Random inputs on ``device``; ``num_sets``: None takes as many as keep L2 cold."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    builders = {
        "decode_attention": _decode_attention, "decode_append": _decode_append, "decode_layer": _decode_layer,
        "release": _release,
    }  # fmt: skip
    if spec.op in builders:
        return builders[spec.op](spec, device, num_sets, normal, seed)
    if spec.op == "decode_linear":
        return build_linear(spec, device, num_sets, normal)
    if spec.op == "dequantise":
        return build_dequantise(spec, device, num_sets, normal)
    return build_prompt(spec, device, num_sets, generator)


def launch(spec: Spec, tensors: dict[str, torch.Tensor], cache: CompactCache | None, index: int) -> Any:
    """Run the op once, on input set ``tensors`` and the cache's layer ``index``; of decode_layer both."""
    if spec.op == "decode_layer":
        q = launch(replace(spec, op="decode_append"), tensors, cache, index)
        batch = {name: tensors[name] for name in ("positions", "rows")}
        return launch(replace(spec, op="decode_attention"), {"q": q, **batch}, cache, index)
    op = getattr(ops, spec.op)
    if spec.op == "release":
        assert cache is not None
        state = {name: getattr(cache, name) for name in STATE if name != "ring"}
        return op(**tensors, **state, page_size=spec.page_size)
    options: dict[str, Any] = {} if cache is None else {"cache": cache.layer(index)}
    if spec.op.endswith("attention"):
        options["sm_scale"] = spec.sm_scale
    if spec.op in ("decode_append", "prefill_append", "prefill_attention"):
        options["shift"] = 0
    if spec.op == "decode_append":
        options |= {"decision": _NEVER, "zero_borrowed": "none"}
    if spec.op == "decode_linear":
        options |= linear_options(spec)
    if spec.op == "dequantise":
        options["dtype"] = DTYPE
    if spec.op == "dense_attention":
        options["start"] = spec.start
    if spec.op == "soft_attention":
        options["window_tokens"] = spec.window_tokens
    return op(**tensors, **options)


def restorer(cache: CompactCache | None) -> Callable[[], None]:
    """A function that puts the cache's bookkeeping back to what it is now; the pages' contents don't matter."""
    if cache is None:
        return lambda: None
    saved = [(getattr(cache, name), getattr(cache, name).clone()) for name in STATE]

    def restore() -> None:
        for tensor, before in saved:
            tensor.copy_(before)

    return restore


Normal = Callable[..., torch.Tensor]


def _lengths(spec: Spec, layers: int, least: int, seed: int) -> torch.Tensor:
    spans = spec.rows * spec.kv_heads
    all_layers = [span_lengths(spec.spans, spans, spec.live, least=least, seed=seed + layer) for layer in range(layers)]
    return torch.tensor(all_layers).view(layers, spec.rows, spec.kv_heads)


def _cache(spec: Spec, lengths: torch.Tensor, device: torch.device, seed: int) -> tuple[CompactCache, torch.Tensor]:
    return filled_cache(
        lengths, head_dim=spec.head_dim, kv_dtype=KV_DTYPES[spec.kv_dtype], window_tokens=spec.window_tokens,
        page_size=spec.page_size, flagged_share=1 - spec.kept, device=device, seed=seed,
    )  # fmt: skip


def _decode_attention(spec: Spec, device: torch.device, num_sets: int | None, normal: Normal, seed: int) -> Case:
    spec = replace(spec, window_tokens=0)  # the op reads no ring, and short spans needn't fill a window
    heads = spec.kv_heads * spec.group
    num_bytes = _attended_bytes(spec, _lengths(spec, 1, 1, seed))
    layers = num_sets or cold_sets(num_bytes, device)
    lengths = _lengths(spec, layers, 1, seed)
    cache, positions = _cache(spec, lengths, device, seed)
    rows = torch.arange(spec.rows, dtype=torch.int32, device=device)
    sets = [{"q": normal(spec.rows, heads, spec.head_dim), "positions": positions, "rows": rows} for _ in range(layers)]
    return Case(spec=spec, sets=sets, cache=cache, num_bytes=num_bytes, longest=int(lengths.max()))


def _decode_append(spec: Spec, device: torch.device, num_sets: int | None, normal: Normal, seed: int) -> Case:
    num_bytes = _appended_bytes(spec)
    layers = num_sets or cold_sets(num_bytes, device)
    # The cost hangs on no length: the window, and some more, so that tokens fall anywhere in a page.
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, spec.rows, spec.kv_heads)
    lengths = spec.window_tokens + 1 + torch.randint(0, 2 * spec.page_size, shape, generator=generator)
    return _append_case(spec, lengths, num_bytes, device, normal, seed)


def _decode_layer(spec: Spec, device: torch.device, num_sets: int | None, normal: Normal, seed: int) -> Case:
    least = spec.window_tokens + 1
    num_bytes = _appended_bytes(spec) + _attended_bytes(spec, _lengths(spec, 1, least, seed))
    lengths = _lengths(spec, num_sets or cold_sets(num_bytes, device), least, seed)
    return _append_case(spec, lengths, num_bytes, device, normal, seed)


def _attended_bytes(spec: Spec, lengths: torch.Tensor) -> int:
    """Live tokens, their pages' numbers and lengths, queries and outputs."""
    pages = int((-(-lengths // spec.page_size)).sum())
    num_bytes = int(lengths.sum()) * spec.stored_bytes + 4 * (pages + lengths.numel())
    return num_bytes + 2 * spec.rows * spec.kv_heads * spec.group * spec.head_dim * DTYPE.itemsize


def _appended_bytes(spec: Spec) -> int:
    """q twice, k, v; stored token; ring entry and length, read and written; page; RoPE's cos and sin of each row."""
    num_bytes = DTYPE.itemsize * spec.rows * spec.head_dim * 2 * spec.kv_heads * (spec.group + 1)
    return num_bytes + spec.rows * spec.kv_heads * (spec.stored_bytes + 8 + 8 + 4) + spec.rows * 4 * spec.head_dim


def _append_case(
    spec: Spec, lengths: torch.Tensor, num_bytes: int, device: torch.device, normal: Normal, seed: int
) -> Case:
    layers, heads = lengths.shape[0], spec.kv_heads * spec.group
    cache, positions = _cache(spec, lengths, device, seed)
    angles = torch.arange(int(positions.max()) + 1, device=device)[:, None] / 10000 ** torch.linspace(
        0, 1, spec.head_dim // 2, device=device
    )
    shared = {
        "positions": positions,
        "rows": torch.arange(spec.rows, dtype=torch.int32, device=device),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    sets = []
    for _ in range(layers):
        fused = normal(spec.rows, heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = fused.split((heads, spec.kv_heads, spec.kv_heads), 1)
        sets.append({"q": q, "k": k, "v": v, **shared})
    place = (positions.long() % (spec.window_tokens + 1)).view(1, -1, 1, 1).expand(layers, -1, spec.kv_heads, 1)
    leaving = cache.ring.gather(-1, place)
    kept = 1 - float((leaving & 1).float().mean())
    return Case(spec=spec, sets=sets, cache=cache, num_bytes=num_bytes, kept=kept, longest=int(lengths.max()))


def _release(spec: Spec, device: torch.device, num_sets: int | None, normal: Normal, seed: int) -> Case:
    spec = replace(spec, window_tokens=0)
    lengths = _lengths(spec, _RELEASE_LAYERS, 1, seed)
    # Contents don't matter: the smallest that can be.
    cache, _ = filled_cache(
        lengths, head_dim=1, kv_dtype=torch.float16, window_tokens=0, page_size=spec.page_size, flagged_share=0.0,
        device=device, seed=seed,
    )  # fmt: skip
    pages = int((-(-lengths // spec.page_size)).sum())
    sets = [{"rows": torch.arange(spec.rows, dtype=torch.int32, device=device)}]
    num_bytes = 8 * (pages + lengths.numel() + spec.rows)
    return Case(spec=spec, sets=sets, cache=cache, num_bytes=num_bytes, longest=int(lengths.max()))
