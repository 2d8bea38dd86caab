"""``fastdms::sample``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions, Tensor banned_ids, Tensor banned_until) -> Tensor"
)


def _fake(logits: torch.Tensor, *_: object) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.sample.reference:sample",
    kernel="fastdms.ops.sample.kernel:sample",
)
