"""Fill a decoder from a stream of checkpoint tensors, fusing projections on the way."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastdms.decoder import Decoder, DecoderLayer

__all__ = ["load_weights"]


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy each tensor, by its published name, into its place; one tensor at a time, cast to the decoder's dtype.

    Raises ValueError when a tensor is missing, unknown, given twice, of the wrong shape or not floating point.
    """
    places = _places(decoder)
    ignored = _ignored(decoder)
    seen: set[str] = set()
    for name, tensor in tensors:
        if name not in places:
            if name in ignored or name.endswith("rotary_emb.inv_freq"):
                continue
            raise ValueError(f"tensor {name} has no place in this model; its config does not announce it")
        if name in seen:
            raise ValueError(f"tensor {name} occurs twice")
        seen.add(name)
        place = places[name]
        if tensor.shape != place.shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(place.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {name} is {tensor.dtype}; only floating point weights are supported")
        place.copy_(tensor)
    missing = sorted(places.keys() - seen)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"the checkpoint lacks {shown}")


def _places(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Published tensor name -> the (part of the) parameter that it fills."""
    places: dict[str, torch.Tensor] = {"model.embed_tokens.weight": decoder.embed, "model.norm.weight": decoder.norm}
    if not decoder.config.tie_word_embeddings:
        places["lm_head.weight"] = decoder.lm_head
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for name, tensor in _layer_places(layer).items():
            places[f"model.layers.{index}.{name}"] = tensor
    return {name: tensor.data for name, tensor in places.items()}


def _layer_places(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    query, key = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    places: dict[str, torch.Tensor] = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_norm,
    }
    places |= _parts(layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (query, key, key))
    places |= _parts(layer.o, ("self_attn.o_proj",), (layer.o.out_features,))
    places |= _parts(layer.gate_up, ("mlp.gate_proj", "mlp.up_proj"), (layer.gate_up.out_features // 2,) * 2)
    places |= _parts(layer.down, ("mlp.down_proj",), (layer.down.out_features,))
    if layer.q_norm is not None and layer.k_norm is not None:
        places |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
    if layer.alpha is not None and layer.alpha_norm is not None:
        places |= {
            "self_attn.dms_proj_alpha.weight": layer.alpha.weight,
            "self_attn.dms_proj_alpha_norm.weight": layer.alpha_norm,
        }
    return places


def _parts(linear: nn.Linear, names: tuple[str, ...], rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    places = {f"{name}.weight": part for name, part in zip(names, linear.weight.split(rows), strict=True)}
    if linear.bias is not None:
        places |= {f"{name}.bias": part for name, part in zip(names, linear.bias.split(rows), strict=True)}
    return places


def _ignored(decoder: Decoder) -> set[str]:
    """Tensors that a checkpoint may carry and this decoder has no use for."""
    names = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set()
    if decoder.dms is None or decoder.dms.source != "adapter":
        for index in range(decoder.config.num_layers):
            names |= {
                f"model.layers.{index}.self_attn.{name}.weight" for name in ("dms_proj_alpha", "dms_proj_alpha_norm")
            }
    return names
