"""``fastdms::decode_append``: schema, check and fake. Imports torch only."""

from __future__ import annotations

from typing import Any

import torch

from fastdms.ops.registry import register
from fastdms.ops.rope_decide import check_tokens
from fastdms.ops.span_cache import SpanCache, check, check_cache, check_heads, check_queries

SCHEMA = (
    "decode_append(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? q_norm, Tensor? k_norm, Tensor cos, "
    "Tensor sin, Tensor positions, Tensor rows, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) k_scales, "
    "Tensor(d!) v_scales, Tensor(e!) page_table, Tensor(f!) live_len, Tensor(g!) ring, Tensor free_pages, "
    "Tensor(h!) num_free, Tensor(i!) starved, float norm_eps, float decision_scale, float decision_threshold, "
    "int shift, int zero_borrowed) -> Tensor"
)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor | None, q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor,
    *cache_and_constants: Any,
) -> None:  # fmt: skip
    *tensors, _eps, _scale, _threshold, shift, _zero_borrowed = cache_and_constants
    cache = SpanCache(*tensors)
    check_cache(cache)
    check_queries(q, positions, rows, cache.k_pages, cache.live_len)
    check_tokens(q, k, alpha=alpha, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin, positions=positions)
    check_heads(v=v)
    check(
        k.shape == v.shape and k.shape[1] == cache.live_len.shape[1],
        f"k, v must be [B, {cache.live_len.shape[1]}, D], got {tuple(k.shape)} and {tuple(v.shape)}",
    )
    check(rows.shape == positions.shape, f"positions and rows must be [{q.shape[0]}], got {tuple(rows.shape)}")
    check(shift in (0, 1), f"shift must be 0 or 1, got {shift!r}")


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference="fastdms.ops.decode_append.reference:decode_append",
    kernel="fastdms.ops.decode_append.kernel:decode_append",
)
