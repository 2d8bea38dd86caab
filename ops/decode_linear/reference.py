"""The definition of decode_linear in plain PyTorch, fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdms.ops.int4 import INT4, dequantise_int4


def decode_linear(
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
    h = x.float()
    if norm is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps) * norm.float()
    if weight.dtype == INT4:
        assert scale is not None
        y = F.linear(h, dequantise_int4(weight, scale, h.dtype))
    else:
        y = F.linear(h, weight.float())
        if scale is not None:
            y = y * scale
    if bias is not None:
        y = y + bias.float()
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y if fp32_out else y.to(x.dtype)
