"""Rotary position embedding: the cos and sin tables of every scaling type that the supported families use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdms.config import ModelConfig, RopeConfig

__all__ = ["ROPE_TYPES", "check_rope_type", "inverse_frequencies", "rope_config", "rope_tables"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}

ROPE_TYPES: tuple[str, ...] = tuple(_REQUIRED)


def check_rope_type(rope_type: object) -> str:
    """Returns ``rope_type``; raises ValueError if it is none of ``ROPE_TYPES``."""
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    return rope_type


def rope_config(
    rope_type: object, theta: object, values: Mapping[str, Any], factors: tuple[float, ...] = ()
) -> RopeConfig:
    """Checks the parameters of one rope type as a checkpoint writes them and keeps those that the type reads.

    values: parameter name -> number (``truncate``: bool); None counts as absent, names of other types are ignored.
    factors: divisors of the inverse frequencies, one for each of the ``head_dim / 2`` pairs, or none.

    Raises ValueError for an unknown type, a missing parameter and a value that isn't a positive finite number.
    """
    kind = check_rope_type(rope_type)
    parameters: dict[str, float | bool] = {}
    for name in (*_REQUIRED[kind], *_OPTIONAL.get(kind, ())):
        value = values.get(name)
        if value is None:
            if name in _REQUIRED[kind]:
                raise ValueError(f"rope type {kind!r} needs {name}, which is missing")
        elif name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"rope parameter truncate must be true or false, got {value!r}")
            parameters[name] = value
        else:
            parameters[name] = _positive(f"rope parameter {name}", value)
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ValueError(
            f"rope parameter high_freq_factor must be above low_freq_factor, got {parameters['high_freq_factor']} "
            f"and {parameters['low_freq_factor']}"
        )
    base = _positive("rope_theta", theta)
    if base <= 1:
        raise ValueError(f"rope_theta must be above 1, got {base}")
    return RopeConfig(
        type=kind,
        theta=base,
        parameters=tuple(parameters.items()),
        factors=tuple(_positive("rope frequency factor", factor) for factor in factors),
    )


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines that rotate q and k at positions 0 to ``num_positions - 1``.

    Returns cos, sin: [num_positions, head_dim / 2] fp32 on the CPU, yarn's attention scaling folded in. Pair ``i`` of a
    head is channels ``i`` and ``i + head_dim / 2``.

    Raises ValueError when ``num_positions`` is below 1, and for type ``dynamic`` when it exceeds
    ``max_position_embeddings``: beyond it every key would have to be rotated anew at each step, and keys are cached
    after rotation.
    """
    if num_positions < 1:
        raise ValueError(f"num_positions must be at least 1, got {num_positions}")
    if config.rope.type == "dynamic" and num_positions > config.max_position_embeddings:
        raise ValueError(
            f"rope type 'dynamic' changes with the running length beyond {config.max_position_embeddings} positions, "
            f"which a cache of rotated keys can't follow; {num_positions} positions were asked for"
        )
    inv_freq, attention_factor = inverse_frequencies(config)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position for each pair, [head_dim / 2] fp32, and the factor that cos and sin are multiplied by."""
    rope, dim = config.rope, config.head_dim
    check_rope_type(rope.type)
    parameters = dict(rope.parameters)
    # fp32 throughout, in the training code's order: at position 100,000 one ulp of a frequency shows in the angle.
    periods = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    frequencies = 1.0 / periods
    attention_factor = 1.0
    if rope.type == "linear":
        frequencies = frequencies / parameters["factor"]
    elif rope.type == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif rope.type == "yarn":
        frequencies = _yarn(periods, parameters, rope.theta)
        attention_factor = _yarn_attention_factor(parameters)
    if rope.factors:
        if len(rope.factors) != dim // 2:
            raise ValueError(f"{len(rope.factors)} rope frequency factors for the {dim // 2} pairs of a head")
        frequencies = frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    return frequencies, attention_factor


def _llama3(frequencies: Tensor, parameters: Mapping[str, float | bool]) -> Tensor:
    """Slow pairs are divided by ``factor``, fast ones kept, those between blended by their turns per old context."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    keep = (context / wavelength - low) / (high - low)
    blended = (1 - keep) * frequencies / parameters["factor"] + keep * frequencies
    scaled = torch.where(wavelength < context / high, frequencies, blended)
    return torch.where(wavelength > context / low, frequencies / parameters["factor"], scaled)


def _yarn(periods: Tensor, parameters: Mapping[str, float | bool], theta: float) -> Tensor:
    """Pairs that turn more than ``beta_fast`` times in the old context are kept, below ``beta_slow`` interpolated."""
    dim, context = 2 * len(periods), parameters["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast", 32.0)), pair_turning(parameters.get("beta_slow", 1.0))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return 1.0 / (parameters["factor"] * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_attention_factor(parameters: Mapping[str, float | bool]) -> float:
    if "attention_factor" in parameters:
        return parameters["attention_factor"]

    def scale(mscale: float) -> float:
        return 1.0 if parameters["factor"] <= 1 else 0.1 * mscale * math.log(parameters["factor"]) + 1.0

    if "mscale" in parameters and "mscale_all_dim" in parameters:
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)
