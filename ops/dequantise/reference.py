"""The definition of dequantise in plain PyTorch."""

from __future__ import annotations

import torch

from fastdms.ops.int4 import INT4, dequantise_int4


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if weight.dtype == INT4:
        return dequantise_int4(weight, scale, dtype)
    # Exact in any of the dtypes; the product is fp32, whatever the dtype of its left side.
    return weight.to(dtype).mul_(scale[:, None])
