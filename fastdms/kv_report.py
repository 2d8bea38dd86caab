"""What the KV cache really holds, in tokens and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["CacheGeometry", "KVReport", "RowUsage"]


class RowUsage:
    """One row: ``num_tokens`` seen, and how many each span kept.

    Seen are also the tokens of a step at which the row found no page, although not every span could take them, and on a
    GPU the token of a step that had begun when the request ended by a stop string or was cancelled.
    """

    def __init__(self, *, num_tokens: int, live_tokens: npt.NDArray[np.int64] | torch.Tensor) -> None:
        self.num_tokens = num_tokens
        self._live_tokens = live_tokens

    @property
    def live_tokens(self) -> npt.NDArray[np.int64]:
        """int64 ``[L, Hkv]``; asking for them first waits for the device."""
        live = self._live_tokens  # looked at once: other threads may ask, too
        if isinstance(live, torch.Tensor):
            live = self._live_tokens = live.cpu().numpy().astype(np.int64)
        return live


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGeometry:
    """Bytes of the cache's tensors; ``dense_token_bytes``: one token in a dense bf16 cache of the same model."""

    page_size: int
    page_bytes: int
    bytes_pool: int
    bytes_metadata: int
    dense_token_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVReport:
    """KV memory of some rows.

    tokens: logical tokens, all rows together. live_tokens: float64 ``[L, Hkv]``, mean over the rows.
    live_share: stored tokens over logical ones, all spans. bytes_in_use: pages that the rows hold, whole pages with
    their scales. bytes_metadata: of the whole cache, page tables, rings, counters, and for penalties two bytes for each
    row and id of the vocabulary. bytes_pool: all pages.
    dense_bytes: the same tokens in a dense bf16 cache. ratio: dense_bytes / bytes_in_use.
    """

    rows: int
    tokens: int
    live_tokens: npt.NDArray[np.float64]
    live_share: float
    bytes_in_use: int
    bytes_metadata: int
    bytes_pool: int
    dense_bytes: int
    ratio: float

    @classmethod
    def of(cls, rows: Sequence[RowUsage], geometry: CacheGeometry, spans: tuple[int, int]) -> KVReport:
        """The report of ``rows``; ``spans``: (layers, KV heads), for a report of none."""
        tokens = sum(row.num_tokens for row in rows)
        live = sum((row.live_tokens for row in rows), np.zeros(spans, np.int64))
        pages = sum(int((-(-row.live_tokens // geometry.page_size)).sum()) for row in rows)
        in_use = pages * geometry.page_bytes
        dense = tokens * geometry.dense_token_bytes
        return cls(
            rows=len(rows),
            tokens=tokens,
            live_tokens=live / max(1, len(rows)),
            live_share=float(live.sum()) / (tokens * live.size) if tokens else 0.0,
            bytes_in_use=in_use,
            bytes_metadata=geometry.bytes_metadata,
            bytes_pool=geometry.bytes_pool,
            dense_bytes=dense,
            ratio=dense / in_use if in_use else 0.0,
        )

    def __str__(self) -> str:
        live = self.live_tokens
        spread = f"min {live.min():,.0f}, mean {live.mean():,.0f}, max {live.max():,.0f} tokens"
        lines = (
            ("rows", f"{self.rows}"),
            ("tokens", f"{self.tokens:,}"),
            ("live share", f"{self.live_share:.1%} of tokens x layers x KV heads"),
            ("live per span", spread),
            ("pages in use", _mib(self.bytes_in_use)),
            ("dense bf16", f"{_mib(self.dense_bytes)} for the same tokens: {self.ratio:.2f}x the pages in use"),
            ("whole cache", f"pool {_mib(self.bytes_pool)}, metadata {_mib(self.bytes_metadata)}"),
        )
        return "\n".join(f"{name:<14} {value}" for name, value in lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"
