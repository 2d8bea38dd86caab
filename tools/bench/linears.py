"""Inputs of decode_linear and dequantise: layers of published shapes, each with its norm, SwiGLU or residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastdms.ops.int4 import GROUPS, quantise_int4
from fastdms.tools.bench.spec import DTYPE, Case, Spec
from fastdms.tools.bench.timing import cold_sets
from fastdms.tools.shapes import SHAPES

__all__ = ["build_dequantise", "build_linear", "linear_options", "shortened"]


_MOST_CHECKED = 2**14


def build_linear(spec: Spec, device: torch.device, num_sets: int | None, normal: Callable[..., torch.Tensor]) -> Case:
    """Weights such that rows of unit spread give rows of unit spread."""
    layer = spec.linear.rpartition(".")[2]
    outputs, depth = _size(spec)
    num_bytes = _weight_bytes(spec)
    num_bytes += spec.rows * (depth * DTYPE.itemsize + outputs * (4 if layer == "lm_head" else DTYPE.itemsize))
    num_bytes += DTYPE.itemsize * (spec.rows * outputs if _adds(layer) else depth)  # residual or norm
    sets = []
    for _ in range(num_sets or cold_sets(num_bytes, device)):
        one = {"x": normal(spec.rows, depth), **_weight(spec, normal)}
        one |= {"residual": normal(spec.rows, outputs)} if _adds(layer) else {"norm": normal(depth)}
        sets.append(one)
    return Case(spec=spec, sets=sets, cache=None, num_bytes=num_bytes)


def build_dequantise(
    spec: Spec, device: torch.device, num_sets: int | None, normal: Callable[..., torch.Tensor]
) -> Case:
    """The same weights alone, in fp8 or int4."""
    num_bytes = _weight_bytes(spec) + _weight_bytes(replace(spec, weights="bf16"))
    sets = [_weight(spec, normal) for _ in range(num_sets or cold_sets(num_bytes, device))]
    return Case(spec=spec, sets=sets, cache=None, num_bytes=num_bytes)


def linear_options(spec: Spec) -> dict[str, Any]:
    """What a launch takes besides tensors."""
    layer = spec.linear.rpartition(".")[2]
    return {"norm_eps": 1e-5, "swiglu": layer == "gate_up", "fp32_out": layer == "lm_head"}


def shortened(spec: Spec) -> Spec:
    """The same layer with fewer outputs, yet so many that the kernel is cut as for all of them."""
    return replace(spec, most_outputs=_MOST_CHECKED)


def _size(spec: Spec) -> tuple[int, int]:
    """Output channels, and weights of each."""
    shape, _, layer = spec.linear.rpartition(".")
    c = SHAPES[shape]
    attended = c.num_heads * c.head_dim
    outputs, depth = {
        "qkv": (attended + 2 * c.num_kv_heads * c.head_dim, c.hidden_size),
        "o": (c.hidden_size, attended),
        "gate_up": (c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "lm_head": (c.vocab_size, c.hidden_size),
    }[layer]
    return min(outputs, spec.most_outputs or outputs), depth


def _channels(spec: Spec) -> int:
    """Rows of the weight, of gate and up together."""
    return _size(spec)[0] * (2 if spec.linear.endswith(".gate_up") else 1)


def _weight_bytes(spec: Spec) -> int:
    """With scales."""
    depth = _size(spec)[1]
    stored = {"bf16": DTYPE.itemsize * depth, "fp8": depth + 4, "int4": depth // 2 + 2 * depth // min(depth, GROUPS[0])}
    return _channels(spec) * stored[spec.weights]


def _weight(spec: Spec, normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    depth = _size(spec)[1]
    weight = normal(_channels(spec), depth) / depth**0.5
    if spec.weights == "int4":
        words, scale = quantise_int4(weight, min(depth, GROUPS[0]))
        return {"weight": words, "scale": scale}
    if spec.weights == "fp8":
        scale = weight.float().abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
        return {"weight": (weight / scale[:, None]).to(torch.float8_e4m3fn), "scale": scale}
    return {"weight": weight}


def _adds(layer: str) -> bool:
    return layer in ("o", "down")
