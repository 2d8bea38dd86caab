"""``fastdms::decode_attention``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "decode_attention(Tensor q, Tensor positions, Tensor rows, Tensor k_pages, Tensor v_pages, Tensor k_scales, "
    "Tensor v_scales, Tensor page_table, Tensor live_len, float sm_scale) -> Tensor"
)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.decode_attention.reference:decode_attention",
    kernel="fastdms.ops.decode_attention.kernel:decode_attention",
)
