"""Fill a decoder from a stream of checkpoint tensors, fusing projections on the way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastdms.decoder import Decoder, DecoderLayer
from fastdms.linear import PARTS, Linear
from fastdms.ops.int4 import INT4, PER_WORD, quantise_int4
from fastdms.ops.quantise import FP8_MAX

__all__ = ["load_weights", "weight_shapes"]

_BLOCK_VALUES = 2**22  # that are quantised at a time


class _Place(NamedTuple):
    """The (part of the) parameter that a tensor fills, with the scales of its rows where it is quantised on the way.

    expected: what the tensor must hold, and no more than that.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    expected: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        shape = self.values.shape
        packs = self.scale is not None and self.values.dtype == INT4
        return torch.Size((shape[0], shape[1] * PER_WORD)) if packs else shape


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy each tensor, by its published name, into its place; one tensor at a time, cast to the decoder's dtype.

    fp8 weights are quantised from the tensor as it is given, row by row: ``scale = max|row| / 448``; int4 weights as
    ``quantise_int4`` says, or copied where the checkpoint stores them.
    Raises ValueError when a tensor is missing, unknown, given twice, of the wrong shape or dtype, or where fp8 or int4
    weights would come from numbers that are not finite.
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
        if place.expected is not None and not tensor.equal(place.expected.to(tensor.dtype)):
            raise ValueError(f"tensor {name} is {tensor.tolist()}, the config asks for {place.expected.tolist()}")
        stored_int4 = place.scale is None and not place.values.is_floating_point()
        if tensor.is_floating_point() == stored_int4:
            kind = "integers" if stored_int4 else "floating point weights"
            raise ValueError(f"tensor {name} is {tensor.dtype}; only {kind} are supported")
        if name.endswith(".weight_scale") and not tensor.isfinite().all():
            raise ValueError(f"tensor {name} has values that are not finite, which int4 weights can't be scaled by")
        _store(name, tensor, place)
    missing = sorted(places.keys() - seen)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"the checkpoint lacks {shown}")
    if decoder.config.tie_word_embeddings and decoder.lm_head.weight is not decoder.embed:
        _store("model.embed_tokens.weight", decoder.embed, _Place(decoder.lm_head.weight, decoder.lm_head.scale))


def weight_shapes(decoder: Decoder) -> dict[str, torch.Size]:
    """Published name -> shape of every tensor that ``load_weights`` asks for."""
    return {name: place.shape for name, place in _places(decoder).items()}


def _store(name: str, tensor: torch.Tensor, place: _Place) -> None:
    if place.scale is None:
        place.values.copy_(tensor)
        return
    rows = max(1, _BLOCK_VALUES // tensor.shape[1])
    blocks = (whole.split(rows) for whole in (tensor, place.values, place.scale))
    for block, values, scale in zip(*blocks, strict=True):
        exact = block.to(values.device).float()
        largest = exact.abs().amax(1)
        int4 = values.dtype == INT4
        if not largest.isfinite().all():
            kind = "int4" if int4 else "fp8"
            raise ValueError(f"tensor {name} has values that are not finite, which {kind} weights can't be made of")
        if int4:
            packed, exact_scale = quantise_int4(exact, tensor.shape[1] // scale.shape[1])
            values.copy_(packed)
            scale.copy_(exact_scale)
            continue
        # A tensor to divide by, since CUDA multiplies by the inverse of a number: the same weights on every device.
        exact_scale = largest / largest.new_tensor(FP8_MAX)
        scale.copy_(exact_scale.clamp_min(torch.finfo(torch.float32).tiny))  # also of a row of zeros
        values.copy_((exact / scale[:, None]).clamp(-FP8_MAX, FP8_MAX))


def _places(decoder: Decoder) -> dict[str, _Place]:
    """Published tensor name -> its place."""
    places = {"model.embed_tokens.weight": _Place(decoder.embed), "model.norm.weight": _Place(decoder.norm)}
    stored = frozenset(decoder.config.int4.names if decoder.config.int4 is not None else ())
    if not decoder.config.tie_word_embeddings:
        places |= _parts(decoder.lm_head, ("lm_head",), (decoder.config.vocab_size,), stored)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"model.layers.{index}."
        here = frozenset(name.removeprefix(prefix) for name in stored if name.startswith(prefix))
        for name, place in _layer_places(layer, here).items():
            places[prefix + name] = place
    return places


def _layer_places(layer: DecoderLayer, stored: frozenset[str]) -> dict[str, _Place]:
    """stored: the names of those that are int4 in the checkpoint."""
    query, key = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    places = {
        "input_layernorm.weight": _Place(layer.input_norm),
        "post_attention_layernorm.weight": _Place(layer.post_norm),
    }
    parts = {
        "qkv": (layer.qkv, (query, key, key)),
        "o": (layer.o, (layer.o.weight.shape[0],)),
        "gate_up": (layer.gate_up, (layer.gate_up.weight.shape[0] // 2,) * 2),
        "down": (layer.down, (layer.down.weight.shape[0],)),
    }
    for fused, (linear, rows) in parts.items():
        places |= _parts(linear, PARTS[fused], rows, stored)
    if layer.q_norm is not None and layer.k_norm is not None:
        places |= {"self_attn.q_norm.weight": _Place(layer.q_norm), "self_attn.k_norm.weight": _Place(layer.k_norm)}
    if layer.alpha is not None and layer.alpha_norm is not None:
        places |= {
            "self_attn.dms_proj_alpha.weight": _Place(layer.alpha.weight),
            "self_attn.dms_proj_alpha_norm.weight": _Place(layer.alpha_norm),
        }
    return places


def _parts(linear: Linear, names: tuple[str, ...], rows: tuple[int, ...], stored: frozenset[str]) -> dict[str, _Place]:
    scales = (None,) * len(rows) if linear.scale is None else linear.scale.split(rows)
    places = {}
    for name, values, scale in zip(names, linear.weight.split(rows), scales, strict=True):
        if scale is None or name not in stored:
            places[f"{name}.weight"] = _Place(values, scale)
            continue
        shape = torch.tensor(_Place(values, scale).shape)
        places[f"{name}.weight_packed"] = _Place(values)
        places[f"{name}.weight_scale"] = _Place(scale)
        places[f"{name}.weight_shape"] = _Place(torch.empty_like(shape), expected=shape)
    if linear.bias is not None:
        places |= {f"{name}.bias": _Place(part) for name, part in zip(names, linear.bias.split(rows), strict=True)}
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
