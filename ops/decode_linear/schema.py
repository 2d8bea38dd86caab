"""``fastdms::decode_linear``: schema, check and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.int4 import INT4, PER_WORD, check_int4_scale
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
    _check_weight(weight, scale, x)
    outputs = weight.shape[0]
    check(not swiglu or outputs % 2 == 0, f"swiglu takes an even number of channels, got {outputs}")
    _check_part("bias", bias, (outputs,), x.dtype)
    _check_part("norm", norm, (x.shape[1],), x.dtype)
    _check_part("residual", residual, (x.shape[0], outputs // 2 if swiglu else outputs), x.dtype)


def _check_weight(weight: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor) -> None:
    dtype, columns = weight.dtype, x.shape[1]
    per_element = PER_WORD if dtype == INT4 else 1
    fits = weight.dim() == 2 and weight.shape[0] > 0 and 0 < weight.shape[1] * per_element == columns
    expected = f"[N, {columns} / {per_element}]" if per_element > 1 else f"[N, {columns}]"
    stored = (torch.float8_e4m3fn, INT4)
    check(dtype in (x.dtype, *stored), f"weight must be {x.dtype}, float8_e4m3fn or int4 in int32, got {dtype}")
    check(
        fits and weight.is_contiguous(), f"weight must be contiguous {expected}, not empty, got {tuple(weight.shape)}"
    )
    check(
        (dtype in stored) == (scale is not None), f"scale goes with fp8 and int4 weights alone, the weight is {dtype}"
    )
    if dtype == INT4:
        assert scale is not None
        check_int4_scale(scale, weight.shape[0], columns)
    else:
        _check_part("scale", scale, (weight.shape[0],), torch.float32)


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
