"""``fastdms::dense_attention``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "dense_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_history, Tensor(b!) v_history, SymInt start, "
    "float sm_scale) -> Tensor"
)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.dense_attention.reference:dense_attention",
    kernel="fastdms.ops.dense_attention.kernel:dense_attention",
)
