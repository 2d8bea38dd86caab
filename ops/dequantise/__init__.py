"""Weights in fp8 or int4 as a copy that any product takes."""

from __future__ import annotations

import torch

from fastdms.ops.dequantise import schema as _schema  # noqa: F401  (defines the op)

__all__ = ["dequantise"]


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[N, K]`` in ``dtype`` (fp32, fp16 or bf16): weights times their scale, multiplied in fp32, rounded to it once.

    weight: contiguous, not empty; float8_e4m3fn ``[N, K]`` with scale ``[N]`` fp32, unit stride, or int4 as
    ``fastdms.ops.int4`` packs it: int32 ``[N, K / 8]`` with a contiguous scale ``[N, K / group]`` fp32, fp16 or bf16,
    of groups of 32, 64 or 128.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    out: torch.Tensor = torch.ops.fastdms.dequantise.default(weight, scale, dtype)
    return out
