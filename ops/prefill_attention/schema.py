"""``fastdms::prefill_attention``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor decisions, Tensor positions, Tensor rows, "
    "Tensor chunk_indptr, Tensor k_pages, Tensor v_pages, Tensor k_scales, Tensor v_scales, Tensor page_table, "
    "Tensor live_len, Tensor ring, int shift, float sm_scale) -> Tensor"
)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.prefill_attention.reference:prefill_attention",
    kernel="fastdms.ops.prefill_attention.kernel:prefill_attention",
)
