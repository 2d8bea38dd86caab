"""``fastdms::decode_append``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

SCHEMA = (
    "decode_append(Tensor q, Tensor k, Tensor v, Tensor? alpha, Tensor? q_norm, Tensor? k_norm, Tensor cos, "
    "Tensor sin, Tensor positions, Tensor rows, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) k_scales, "
    "Tensor(d!) v_scales, Tensor(e!) page_table, Tensor(f!) live_len, Tensor(g!) ring, Tensor free_pages, "
    "Tensor(h!) num_free, Tensor(i!) starved, float norm_eps, float decision_scale, float decision_threshold, "
    "int shift, int zero_borrowed) -> Tensor"
)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.decode_append.reference:decode_append",
    kernel="fastdms.ops.decode_append.kernel:decode_append",
)
