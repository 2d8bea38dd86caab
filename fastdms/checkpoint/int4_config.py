"""int4 weights in a checkpoint: the "pack-quantized" format of compressed-tensors, which llm-compressor writes.

A layer ``X`` is three tensors in place of ``X.weight [N, K]``: ``X.weight_packed`` int32 ``[N, K / 8]`` and
``X.weight_scale [N, K / group]``, as ``fastdms.ops.int4`` takes them, and ``X.weight_shape``, which is ``[N, K]``.
Which layers are stored so, their tensors say; config.json says in groups of how many, under ``quantization_config``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fastdms.config import Int4Layers
from fastdms.ops.int4 import GROUPS

__all__ = ["int4_layers", "quantization_config", "read_group"]

_KEY = "quantization_config"
_PACKED, _SCALE = ".weight_packed", ".weight_scale"
# What else a configuration may say, and mean the same: each key's values, besides its absence.
_FORMAT: dict[str, tuple[Any, ...]] = {
    "format": ("pack-quantized",),
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_SCHEME: dict[str, tuple[Any, ...]] = {
    "format": ("pack-quantized", None),
    "input_activations": (None,),
    "output_activations": (None,),
}
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": GROUPS,
    "dynamic": (False,),
    "actorder": (None, "weight", "static"),  # groups of neighbours all the same
    "block_structure": (None,),
}
_NEEDED = ("num_bits", "strategy", "group_size")


def read_group(values: Mapping[str, Any]) -> int | None:
    """Weights of a group, by a model's configuration; None where it isn't compressed-tensors'.

    Raises ValueError, naming the key, for what compressed-tensors can store and this runtime can't read.
    """
    found = values.get(_KEY)
    if not isinstance(found, Mapping) or found.get("quant_method") != "compressed-tensors":
        return None
    _check(_KEY, found, _FORMAT, ("format",))
    schemes = found.get("config_groups")
    if not isinstance(schemes, Mapping) or not schemes:
        raise ValueError(f"{_KEY}: config_groups must be a non-empty object, got {schemes!r}")
    groups = set()
    for name, scheme in schemes.items():
        where = f"{_KEY}: config_groups: {name}"
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(f"{where}: weights must be an object, got {weights!r}")
        _check(where, scheme, _SCHEME)
        _check(f"{where}: weights", weights, _WEIGHTS, _NEEDED)
        groups.add(weights["group_size"])
    if len(groups) > 1:
        raise ValueError(f"{_KEY}: groups of different sizes {sorted(groups)} in one model are not supported")
    return int(groups.pop())


def int4_layers(group: int, dtypes: Mapping[str, torch.dtype]) -> Int4Layers:
    """What a checkpoint with these tensors stores as int4; ValueError where that is nothing."""
    scales = [dtype for name, dtype in dtypes.items() if name.endswith(_SCALE)]
    names = tuple(sorted(name.removesuffix(_PACKED) for name in dtypes if name.endswith(_PACKED)))
    if not names or not scales:
        raise ValueError(f"{_KEY} announces int4 weights, but there is no tensor {_PACKED} with its {_SCALE}")
    return Int4Layers(names=names, group=group, scale_dtype=functools.reduce(torch.promote_types, scales))


def quantization_config(group: int, ignore: list[str]) -> dict[str, Any]:
    """The object that announces all linear layers but those of ``ignore``, as llm-compressor writes it."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "config_groups": {"group_0": scheme}, "ignore": ignore,
    }  # fmt: skip


def _check(
    where: str, values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], needed: tuple[str, ...] = ()
) -> None:
    for key, choices in allowed.items():
        value = values.get(key)
        if (key in values or key in needed) and not any(value == c and type(value) is type(c) for c in choices):
            raise ValueError(
                f"{where}: {key} {value!r} is not supported; supported is {' or '.join(map(repr, choices))}"
            )
