"""``fastdms::dequantise``: schema, check and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.int4 import INT4, PER_WORD, check_int4_scale
from fastdms.ops.registry import register
from fastdms.ops.span_cache import check

SCHEMA = "dequantise(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    check(dtype in _DTYPES, f"dtype must be fp32, fp16 or bf16, got {dtype}")
    check(
        weight.dtype in (torch.float8_e4m3fn, INT4),
        f"weight must be float8_e4m3fn or int4 in int32, got {weight.dtype}",
    )
    check(
        weight.dim() == 2 and weight.numel() > 0 and weight.is_contiguous(),
        f"weight must be contiguous [N, K], of int4 [N, K / 8], not empty, got {tuple(weight.shape)}",
    )
    if weight.dtype == INT4:
        check_int4_scale(scale, weight.shape[0], weight.shape[1] * PER_WORD)
    else:
        check(
            scale.dtype == torch.float32 and scale.shape == weight.shape[:1] and scale.stride(-1) == 1,
            f"scale of an fp8 weight must be {torch.float32} {tuple(weight.shape[:1])} with unit stride, got "
            f"{scale.dtype} {tuple(scale.shape)}",
        )


def _fake(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.new_empty((rows, columns * (PER_WORD if weight.dtype == INT4 else 1)), dtype=dtype)


register(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference="fastdms.ops.dequantise.reference:dequantise",
    kernel="fastdms.ops.dequantise.kernel:dequantise",
)
