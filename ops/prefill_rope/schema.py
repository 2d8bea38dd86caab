"""``fastdms::prefill_rope``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "prefill_rope(Tensor q, Tensor k, Tensor? alpha, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
    "Tensor positions, float norm_eps, float decision_scale, float decision_threshold, int zero_borrowed) "
    "-> (Tensor, Tensor, Tensor)"
)


def _fake(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape[:2], dtype=torch.bool)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.prefill_rope.reference:prefill_rope",
    kernel="fastdms.ops.prefill_rope.kernel:prefill_rope",
)
