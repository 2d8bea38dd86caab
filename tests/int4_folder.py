"""Folders in compressed-tensors' pack-quantized format, and what their weights are, made without the runtime's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import tiny_model


def int4_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose layers can be cut into groups of 32 and 64."""
    return tiny_model(family, **{"intermediate_size": 128} | overrides)


def rounded(weight: Tensor, group: int, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Whole numbers ``[N, K]`` and scales ``[N, K / group]``: the largest of a group, with its sign, becomes -8."""
    groups = weight.detach().float().reshape(len(weight), -1, group)
    largest = groups.max(-1).values
    lowest = groups.min(-1).values
    scale = (torch.where(largest > -lowest, largest, lowest) / -8).to(scale_dtype)
    q = torch.round(groups / scale.float()[..., None]).clamp(-8, 7)
    return q.reshape(weight.shape), scale


def packed(q: Tensor) -> Tensor:
    """Eight to a word, the first in the lowest bits."""
    nibbles = (q.numpy() + 8).astype(np.uint32).reshape(len(q), -1, 8)
    words = np.zeros(nibbles.shape[:-1], np.uint32)
    for place in range(8):
        words |= nibbles[..., place] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def scheme(group: int) -> dict[str, Any]:
    """What llm-compressor writes about a layer."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}


def announcement(group: int, *ignore: str) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": list(ignore),
        "config_groups": {"group_0": scheme(group)},
    }  # fmt: skip


def through_int4(
    model: PreTrainedModel, family: str, group: int, *, scale_dtype: torch.dtype = torch.bfloat16, head: str = "fp8",
    ignore: tuple[str, ...] = (),
) -> PreTrainedModel:  # fmt: skip
    """The same model with its linear layers rounded; ``head``: int4, fp8 or as it is; a tied one becomes its own."""
    other = int4_model(family, tie_word_embeddings=False, **_sizes(model))
    other.load_state_dict(model.state_dict())
    for name, layer in other.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name in ignore:
            continue
        kind = head if name == "lm_head" else "int4"
        if kind == "int4":
            q, scale = rounded(layer.weight, group, scale_dtype)
            layer.weight.data = q * scale.float().repeat_interleave(group, 1)
        elif kind == "fp8":
            row_scale = layer.weight.data.abs().amax(1, keepdim=True) / 448
            layer.weight.data = (layer.weight.data / row_scale).to(torch.float8_e4m3fn).float() * row_scale
    return other


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}


def pack_folder(
    folder: Path, group: int, *, scale_dtype: torch.dtype = torch.bfloat16, ignore: tuple[str, ...] = ("lm_head",)
) -> Path:
    """Rewrite a folder in place, all linear layers but those of ``ignore`` and a DMS adapter's."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if tensor.dim() == 2 and "embed" not in name and "dms" not in name and layer not in ignore:
            q, scale = rounded(tensor, group, scale_dtype)
            tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"] = packed(q), scale
            tensors[f"{layer}.weight_shape"] = torch.tensor(tensor.shape)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = announcement(group, *ignore)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
