"""Whether an op on the device gives what its reference gives; no kernel is timed that doesn't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastdms.cache import CompactCache
from fastdms.ops.quantise import load_slots
from fastdms.tools.bench.cases import STATE, build, launch
from fastdms.tools.bench.linears import shortened
from fastdms.tools.bench.spec import Spec

__all__ = ["check_op"]

_SMALL: dict[str, Any] = {"rows": 3, "live": 300, "length": 400, "chunk": 144, "kept": 0.4}
_WINDOW_TOKENS = 32  # so that small cases evict
# A kernel may be twice as far from exact as its reference and one rounding, of the largest value: 2 (1/2 + 1/2) eps,
# and 1/2 eps that the reference itself is off.
_OUTPUT_EPS = 2.5
_STORED_EPS = 1.05  # one step of the stored type; the scale's own rounding is little beside it
_SUM_ORDER = 1e-4  # fp32 sums in another order


def check_op(spec: Spec, device: torch.device) -> None:
    """Run ``spec`` in a small size by the device and by the CPU's reference; ValueError says how far they are apart."""
    small = replace(spec, **_SMALL, window_tokens=min(spec.window_tokens, _WINDOW_TOKENS))
    if spec.op in ("decode_linear", "dequantise"):
        small = shortened(small)
    if spec.op in ("decode_attention", "release"):
        small = replace(small, spans="zipf")
    expected = build(small, torch.device("cpu"), num_sets=1)
    tensors = {name: tensor.to(device, copy=True) for name, tensor in expected.sets[0].items()}
    cache = None if expected.cache is None else _copy(expected.cache, device)
    out = launch(expected.spec, tensors, cache, 0)
    reference = launch(expected.spec, expected.sets[0], expected.cache, 0)
    wrong = None
    if reference is not None:
        computed = tensors["x"].dtype if spec.op == "decode_linear" else out.dtype
        wrong = _output_fault(out, reference, computed)
    if expected.cache is not None and cache is not None and wrong is None:
        wrong = _state_fault(cache, expected.cache)
    if wrong is not None:
        raise ValueError(
            f"{spec.op} on {device} differs from its reference at head_dim {spec.head_dim}, group {spec.group}, "
            f"{spec.kv_dtype} pages of {spec.page_size}: {wrong}; it isn't timed (--no-check times it all the same)"
        )


def _copy(cache: CompactCache, device: torch.device) -> CompactCache:
    other = CompactCache(cache.config, device)
    for name in (*STATE, "k_pages", "v_pages", "k_scales", "v_scales"):
        getattr(other, name).copy_(getattr(cache, name))
    return other


def _output_fault(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> str | None:
    """dtype: what is computed in, which fp32 logits may not show."""
    largest = float(reference.abs().max())
    allowed = (_OUTPUT_EPS * torch.finfo(dtype).eps + _SUM_ORDER) * largest
    error = float((out.cpu().double() - reference.double()).abs().max())
    return None if error <= allowed else f"off by {error:.3g} where {allowed:.3g} is allowed"


def _state_fault(cache: CompactCache, expected: CompactCache) -> str | None:
    """Which page of the pool is which is nobody's business: pages are popped in any order."""
    for name in ("live_len", "num_free", "starved", "ring"):
        if not torch.equal(getattr(cache, name).cpu(), getattr(expected, name)):
            return f"{name} differs"
    pages = torch.cat((cache.free_pages[: int(cache.num_free)], cache.page_table[_held(cache)]))
    if sorted(pages.tolist()) != list(range(cache.config.num_pages)):
        return "a page is lost, or has two owners"
    eps = torch.finfo(cache.config.kv_dtype).eps
    for name, mine, other in zip("kv", _tokens(cache), _tokens(expected), strict=True):
        allowed = _STORED_EPS * eps * other.abs() + _SUM_ORDER * (other.abs().max() if other.numel() else 0.0)
        if bool(((mine - other).abs() > allowed).any()):  # also where either is NaN, by the next line
            return f"stored {name} differs"
        if not bool(mine.isfinite().all()):
            return f"stored {name} isn't finite"
    return None


def _held(cache: CompactCache) -> torch.Tensor:
    held = -(-cache.live_len // cache.config.page_size)
    return torch.arange(cache.config.max_pages, device=held.device) < held[..., None]


def _tokens(cache: CompactCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[n, D]`` fp32 of all spans in order, on the CPU."""
    size = cache.config.page_size
    slots = torch.arange(cache.config.max_pages * size, device=cache.live_len.device)
    span = (slots < cache.live_len[..., None]).nonzero()
    page, slot = cache.page_table[(*span[:, :3].T, span[:, 3] // size)].long(), span[:, 3] % size
    keys: Any = load_slots(cache.k_pages, cache.k_scales, page, slot)
    values: Any = load_slots(cache.v_pages, cache.v_scales, page, slot)
    return keys.cpu(), values.cpu()
