"""The linear layers of a decoder: in the compute dtype, fp8 or int4, and what fused ones are made of."""

from __future__ import annotations

import torch
from torch import nn

from fastdms.config import ModelConfig
from fastdms.ops import dequantise
from fastdms.ops.int4 import GROUPS, INT4, PER_WORD

__all__ = ["PARTS", "Linear", "LinearMaker", "empty", "int4_group"]

# What a fused layer is made of, by published names.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Linear(nn.Module):
    """``weight [outputs, inputs]`` with perhaps a ``bias``; one in fp8 is multiplied by ``scale [outputs]`` fp32.

    int4 is int32 ``[outputs, inputs / 8]`` with ``scale [outputs, inputs / group]``, as ``decode_linear`` takes them.
    """

    def __init__(
        self, weight: nn.Parameter, scale: nn.Parameter | None = None, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in the compute dtype, rounded to it once; of fp8 and int4 a copy that is the caller's."""
        if self.scale is None:
            return self.weight
        return dequantise(self.weight, self.scale, dtype)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter that no gradient goes through, yet to be filled."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def int4_group(config: ModelConfig) -> int:
    """How many weights of a row share a scale where a model is made int4: the most that fits all its layers.

    Raises ValueError that names a layer where nothing does.
    """
    inputs = {
        "self_attn.q_proj": config.hidden_size,
        "self_attn.o_proj": config.num_heads * config.head_dim,
        "mlp.down_proj": config.intermediate_size,
    }
    for group in GROUPS:
        odd = [f"model.layers.0.{name} has {size} inputs" for name, size in inputs.items() if size % group]
        if not odd:
            return group
    raise ValueError(f"int4 weights come in groups of {', '.join(map(str, GROUPS))} of a row, and {odd[0]}")


class LinearMaker:
    """Makes the empty linear layers of a decoder. ``weight_dtype`` and ``head_dtype`` as ``Decoder`` has them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        weight_dtype: torch.dtype,
        head_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._weight_dtype, self._head_dtype = config, weight_dtype, head_dtype
        self.dtype, self.device = dtype, device

    def layer(self, index: int, layer: str, inputs: int, outputs: int, bias: bool) -> Linear:
        """The fused layer of that name in ``PARTS``; what a checkpoint stores as int4 decides, if it stores any."""
        names = tuple(f"model.layers.{index}.{part}" for part in PARTS[layer])
        stored, kind = self._config.int4, self._weight_dtype
        if stored is not None:
            kind = INT4 if stored.has(names) else self.dtype
        return self._linear(names[0], inputs, outputs, bias, kind)

    def head(self, inputs: int, outputs: int) -> Linear:
        """The output head, by the same rule."""
        stored = self._config.int4
        kind = INT4 if stored is not None and stored.has(("lm_head",)) else self._head_dtype
        return self._linear("lm_head", inputs, outputs, False, kind)

    def _linear(self, name: str, inputs: int, outputs: int, bias: bool, weight_dtype: torch.dtype) -> Linear:
        place = {"device": self.device}
        scale = None
        if weight_dtype == INT4:
            group, scale_dtype = self._group(name, inputs)
            weight = empty(outputs, inputs // PER_WORD, dtype=INT4, **place)
            scale = empty(outputs, inputs // group, dtype=scale_dtype, **place)
        else:
            weight = empty(outputs, inputs, dtype=weight_dtype, **place)
            if weight_dtype == torch.float8_e4m3fn:
                scale = empty(outputs, dtype=torch.float32, **place)
        return Linear(weight, scale, empty(outputs, dtype=self.dtype, **place) if bias else None)

    def _group(self, name: str, inputs: int) -> tuple[int, torch.dtype]:
        stored = self._config.int4
        if stored is None or name not in stored.names:
            return int4_group(self._config), torch.bfloat16
        if inputs % stored.group:
            raise ValueError(f"{name} has {inputs} inputs, which are no whole groups of {stored.group} int4 weights")
        return stored.group, stored.scale_dtype
