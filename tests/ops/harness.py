"""What the op tests share: the two ways to run an op, guarded caches, and the checks that hold for any cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastdms.cache import CacheConfig, CompactCache
from fastdms.ops.quantise import load_slots, store_slots
from tests.poison import poison
from tests.tolerance import LOGITS_RELATIVE, rounding_band

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
BACKENDS = ("reference", "kernel")
OPS = (
    "decode_append",
    "decode_attention",
    "decode_linear",
    "dense_attention",
    "dequantise",
    "prefill_append",
    "prefill_attention",
    "prefill_rope",
    "release",
    "sample",
    "soft_attention",
)
STATE = (
    "k_pages", "v_pages", "k_scales", "v_scales", "page_table", "live_len", "ring", "free_pages", "num_free", "starved",
)  # fmt: skip

_GPU = pytest.mark.gpu  # the interpreter rounds bf16 and fp8 wrongly
# (compute dtype, KV dtype) that a kernel is tried with.
KERNEL_DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=_GPU),
    pytest.param(torch.bfloat16, torch.float8_e4m3fn, id="bf16-fp8", marks=_GPU),
    pytest.param(torch.float16, torch.float8_e4m3fn, id="fp16-fp8", marks=_GPU),
    pytest.param(torch.float32, torch.float8_e4m3fn, id="fp32-fp8", marks=_GPU),
]
# The plain references run anywhere in any dtype.
REFERENCE_DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float32, torch.float8_e4m3fn, id="fp32-fp8"),
    pytest.param(torch.bfloat16, torch.float8_e4m3fn, id="bf16-fp8"),
]
# Every group size and head dim that the project promises, paired so that the grid stays small: (Hkv, G, D).
HEAD_SHAPES = [(2, 1, 16), (2, 3, 64), (1, 4, 80), (3, 5, 96), (1, 7, 128), (1, 16, 256)]


@contextmanager
def on(backend: str) -> Iterator[torch.device]:
    """Run the public ops by ``backend`` inside, on the device given: kernels on CUDA or in Triton's interpreter.

    The registry looks its reference up at each call, so a kernel launcher in its place is all the interpreter needs.
    """
    assert backend in BACKENDS
    with pytest.MonkeyPatch.context() as patch:
        if backend == "kernel" and DEVICE == CPU:
            for op in OPS:
                reference, kernel = (importlib.import_module(f"fastdms.ops.{op}.{part}") for part in BACKENDS)
                patch.setattr(reference, op, getattr(kernel, op))
            from fastdms.ops.soft_attention import backward_kernel, reference

            patch.setattr(reference, "soft_attention_backward", backward_kernel.soft_attention_backward)
        yield DEVICE if backend == "kernel" else CPU


_GUARD = 64  # elements on either side, which also keeps every buffer aligned
_GUARD_BYTE = 0xA5


class GuardedCache(CompactCache):
    """A compact cache whose buffers lie between guard elements, filled with what a previous owner may have left.

    Pages are NaN, page tables and rings hold arbitrary numbers, the free stack is in arbitrary order.
    """

    def __init__(self, config: CacheConfig, device: torch.device, seed: int = 0) -> None:
        super().__init__(config, device)
        generator = torch.Generator().manual_seed(seed)
        self.free_pages.copy_(torch.randperm(config.num_pages, generator=generator))
        for stale in (self.page_table, self.ring):
            stale.copy_(torch.randint(-(2**31), 2**31, stale.shape, generator=generator))
        self._buffers = []
        for name in STATE:
            tensor = getattr(self, name)
            if tensor.numel():
                buffer = torch.zeros(tensor.numel() + 2 * _GUARD, dtype=tensor.dtype, device=device)
                buffer.view(torch.uint8).fill_(_GUARD_BYTE)
                view = buffer[_GUARD:-_GUARD].view(tensor.shape)
                view.copy_(poison(tensor) if tensor.dtype != torch.int32 else tensor)
                setattr(self, name, view)
                self._buffers.append(buffer)

    def check_guards(self) -> None:
        """No op wrote outside the buffers."""
        for buffer in self._buffers:
            for end in (buffer[:_GUARD], buffer[-_GUARD:]):
                assert bool((end.view(torch.uint8) == _GUARD_BYTE).all()), "a guard element was overwritten"

    def copy_to(self, device: torch.device) -> GuardedCache:
        """A cache of the same content with guards of its own."""
        other = GuardedCache(self.config, device)
        for name in STATE:
            getattr(other, name).copy_(getattr(self, name))
        return other


def make_cache(device: torch.device = CPU, *, seed: int = 0, **sizes: Any) -> GuardedCache:
    """A small cache; ``sizes`` replace fields of this CacheConfig."""
    defaults = {
        "num_layers": 1, "num_rows": 3, "num_kv_heads": 2, "head_dim": 16, "window_tokens": 7, "max_context": 128,
        "kv_dtype": torch.float32, "num_pages": 64, "page_size": 16,
    }  # fmt: skip
    return GuardedCache(CacheConfig(**{**defaults, **sizes}), device, seed)


def split_heads(x: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as strided views of a fused projection ``[n, Hq + 2 Hkv, D]``."""
    q, k, v = x.split((x.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1)
    return q, k, v


def span_pages(cache: CompactCache, layer: int, row: int, head: int) -> list[int]:
    """The pages that a span holds."""
    held = -(-int(cache.live_len[layer, row, head]) // cache.config.page_size)
    return cache.page_table[layer, row, head, :held].tolist()


def read_span(cache: CompactCache, layer: int, row: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[live, D]`` in slot order, fp64 on the CPU."""
    live, size = int(cache.live_len[layer, row, head]), cache.config.page_size
    pages = torch.tensor(span_pages(cache, layer, row, head), dtype=torch.int64, device=cache.live_len.device)
    slots = torch.arange(live, device=pages.device)
    page, slot = pages[slots // size], slots % size
    return (
        load_slots(cache.k_pages, cache.k_scales, page, slot).double().cpu(),
        load_slots(cache.v_pages, cache.v_scales, page, slot).double().cpu(),
    )


def fill_spans(cache: GuardedCache, lengths: list[list[int]], values: Callable[[int], torch.Tensor]) -> None:
    """Give layer 0's spans ``lengths[row][head]`` tokens; ``values(n)``: keys or values ``[n, D]`` fp32."""
    size, device = cache.config.page_size, cache.live_len.device
    for row, heads in enumerate(lengths):
        for head, length in enumerate(heads):
            held, free = -(-length // size), int(cache.num_free)
            pages = cache.free_pages[free - held : free]
            cache.page_table[0, row, head, :held] = pages
            cache.num_free -= held
            cache.live_len[0, row, head] = length
            slots = torch.arange(length, device=device)
            at = (pages[slots // size].long(), slots % size)
            store_slots(values(length).to(device), cache.k_pages, cache.k_scales, *at)
            store_slots(values(length).to(device), cache.v_pages, cache.v_scales, *at)


def spans(cache: CompactCache) -> list[tuple[int, int, int]]:
    """(layer, row, head) of every span."""
    layers, rows, heads = cache.live_len.shape
    return [(i, r, h) for i in range(layers) for r in range(rows) for h in range(heads)]


def check_pool(cache: GuardedCache) -> None:
    """Each page is free or held, once; what no token was written to is still poison; nothing lies outside."""
    cache.check_guards()
    size, num_pages = cache.config.page_size, cache.config.num_pages
    free = cache.free_pages[: int(cache.num_free)].tolist()
    lengths, tables = cache.live_len.cpu(), cache.page_table.cpu()
    unwritten = torch.zeros(num_pages, size, dtype=torch.bool)
    unwritten[free] = True
    held: list[int] = []
    for span in spans(cache):
        live = int(lengths[span])
        pages = tables[span][: -(-live // size)].tolist()
        held += pages
        if live % size:
            unwritten[pages[-1], live % size :] = True
    assert sorted(free + held) == list(range(num_pages)), "a page is lost, or has two owners"
    for name in ("k_pages", "v_pages"):
        values = getattr(cache, name).float().cpu()
        assert bool(values[unwritten].isnan().all()), f"{name}: a slot that holds no token was written"
        assert bool(values[~unwritten].isfinite().all()), f"{name}: a slot that holds a token was not written"


def assert_same_state(actual: CompactCache, expected: CompactCache) -> None:
    """Equal but for which page of the pool is which: the same lengths, rings, counters and bytes in every slot."""
    for name in ("live_len", "num_free", "starved"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name).cpu()), name
    assert torch.equal(actual.ring.cpu(), expected.ring.cpu()), "ring"
    for span in spans(expected):
        for name, mine, other in zip("kv", read_span(actual, *span), read_span(expected, *span), strict=True):
            band = rounding_band(other, expected.config.kv_dtype) * 2  # one step of the stored type
            assert bool(((mine - other).abs() <= band + LOGITS_RELATIVE).all()), f"{name} of span {span}"


def assert_close_to_definition(actual: torch.Tensor, oracle: torch.Tensor) -> None:
    """An fp32 computation, rounded once to the dtype of ``actual``; oracle: fp64."""
    error = (actual.double().cpu() - oracle).abs()
    scale = oracle.abs().amax() if oracle.numel() else torch.tensor(0.0)
    excess = error - rounding_band(oracle, actual.dtype) - LOGITS_RELATIVE * scale
    assert bool((excess <= 0).all()), f"off by up to {error.max():.3g} where values reach {scale:.3g}"
