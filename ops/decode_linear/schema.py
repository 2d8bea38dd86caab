"""``fastdms::decode_linear``: schema and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register

MOST_ROWS = 16
SCHEMA = (
    "decode_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm, float norm_eps, "
    "Tensor? residual, bool swiglu, bool fp32_out) -> Tensor"
)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_eps: float,
    residual: torch.Tensor | None,
    swiglu: bool,
    fp32_out: bool,
) -> torch.Tensor:
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    return x.new_empty((x.shape[0], outputs), dtype=torch.float32 if fp32_out else x.dtype)


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.decode_linear.reference:decode_linear",
    kernel="fastdms.ops.decode_linear.kernel:decode_linear",
)
