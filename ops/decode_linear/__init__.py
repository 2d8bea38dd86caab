"""A linear layer of a decode step: RMSNorm before it, SwiGLU or the residual after it."""

from __future__ import annotations

import torch

from fastdms.ops.decode_linear import schema as _schema  # noqa: F401  (defines the op)
from fastdms.ops.decode_linear.schema import MOST_ROWS
from fastdms.ops.span_cache import check

__all__ = ["MOST_ROWS", "decode_linear"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    without NaN and with scale ``[N]`` fp32, by which it is multiplied. bias: ``[N]``, norm: ``[K]``, residual:
    ``[B, N_out]`` with unit last stride, all in x's dtype.
    swiglu: weight is ``[2 F, K]``, gate then up, and the result ``silu(gate) * up``, so N_out is F; else N_out is N.
    The residual comes last. Sums are fp32. Returns ``[B, N_out]`` in x's dtype, or in fp32 with ``fp32_out``. On CUDA
    a row of a contiguous x gives the same result, bit for bit, in whichever batch of several and place it comes; alone
    it has a kernel of its own. Neither weight nor norm may be what the kernel launched just before writes.
    Raises ValueError on shapes or dtypes that don't fit.
    """
    check(
        x.dim() == 2 and x.dtype in _DTYPES and x.stride(-1) == 1,
        f"x must be [B, K] fp32, fp16 or bf16 with unit last stride, got {x.dtype} {tuple(x.shape)}",
    )
    check(x.shape[0] <= MOST_ROWS, f"x has {x.shape[0]} rows; at most {MOST_ROWS} are decoded at once")
    check(
        weight.dim() == 2 and weight.shape[0] > 0 and 0 < weight.shape[1] == x.shape[1] and weight.is_contiguous(),
        f"weight must be contiguous [N, {x.shape[1]}], not empty, got {tuple(weight.shape)}",
    )
    stored_fp8 = weight.dtype == torch.float8_e4m3fn
    check(weight.dtype == x.dtype or stored_fp8, f"weight must be {x.dtype} or float8_e4m3fn, got {weight.dtype}")
    check(
        stored_fp8 == (scale is not None), f"scale goes with float8_e4m3fn weights alone, the weight is {weight.dtype}"
    )
    outputs = weight.shape[0]
    check(not swiglu or outputs % 2 == 0, f"swiglu takes an even number of channels, got {outputs}")
    _check_part("scale", scale, (outputs,), torch.float32)
    _check_part("bias", bias, (outputs,), x.dtype)
    _check_part("norm", norm, (x.shape[1],), x.dtype)
    _check_part("residual", residual, (x.shape[0], outputs // 2 if swiglu else outputs), x.dtype)
    out: torch.Tensor = torch.ops.fastdms.decode_linear.default(
        x, weight, scale, bias, norm, norm_eps, residual, swiglu, fp32_out
    )
    return out


def _check_part(name: str, x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x is not None:
        check(
            x.shape == shape and x.dtype == dtype and x.stride(-1) == 1,
            f"{name} must be {dtype} {shape} with unit last stride, got {x.dtype} {tuple(x.shape)}",
        )
