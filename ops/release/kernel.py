"""Triton backend of release: one program per span."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _release_kernel(
    rows_ptr,
    page_table_ptr,
    live_len_ptr,
    free_pages_ptr,
    num_free_ptr,
    starved_ptr,
    num_rows,
    max_pages,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """free_pages[num_free : num_free + held] = the span's pages; no pop runs at the same time, so an add is enough."""
    layer = tl.program_id(1) // HKV
    o_p = tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + tl.program_id(0))
    if row >= 0:
        span = (layer.to(tl.int64) * num_rows + row) * HKV + tl.program_id(1) % HKV
        held = tl.cdiv(tl.load(live_len_ptr + span), PAGE)
        if held > 0:
            table = page_table_ptr + span * max_pages
            b_pages = tl.load(table + o_p, mask=o_p < held)  # under way while the counter is
            base = tl.atomic_add(num_free_ptr, held, sem="relaxed")
            for first in range(0, held, BLOCK):
                b_next = tl.load(table + first + BLOCK + o_p, mask=first + BLOCK + o_p < held)
                tl.store(free_pages_ptr + base + first + o_p, b_pages, mask=first + o_p < held)
                b_pages = b_next
            tl.store(live_len_ptr + span, 0)
        if tl.program_id(1) == 0:
            tl.store(starved_ptr + row, 0)


def release(
    rows: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    starved: torch.Tensor,
    page_size: int,
) -> None:
    layers, num_rows, num_kv_heads, max_pages = page_table.shape
    if rows.numel() == 0:
        return
    _release_kernel[(rows.numel(), layers * num_kv_heads)](
        rows, page_table, live_len, free_pages, num_free, starved, num_rows, max_pages,
        HKV=num_kv_heads, PAGE=page_size, BLOCK=min(256, triton.next_power_of_2(max_pages)), num_warps=1,
    )  # fmt: skip
