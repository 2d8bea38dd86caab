"""The compact cache as the ops see it: plain tensors of one layer, and the checks that every op shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "KV_DTYPES", "SpanCache", "check", "check_cache", "check_heads", "check_ints", "check_queries", "check_spans",
]  # fmt: skip

KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


_PAGE_DTYPES = (*KV_DTYPES.values(), torch.float16)


class SpanCache(NamedTuple):
    """One layer's spans over the pool that all layers share. All tensors lie on one device and are contiguous.

    A span is what one (row, KV head) has kept: ``live_len`` tokens without holes, slot ``i`` in page
    ``page_table[row, head, i // S]`` at ``i % S``. Slot order carries no meaning: keys are stored after RoPE.

    k_pages, v_pages: ``[P, S, D]`` fp32, fp16, bf16 or float8_e4m3fn.
    k_scales, v_scales: ``[P, S]`` bf16, what a stored token was divided by; ``[0]`` where the KV dtype has none.
    page_table: ``[R, Hkv, max_pages]`` int32. live_len: ``[R, Hkv]`` int32.
    ring: ``[R, Hkv, W + 1]`` int32; entry ``t % (W + 1)`` is ``slot << 1 | flagged`` of token t, one of the last W + 1.
    free_pages: ``[P]`` int32, a stack; its first ``num_free`` entries are free. num_free: ``[1]`` int32.
    starved: ``[R]`` int32, 1 once a row found no free page: its spans no longer change until it is released.
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    page_table: torch.Tensor
    live_len: torch.Tensor
    ring: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor
    starved: torch.Tensor

    @property
    def page_size(self) -> int:
        """Token slots in one page."""
        return self.k_pages.shape[1]

    @property
    def window_tokens(self) -> int:
        """W: tokens besides the query's own that are visible whatever their flag."""
        return self.ring.shape[-1] - 1


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless ``condition``."""
    if not condition:
        raise ValueError(message)


def check_heads(**tensors: torch.Tensor) -> None:
    """Each must be ``[n, H, D]`` floating point with unit last stride; other strides are free."""
    for name, x in tensors.items():
        check(
            x.dim() == 3 and x.is_floating_point() and x.stride(-1) == 1,
            f"{name} must be floating point [n, H, D] with unit last stride, got {x.dtype} {tuple(x.shape)}",
        )


def check_ints(dims: int, **tensors: torch.Tensor) -> None:
    """Each must be contiguous int32 of ``dims`` dimensions."""
    for name, x in tensors.items():
        check(
            x.dtype == torch.int32 and x.dim() == dims and x.is_contiguous(),
            f"{name} must be contiguous int32 of {dims} dimension(s), got {x.dtype} {tuple(x.shape)}",
        )


def check_cache(cache: SpanCache) -> None:
    """Refuse a cache whose tensors don't fit each other; shapes and dtypes only, so that it traces without guards."""
    check_spans(*cache[:6])
    check_ints(3, ring=cache.ring)
    check_ints(1, free_pages=cache.free_pages, num_free=cache.num_free, starved=cache.starved)
    spans, num_pages = cache.live_len.shape, cache.k_pages.shape[:1]
    check(cache.ring.shape[:2] == spans, "ring must be [R, Hkv, W + 1]")
    check(cache.free_pages.shape == num_pages and cache.starved.shape == spans[:1], "free_pages [P], starved [R]")


def check_spans(
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor,
    page_table: torch.Tensor, live_len: torch.Tensor,
) -> None:  # fmt: skip
    """The part of ``check_cache`` that is about what spans hold."""
    check(
        k_pages.dim() == 3 and k_pages.shape == v_pages.shape and k_pages.dtype == v_pages.dtype,
        "k_pages and v_pages must be [P, S, D] alike",
    )
    check(k_pages.dtype in _PAGE_DTYPES, f"pages must be one of {_PAGE_DTYPES}, got {k_pages.dtype}")
    for tensor in (k_pages, v_pages, k_scales, v_scales):
        check(tensor.is_contiguous(), "k_pages, v_pages, k_scales and v_scales must be contiguous")
    scales = k_pages.shape[:2] if k_pages.dtype == torch.float8_e4m3fn else (0,)
    check(k_scales.shape == scales == v_scales.shape, f"scales must be {tuple(scales)} for {k_pages.dtype}")
    check_ints(3, page_table=page_table)
    check_ints(2, live_len=live_len)
    check(page_table.shape[:2] == live_len.shape, "page_table must be [R, Hkv, max_pages]")


def check_queries(
    q: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, k_pages: torch.Tensor, live_len: torch.Tensor
) -> None:
    """Refuse queries that don't fit the spans."""
    check_heads(q=q)
    check_ints(1, positions=positions, rows=rows)
    head_dim, num_kv_heads = k_pages.shape[2], live_len.shape[1]
    check(q.shape[2] == head_dim, f"q has head_dim {q.shape[2]}, the pages {head_dim}")
    check(q.shape[1] % num_kv_heads == 0, f"{q.shape[1]} query heads are no multiple of {num_kv_heads} KV heads")
