"""A transformers configuration, from config.json or from a model object, as a ModelConfig."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from fastdms.config import Family, ModelConfig, RopeConfig
from fastdms.rope import check_rope_type, rope_config

__all__ = ["FAMILIES", "parse_config", "published_values"]

FAMILIES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MOST_LAYERS = 10_000  # far more than any has; a config class of transformers makes a list of as many
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_READ = (
    *_SIZES,
    *("rms_norm_eps", "hidden_act"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def parse_config(
    values: Mapping[str, Any], generation: Mapping[str, Any], where: str, weight_dtype: torch.dtype
) -> ModelConfig:
    """Reads a model's configuration; code that it refers to (``auto_map``) is never run.

    values: the object in config.json, or ``PreTrainedConfig.to_dict()``; keys that the family doesn't read are ignored.
    generation: the object in generation_config.json, whose end tokens count beside those of ``values``.
    where: file or object name that messages begin with.

    Raises ValueError for an unsupported architecture, rope type, activation, sliding window, partial rotation or
    quantised checkpoint, by name, and for values that make no model.
    """
    try:
        family = _family(values)
        _refuse_quantised(values)
        _check_sizes(values)
        rope = values.get("rope_parameters") or values.get("rope_scaling")
        if isinstance(rope, Mapping):
            check_rope_type(rope.get("rope_type", rope.get("type", "default")))
        config = _standardised(family, values)
        _refuse_variants(config)
        return ModelConfig(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            rms_norm_eps=_epsilon(config.rms_norm_eps),
            max_position_embeddings=config.max_position_embeddings,
            rope=_rope(config.rope_parameters),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and _flag(config, "attention_bias")),
            o_bias=family in ("llama", "qwen3") and _flag(config, "attention_bias"),
            mlp_bias=family == "llama" and _flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            bos_token_id=_token_id("bos_token_id", config.bos_token_id),
            eos_token_ids=_end_tokens(values, generation, config),
            weight_dtype=weight_dtype,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def published_values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model in bf16 without biases; ``parse_config`` reads it, and so do others."""
    rope = config.rope
    scaling = {} if rope.type == "default" else {"rope_scaling": {"rope_type": rope.type, **dict(rope.parameters)}}
    return {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        **scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": "bfloat16",
    }


def _family(values: Mapping[str, Any]) -> Family:
    model_type, architectures = values.get("model_type"), values.get("architectures")
    supported = ", ".join(FAMILIES.values())
    for family, name in FAMILIES.items():
        # Model-Optimizer writes its own class names, with DMS at the end, for the same decoder.
        if family == model_type and (not architectures or architectures in ([name], [f"{name}DMS"])):
            return family
    raise ValueError(
        f"model_type {model_type!r} with architectures {architectures!r} is not supported; supported are {supported}"
    )


def _refuse_quantised(values: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        found = values.get(key)
        if found:
            method = found.get("quant_method") if isinstance(found, Mapping) else found
            raise ValueError(
                f"{key}: weights quantised by {method!r} are not supported; use an unquantised checkpoint, one of "
                "llm-compressor in int4 (quant_method 'compressed-tensors') or a GGUF"
            )


def _check_sizes(values: Mapping[str, Any]) -> None:
    for name in _SIZES:
        value = values.get(name)
        if value is None and name in _REQUIRED:
            raise ValueError(f"{name} is missing")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if values["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS:,}")


def _standardised(family: Family, values: Mapping[str, Any]) -> Any:
    """The family's config class over the keys read here: defaults filled in, old rope keys brought up to date."""
    read = {name: copy.deepcopy(values[name]) for name in _READ if name in values}
    try:
        config = transformers.AutoConfig.for_model(family, **read)
        # Once more, as the rotary modules do: original_max_position_embeddings may stand outside rope_parameters.
        config.standardize_rope_params()
        return config
    # The class runs all sorts of arithmetic on what the file says before it validates it.
    except Exception as error:
        raise ValueError(f"not a valid {family} configuration: {type(error).__name__}: {error}") from error


def _refuse_variants(config: Any) -> None:
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; supported is 'silu'")
    window = getattr(config, "sliding_window", None)
    if window is not None:
        raise ValueError(f"sliding_window {window!r} is not supported: only models with full attention are")
    layer_types = getattr(config, "layer_types", None) or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types must be a list, got {layer_types!r}")
    other = sorted({str(kind) for kind in layer_types if kind != "full_attention"})
    if other:
        raise ValueError(f"layer_types {other} are not supported; supported is 'full_attention'")


def _rope(parameters: Any) -> RopeConfig:
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {parameters!r}")
    partial = parameters.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise ValueError(f"partial_rotary_factor {partial!r} is not supported: whole heads are rotated")
    if parameters.get("mrope_section") is not None:
        raise ValueError("rope with mrope_section (multimodal positions) is not supported")
    return rope_config(parameters.get("rope_type"), parameters.get("rope_theta"), parameters)


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    if given is not None:
        return int(given)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    return int(config.hidden_size // config.num_attention_heads)


def _epsilon(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError(f"rms_norm_eps must be a positive number, got {value!r}")
    return float(value)


def _flag(config: Any, name: str) -> bool:
    value = getattr(config, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _end_tokens(values: Mapping[str, Any], generation: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    found: set[int] = set()
    sources = [generation.get("eos_token_id")]
    # A class default (Llama's is 2) only speaks where neither file does.
    if "eos_token_id" in values or generation.get("eos_token_id") is None:
        sources.append(config.eos_token_id)
    for source in sources:
        for item in source if isinstance(source, list) else [source]:
            token = _token_id("eos_token_id", item)
            if token is not None:
                found.add(token)
    return tuple(sorted(found))


def _token_id(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a token id, got {value!r}")
    return value
