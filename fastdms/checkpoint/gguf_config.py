"""A GGUF file's metadata as a ModelConfig, and its tensor names as transformers' names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from fastdms.checkpoint.gguf_header import GGUFArray, GGUFTensor, Scalar
from fastdms.config import Family, ModelConfig, RopeConfig
from fastdms.rope import rope_config

__all__ = ["ROPE_FACTORS", "parse_gguf_config", "transformers_name"]

# Mistral models are written as llama; the decoder is the same.
_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_MODULES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def transformers_name(tensor: GGUFTensor, config: ModelConfig) -> str:
    """The name that transformers gives a weight. Raises ValueError for one that the family doesn't have."""
    if tensor.name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[tensor.name]
    match = _LAYER_TENSOR.fullmatch(tensor.name)
    modules = _LAYER_MODULES | (_QWEN3_MODULES if config.qk_norm else {})
    if match is None or match[2] not in modules or int(match[1]) >= config.num_layers:
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name} is not part of a {config.family} model of {config.num_layers} layers"
        )
    return f"model.layers.{match[1]}.{modules[match[2]]}.{match[3]}"


def parse_gguf_config(
    metadata: Mapping[str, Scalar],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: tuple[float, ...],
    weight_dtype: torch.dtype,
) -> ModelConfig:
    """Reads the model's description.

    shapes: of all tensors, under their GGUF names; they tell the vocabulary, which biases there are, and tying.
    rope_factors: the tensor ``rope_freqs.weight``, or empty.

    Raises ValueError for an unsupported architecture or variant, by name, and for missing or wrong metadata.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(_FAMILIES)}")
    keys = _Keys(metadata, architecture)
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError(f"tensor token_embd.weight must have two dimensions, got shape {embedding}")
    num_heads, hidden_size = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if num_heads < 1 or hidden_size < 1:
        raise ValueError(f"{architecture}.attention.head_count and .embedding_length must be positive")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    context = keys.integer("context_length")
    _refuse_variants(keys, head_dim)
    if rope_factors and len(rope_factors) != head_dim // 2:
        raise ValueError(f"tensor {ROPE_FACTORS} holds {len(rope_factors)} factors, a head has {head_dim // 2} pairs")
    end_tokens = {keys.token_id(key) for key in _END_KEYS} - {None}
    return ModelConfig(
        family=_FAMILIES[architecture],
        vocab_size=embedding[0],
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=keys.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=context,
        rope=_rope(keys, context, rope_factors),
        tie_word_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm=architecture == "qwen3",
        bos_token_id=keys.token_id("bos_token_id"),
        eos_token_ids=tuple(sorted(token for token in end_tokens if token is not None)),
        weight_dtype=weight_dtype,
    )


class _Keys:
    """Typed access to one architecture's keys; a missing key without a default is a ValueError."""

    def __init__(self, metadata: Mapping[str, Scalar], architecture: str) -> None:
        self._metadata = metadata
        self._prefix = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        full = f"{self._prefix}.{key}"
        value = self._metadata.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{full} must be one integer, got {_shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self._prefix}.{key}"
        value = self._metadata.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{full} must be a finite number, got {_shown(value)}")
        return float(value)

    def positive(self, key: str) -> float:
        value = self.number(key)
        if value <= 0:
            raise ValueError(f"{self._prefix}.{key} must be positive, got {value}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._metadata.get(f"{self._prefix}.{key}", default)
        if not isinstance(value, str):
            raise ValueError(f"{self._prefix}.{key} must be text, got {_shown(value)}")
        return value

    def token_id(self, key: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"tokenizer.ggml.{key} must be a token id, got {_shown(value)}")
        return value


def _refuse_variants(keys: _Keys, head_dim: int) -> None:
    if keys.integer("expert_count", 0):
        raise ValueError("mixture-of-experts models are not supported")
    window = keys.integer("attention.sliding_window", 0)
    if window:
        raise ValueError(f"sliding_window {window} is not supported: only models with full attention are")
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise ValueError(f"{key} {keys.integer(key)} is not supported: it must be the head size {head_dim}")


def _rope(keys: _Keys, context: int, factors: tuple[float, ...]) -> RopeConfig:
    # A file without a type but with a factor means linear scaling.
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    theta = keys.number("rope.freq_base", 10000.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return rope_config("default", theta, {}, factors)
    values: dict[str, float] = {"factor": factor}
    if kind == "yarn":
        for key, neutral in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            if keys.number(f"rope.scaling.{key}", neutral) != neutral:
                raise ValueError(f"rope.scaling.{key} {keys.number(f'rope.scaling.{key}')} is not supported")
        values["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length", context)
        values["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        values["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
        if factor > 0:
            attention = keys.number("rope.scaling.attn_factor", 1.0)
            values["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return rope_config(kind, theta, values, factors)


def _shown(value: object) -> str:
    return f"an array of {value.length}" if isinstance(value, GGUFArray) else repr(value)
