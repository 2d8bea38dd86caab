"""A linear layer of a decode step: RMSNorm before it, SwiGLU or the residual after it."""

from __future__ import annotations

import torch

from fastdms.ops.decode_linear import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.decode_linear.schema import MOST_ROWS

__all__ = ["MOST_ROWS", "decode_linear"]


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    fp32_out: bool = False,
) -> torch.Tensor:
    """``h weight^T`` for at most ``MOST_ROWS`` rows, ``h = norm * x / sqrt(mean(x^2) + norm_eps)`` where norm is given.

    x: ``[B, K]`` fp32, fp16 or bf16, unit last stride. weight: contiguous ``[N, K]`` in x's dtype, or float8_e4m3fn
    without NaN and with scale ``[N]`` fp32, by which it is multiplied, or int4 as ``fastdms.ops.int4`` packs it: int32
    ``[N, K / 8]`` with a contiguous scale ``[N, K / group]`` fp32, fp16 or bf16, of groups of 32, 64 or 128. bias:
    ``[N]``, norm: ``[K]``, residual: ``[B, N_out]`` with unit last stride, all in x's dtype.
    swiglu: weight is ``[2 F, K]``, gate then up, and the result ``silu(gate) * up``, so N_out is F; else N_out is N.
    The residual comes last. Sums are fp32. Returns ``[B, N_out]`` in x's dtype, or in fp32 with ``fp32_out``. On CUDA
    a row of a contiguous x gives the same result, bit for bit, in whichever batch of several and place it comes; alone
    it has a kernel of its own. With int4 weights and a 16-bit result that one first rounds h, each 32 numbers of it to
    multiples of 2^-13 of the power of two below their largest; one that is infinite makes the row NaN.
    On CUDA weight, scale, bias and norm may not be what an op of this package, launched before, still writes.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    out: torch.Tensor = torch.ops.fastdms.decode_linear.default(
        x, weight, scale, bias, norm, norm_eps, residual, swiglu, fp32_out
    )
    return out
