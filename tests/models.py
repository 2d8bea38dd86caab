"""Tiny random models of every supported family, and folders of them in every DMS checkpoint layout.

The weights are drawn so that a mistake shows: attention is far from uniform, logits are spread, norm weights and
biases are far from 1 and 0, the slowest RoPE pair turns visibly within a few tokens, and about half of the tokens
are flagged for eviction in every layer and KV head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastdms.config import DMSConfig

Layout = Literal["none", "shisa", "nvidia", "adapter"]
AdapterWeights = dict[int, tuple[torch.Tensor, torch.Tensor]]

LAYOUTS: tuple[Layout, ...] = ("none", "shisa", "nvidia", "adapter")
DMS_LAYOUTS: tuple[Layout, ...] = LAYOUTS[1:]
VOCAB_SIZE = 300
HIDDEN_SIZE = 64
HEAD_DIM = 16

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}

# family -> (config class, model class, what differs from the common shape)
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama_group3": (LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 6, "hidden_size": 96}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model on the CPU, in eval mode: 2 layers, 4 query and 2 KV heads (6 and 2 for ``llama_group3``).

    overrides: fields of the transformers config, such as ``num_hidden_layers=3``.
    """
    config_class, model_class, specific = _FAMILIES[family]
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _DEFAULT_ROPE,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    model = model_class(config_class(**(shape | specific | overrides))).to(torch.float32).eval()
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model


def tiny_tokens(count: int, *, seed: int = 0) -> list[int]:
    """Random token ids without the special ones (0, 1, 2)."""
    return torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def adapter_weights(model: PreTrainedModel, *, seed: int = 100) -> AdapterWeights:
    """layer -> (norm weight [hidden], projection [Hkv, hidden]), both fp32."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    hidden = config.hidden_size
    return {
        layer: (
            torch.empty(hidden).uniform_(0.5, 1.5, generator=generator),
            torch.empty(config.num_key_value_heads, hidden).normal_(std=hidden**-0.5, generator=generator),
        )
        for layer in range(config.num_hidden_layers)
    }


def dms_config(layout: Layout, window_tokens: int = 7) -> DMSConfig | None:
    """What a folder of this layout means, spelled out by hand."""
    if layout == "none":
        return None
    meaning: dict[str, Any] = {
        "shisa": {"shift": 0, "zero_borrowed": "pre_rope"},
        "nvidia": {"shift": 1, "zero_borrowed": "pre_and_post_rope"},
        "adapter": {"shift": 1, "source": "adapter"},
    }[layout]
    return DMSConfig(window_tokens=window_tokens, target_compression=8.0, **meaning)


def save_checkpoint(
    model: PreTrainedModel,
    folder: str | Path,
    layout: Layout = "none",
    *,
    window_tokens: int = 7,
    adapter: AdapterWeights | None = None,
) -> Path:
    """Write ``model`` as a safetensors folder that declares DMS the way the public family ``layout`` does.

    adapter: for the layout of that name; ``adapter_weights(model)`` when None.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    if layout == "shisa":
        metadata = {"window_size": window_tokens, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8.0}
        (folder / "dms_metadata.json").write_text(json.dumps(metadata))
    elif layout in ("nvidia", "adapter"):
        keys = {
            "dms_window_size": window_tokens,
            "dms_alpha_scale": 100.0,
            "dms_initial_alpha_offset": 5.0,
            "dms_cr": 8,
        }
        if layout == "nvidia":
            _update_config(folder, keys | _auto_map(model, "configuration_{}_dms", "modeling_{}_dms", ""))
        else:
            separate = {"dms_separate_alpha": True, "dms_alpha_per": "head"}
            _update_config(folder, keys | separate | _auto_map(model, "configuration_{}", "modeling_{}", "DMS"))
            _add_adapter(folder, adapter or adapter_weights(model))
    return folder


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """A linear layer gets rows of length ``gain``: its outputs have about that spread on a normalised input."""
    gains = {"q_proj": 1.6, "k_proj": 1.6, "v_proj": 1.0, "o_proj": 1.2, "gate_proj": 1.0, "up_proj": 1.0}
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2]
        if owner in ("q_norm", "k_norm"):
            parameter.uniform_(1.0, 2.2, generator=generator)
        elif "norm" in owner:
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(".bias"):
            parameter.normal_(std=0.3, generator=generator)
        elif owner == "embed_tokens":
            parameter.normal_(std=0.4, generator=generator)
        else:
            gain = gains.get(owner, 3.0 if owner == "lm_head" else 1.2)
            parameter.normal_(std=gain * parameter.shape[1] ** -0.5, generator=generator)


def _auto_map(model: PreTrainedModel, configuration: str, modeling: str, suffix: str) -> dict[str, Any]:
    family = model.config.model_type
    config_class, model_class = type(model.config).__name__, type(model).__name__
    return {
        "auto_map": {
            "AutoConfig": f"{configuration.format(family)}.{config_class}{suffix}",
            "AutoModelForCausalLM": f"{modeling.format(family)}.{model_class}{suffix}",
        }
    }


def _update_config(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=2))


def _add_adapter(folder: Path, adapter: AdapterWeights) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer, (norm, weight) in adapter.items():
        prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        tensors |= {f"{prefix}.weight": weight.contiguous(), f"{prefix}_norm.weight": norm.contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})
