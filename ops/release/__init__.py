"""Give the pages of whole rows back."""

from __future__ import annotations

import torch

from fastdms.ops.release import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.span_cache import check, check_ints

__all__ = ["release"]


def release(
    rows: torch.Tensor,
    *,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    starved: torch.Tensor,
    page_size: int,
) -> None:
    """Push every page that ``rows`` hold in any layer onto the free stack, and empty their spans, in place.

    rows: ``[n]`` int32, distinct; entries of -1 are skipped. page_table: ``[L, R, Hkv, max_pages]``, live_len:
    ``[L, R, Hkv]``, the others as in ``SpanCache``. Releasing an empty row does nothing.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check_ints(1, rows=rows, free_pages=free_pages, num_free=num_free, starved=starved)
    check_ints(3, live_len=live_len)
    check_ints(4, page_table=page_table)
    check(page_table.shape[:3] == live_len.shape, "page_table must be [L, R, Hkv, max_pages]")
    check(starved.shape == live_len.shape[1:2], "starved must be [R]")
    torch.ops.fastdms.release.default(rows, page_table, live_len, free_pages, num_free, starved, page_size)
