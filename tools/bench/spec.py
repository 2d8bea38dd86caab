"""What a case of ``fastdms bench kernels`` is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdms.cache import CompactCache
from fastdms.ops import KV_DTYPES

__all__ = ["DTYPE", "Case", "Spec"]

DTYPE = torch.bfloat16  # of q, k, v and the output, and of a layer's rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One case; which of the fields an op depends on is for ``kernels`` to know.

    chunk: tokens of the prompt that are timed, its last ones; 0: all of it. linear: shape and layer of a weight.
    most_outputs: of that layer; None: all.
    """

    op: str
    head_dim: int
    kv_heads: int
    group: int
    kv_dtype: str
    page_size: int
    window_tokens: int
    rows: int = 1
    live: int = 1
    spans: str = "uniform"
    length: int = 1
    chunk: int = 0
    kept: float = 1.0
    linear: str = "tiny.qkv"
    weights: str = "bf16"
    most_outputs: int | None = None

    @property
    def start(self) -> int:
        """Tokens of the prompt before the chunk."""
        return self.length - min(self.chunk or self.length, self.length)

    @property
    def logical(self) -> int:
        """Tokens that ``live`` are what is left of: all of the window, and ``kept`` of those before it."""
        return min(self.live, self.window_tokens) + round(max(0, self.live - self.window_tokens) / self.kept)

    @property
    def sm_scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def stored_bytes(self) -> int:
        """K and V of one token of a span, with their scales."""
        dtype = KV_DTYPES[self.kv_dtype]
        return 2 * (self.head_dim * dtype.itemsize + (2 if dtype == torch.float8_e4m3fn else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Input sets of one spec. Launch i: ``launch(spec, sets[i], cache, i)``.

    num_bytes: moved by one launch if everything is read and written once. flops: of its visible pairs of query and key;
    dense_flops: of all causal pairs; None where an op has none. kept: share of tokens not flagged, as it came out.
    longest: live tokens of the longest span.
    """

    spec: Spec
    sets: Sequence[dict[str, torch.Tensor]]
    cache: CompactCache | None
    num_bytes: int
    flops: int | None = None
    dense_flops: int | None = None
    kept: float | None = None
    longest: int | None = None
