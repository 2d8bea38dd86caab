"""``fastdms::decode_attention``: schema, check and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register
from fastdms.ops.span_cache import check, check_queries, check_spans

SCHEMA = (
    "decode_attention(Tensor q, Tensor positions, Tensor rows, Tensor k_pages, Tensor v_pages, Tensor k_scales, "
    "Tensor v_scales, Tensor page_table, Tensor live_len, float sm_scale) -> Tensor"
)


def _check(
    q: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    k_scales: torch.Tensor, v_scales: torch.Tensor, page_table: torch.Tensor, live_len: torch.Tensor, _: float,
) -> None:  # fmt: skip
    check_spans(k_pages, v_pages, k_scales, v_scales, page_table, live_len)
    check_queries(q, positions, rows, k_pages, live_len)
    check(
        positions.shape == rows.shape == q.shape[:1],
        f"positions and rows must be [{q.shape[0]}], got {tuple(positions.shape)} and {tuple(rows.shape)}",
    )


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference="fastdms.ops.decode_attention.reference:decode_attention",
    kernel="fastdms.ops.decode_attention.kernel:decode_attention",
)
