"""What the tests of decode_linear share: arguments of any layer, the definition in fp64, and what is right by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdms.ops import decode_linear
from fastdms.ops.int4 import GROUPS, INT4, quantise_int4
from tests.ops.harness import on
from tests.tolerance import LOGITS_RELATIVE, rounding_band

GPU = pytest.mark.gpu  # the interpreter rounds bf16 and fp8 wrongly
FP8 = torch.float8_e4m3fn
# (compute dtype, weight dtype)
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=GPU),
    pytest.param(torch.bfloat16, FP8, id="bf16-fp8", marks=GPU),
    pytest.param(torch.float16, FP8, id="fp16-fp8", marks=GPU),
    pytest.param(torch.float32, FP8, id="fp32-fp8", marks=GPU),
    pytest.param(torch.float32, INT4, id="fp32-int4"),
    pytest.param(torch.float16, INT4, id="fp16-int4"),
    pytest.param(torch.bfloat16, INT4, id="bf16-int4", marks=GPU),
]
FLAGS = ("norm", "bias", "residual", "swiglu", "fp32_out")
EPS = 1e-5


def make_inputs(
    rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, *,
    norm: bool = False, bias: bool = False, residual: bool = False, swiglu: bool = False, fp32_out: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call of ``n`` output channels; with int4 weights ``k`` becomes the next multiple of 32."""
    if weight_dtype == INT4:
        k = -(-k // GROUPS[-1]) * GROUPS[-1]
    channels = 2 * n if swiglu else n
    weight = torch.randn(channels, k) / k**0.5
    scale = None
    if weight_dtype == FP8:
        scale = weight.abs().amax(1) / torch.finfo(FP8).max
        weight = weight / scale[:, None]
    if weight_dtype == INT4:
        weight, scale = quantise_int4(weight, next(group for group in GROUPS if k % group == 0))
    return {
        "x": torch.randn(rows, k).to(dtype), "weight": weight.to(weight_dtype or dtype), "scale": scale,
        "bias": torch.randn(channels).to(dtype) if bias else None, "norm": torch.randn(k).to(dtype) if norm else None,
        "norm_eps": EPS, "residual": torch.randn(rows, n).to(dtype) if residual else None, "swiglu": swiglu,
        "fp32_out": fp32_out,
    }  # fmt: skip


def to_device(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def run_linear(backend: str, inputs: dict[str, Any], gaps: bool = False) -> torch.Tensor:
    """gaps: x and residual lie in larger buffers, of NaN."""
    with on(backend) as device:
        placed = to_device(device, inputs)
        for name in ("x", "residual") if gaps else ():
            if placed[name] is not None:
                rows, columns = placed[name].shape
                buffer = F.pad(placed[name], (0, 9, 0, 3), value=torch.nan)
                placed[name] = buffer[:rows, :columns]
        return decode_linear(**placed).cpu()


def exact_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An fp8 or int4 weight multiplied by its scale, fp64."""
    if weight.dtype != INT4:
        return weight.double() * scale[:, None]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    q = (weight[..., None] >> shifts & 15).double() - 8  # [N, K / 8, 8]
    return (q.view(*scale.shape, -1) * scale[..., None]).flatten(1)


def _whole(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with the weight multiplied by its scale."""
    weight, scale = inputs["weight"], inputs["scale"]
    return inputs if scale is None else inputs | {"weight": exact_weight(weight, scale), "scale": None}


def define_linear(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The definition in fp64; in another dtype with what each layer gives rounded to it."""
    given = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in _whole(inputs).items()}
    h, weight = given["x"], given["weight"]
    if given["norm"] is not None:
        h = h / (h.square().mean(-1, keepdim=True) + given["norm_eps"]).sqrt() * given["norm"]
        h = h.to(dtype).double()
    y = h @ weight.T
    if given["bias"] is not None:
        y = y + given["bias"]
    if given["swiglu"]:
        gate, up = y.to(dtype).double().chunk(2, -1)
        y = F.silu(gate) * up
    if given["residual"] is not None:
        y = y.to(dtype).double() + given["residual"]
    return y


def assert_right(out: torch.Tensor, inputs: dict[str, Any]) -> None:
    """No element further off than roundings of its terms can move it, however they cancel."""
    oracle = define_linear(inputs)
    sizes = {name: x.float().abs() if isinstance(x, torch.Tensor) else x for name, x in _whole(inputs).items()}
    terms = define_linear(sizes)
    of_terms = LOGITS_RELATIVE + (torch.finfo(inputs["x"].dtype).eps if inputs["norm"] is not None else 0.0)
    error = (out.double() - oracle).abs()
    assert out.dtype == (torch.float32 if inputs["fp32_out"] else inputs["x"].dtype)
    assert bool((error <= rounding_band(oracle, out.dtype) + of_terms * terms).all()), f"off by up to {error.max():.3g}"
