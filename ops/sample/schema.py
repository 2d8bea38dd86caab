"""``fastdms::sample``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions, Tensor end_ids, Tensor banned_until, Tensor penalties, Tensor count_rows, Tensor(a!) counts) "
    "-> (Tensor, Tensor)"
)


def _fake(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.sample.reference:sample",
    kernel="fastdms.ops.sample.kernel:sample",
)
