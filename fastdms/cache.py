"""The compact cache: one page pool, spans without holes, window rings, a free stack; plain tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdms.kv_report import CacheGeometry, RowUsage
from fastdms.ops import SpanCache, count_tokens, release

__all__ = ["PAGE_SIZE", "CacheConfig", "CompactCache"]

PAGE_SIZE = 64  # token slots: half a page of waste per span stays below 5 % from about 700 live tokens on


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes of a compact cache. ``num_pages`` counts pages of ``page_size`` slots for the whole pool.
    ``vocab_size``: 0 for a cache that no tokens are counted in."""

    num_layers: int
    num_rows: int
    num_kv_heads: int
    head_dim: int
    window_tokens: int
    max_context: int
    kv_dtype: torch.dtype
    num_pages: int
    page_size: int = PAGE_SIZE
    vocab_size: int = 0

    @property
    def max_pages(self) -> int:
        """Pages of a span that forgets nothing."""
        return -(-self.max_context // self.page_size)

    @property
    def num_spans(self) -> int:
        """Spans of one row."""
        return self.num_layers * self.num_kv_heads

    @property
    def page_bytes(self) -> int:
        """K, V and scales of one page."""
        scales = torch.bfloat16.itemsize if self.kv_dtype == torch.float8_e4m3fn else 0
        return 2 * self.page_size * (self.head_dim * self.kv_dtype.itemsize + scales)

    @property
    def fixed_bytes(self) -> int:
        """Metadata that does not grow with the pool: page table, lengths, rings, counters, counts of tokens."""
        per_span = self.max_pages + 1 + self.window_tokens + 1
        return 4 * (self.num_rows * self.num_spans * per_span + self.num_rows + 1) + 2 * self.num_rows * self.vocab_size

    def pages_within(self, num_bytes: int) -> int:
        """Pages that fit into ``num_bytes`` beside all metadata, at most what every row could ever need."""
        affordable = (num_bytes - self.fixed_bytes) // (self.page_bytes + 4)
        return min(affordable, self.num_rows * self.num_spans * self.max_pages)


class CompactCache:
    """The state tensors, as ``SpanCache`` names them, over all layers, and ``counts [R, V]`` as ``sample`` does."""

    def __init__(self, config: CacheConfig, device: torch.device) -> None:
        self.config = c = config
        spans = (c.num_layers, c.num_rows, c.num_kv_heads)
        pool = (c.num_pages, c.page_size)
        scales = pool if c.kv_dtype == torch.float8_e4m3fn else (0,)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.k_pages = torch.empty((*pool, c.head_dim), dtype=c.kv_dtype, device=device)
        self.v_pages = torch.empty_like(self.k_pages)
        self.k_scales = torch.empty(scales, dtype=torch.bfloat16, device=device)
        self.v_scales = torch.empty_like(self.k_scales)
        self.page_table = zeros(*spans, c.max_pages)
        self.live_len = zeros(*spans)
        self.ring = zeros(*spans, c.window_tokens + 1)
        self.free_pages = torch.arange(c.num_pages, dtype=torch.int32, device=device)
        self.num_free = torch.full((1,), c.num_pages, dtype=torch.int32, device=device)
        self.starved = zeros(c.num_rows)
        self.counts = torch.zeros((c.num_rows, c.vocab_size), dtype=torch.int16, device=device)

    def layer(self, index: int) -> SpanCache:
        """What the ops take: views of one layer's spans over the shared pool."""
        return SpanCache(
            self.k_pages, self.v_pages, self.k_scales, self.v_scales, self.page_table[index], self.live_len[index],
            self.ring[index], self.free_pages, self.num_free, self.starved,
        )  # fmt: skip

    def count(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Set ``row``'s counts of tokens."""
        self.counts[row].copy_(count_tokens(prompt_ids, output_ids, self.config.vocab_size))

    def release(self, rows: list[int]) -> None:
        """Give back all pages of ``rows``."""
        if rows:
            release(
                torch.tensor(rows, dtype=torch.int32, device="cpu").to(self.live_len.device, non_blocking=True),
                page_table=self.page_table,
                live_len=self.live_len,
                free_pages=self.free_pages,
                num_free=self.num_free,
                starved=self.starved,
                page_size=self.config.page_size,
            )

    def usage(self, row: int, num_tokens: int) -> RowUsage:
        """What ``row`` holds now, having seen ``num_tokens`` tokens."""
        return RowUsage(num_tokens=num_tokens, live_tokens=self.live_len[:, row].clone())

    def pages_in_use(self) -> int:
        """Pages not on the free stack."""
        return self.config.num_pages - int(self.num_free)

    def starved_rows(self) -> list[int]:
        """Rows whose spans found no page since they were last released."""
        return [row for row, flag in enumerate(self.starved.tolist()) if flag]

    @property
    def geometry(self) -> CacheGeometry:
        """Byte counts for reports, taken from the tensors themselves."""
        pool = sum(t.nbytes for t in (self.k_pages, self.v_pages, self.k_scales, self.v_scales))
        spans = (self.page_table, self.live_len, self.ring, self.free_pages, self.num_free, self.starved)
        return CacheGeometry(
            page_size=self.config.page_size,
            page_bytes=pool // max(1, self.config.num_pages),
            bytes_pool=pool,
            bytes_metadata=sum(t.nbytes for t in (*spans, self.counts)),
            dense_token_bytes=2 * self.config.num_spans * self.config.head_dim * torch.bfloat16.itemsize,
        )
