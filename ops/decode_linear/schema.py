"""``fastdms::decode_linear``: schema, check and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register
from fastdms.ops.span_cache import check

MOST_ROWS = 16
SCHEMA = (
    "decode_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm, float norm_eps, "
    "Tensor? residual, bool swiglu, bool fp32_out) -> Tensor"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_eps: float,
    residual: torch.Tensor | None,
    swiglu: bool,
    fp32_out: bool,
) -> None:
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


def _check_part(name: str, x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x is not None:
        check(
            x.shape == shape and x.dtype == dtype and x.stride(-1) == 1,
            f"{name} must be {dtype} {shape} with unit last stride, got {x.dtype} {tuple(x.shape)}",
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
    check=_check,
    fake=_fake,
    reference="fastdms.ops.decode_linear.reference:decode_linear",
    kernel="fastdms.ops.decode_linear.kernel:decode_linear",
)
