"""GGUF files of tiny models, written with the gguf package, and what a reader must find in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from tests.models import tiny_model

Array = npt.NDArray[Any]
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def wide_model(family: str) -> PreTrainedModel:
    """4 query and 2 KV heads of 64 channels; every row is a whole number of the largest block (256)."""
    return tiny_model(family, hidden_size=256, head_dim=64, intermediate_size=256)


def gguf_name(name: str) -> str:
    """A transformers tensor name as llama.cpp spells it."""
    stem, kind = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind_of: Callable[[str], int] = lambda name: Kind.F32,
    *,
    rope_factors: Sequence[float] | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, Array] | None = None,
    split_max_tensors: int = 0,
) -> dict[str, torch.Tensor]:
    """Writes a model as llama.cpp's converter lays it out; returns its weights as they are after dequantising.

    kind_of: block type of each matrix, by GGUF name; vectors are F32.
    metadata: keys without the architecture's prefix to set or, with None, to leave out.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
        **(metadata or {}),
    }
    for key, value in values.items():
        if value is not None:
            _add_value(writer, f"{architecture}.{key}", value)
    _add_value(writer, "tokenizer.ggml.bos_token_id", 1)
    _add_value(writer, "tokenizer.ggml.eos_token_id", 2)
    writer.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.token_type", [1] * config.vocab_size)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found[name] = _add_weight(writer, name, tensor.numpy(), kind_of(gguf_name(name)), model)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def set_type_number(path: Path, tensor: str, number: int) -> None:
    """Overwrites a tensor's type in the header."""
    data = bytearray(path.read_bytes())
    entry = len(tensor).to_bytes(8, "little") + tensor.encode()
    assert data.count(entry) == 1
    position = data.index(entry) + len(entry)
    num_dims = int.from_bytes(data[position : position + 4], "little")
    position += 4 + 8 * num_dims
    data[position : position + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_weight(writer: gguf.GGUFWriter, name: str, values: Array, kind: int, model: PreTrainedModel) -> torch.Tensor:
    order = _row_order(name, values.shape[0], model)
    rows = values[order]
    if rows.ndim == 1:
        kind = Kind.F32
    data = _encode(rows, Kind(kind))
    writer.add_tensor(gguf_name(name), data, raw_dtype=Kind(kind))
    restored = np.empty_like(values)
    restored[order] = dequantize(data, Kind(kind))
    return torch.from_numpy(restored)


def _row_order(name: str, num_rows: int, model: PreTrainedModel) -> list[int]:
    """Which row of transformers' matrix each row of the file is: llama's q and k alternate the halves of a head."""
    llama = model.config.model_type in ("llama", "mistral")
    if not llama or not name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj")):
        return list(range(num_rows))
    dim = model.config.head_dim
    return [
        head + half * (dim // 2) + pair
        for head in range(0, num_rows, dim)
        for pair in range(dim // 2)
        for half in (0, 1)
    ]


def _encode(rows: Array, kind: Kind) -> Array:
    if kind is not Kind.Q6_K:
        return np.ascontiguousarray(quantize(rows, kind))
    # The package can read this type but not write it: any bytes do, with a sensible fp16 scale at the block's end.
    generator = np.random.default_rng(len(rows))
    blocks = generator.integers(0, 256, (rows.size // 256, 210), dtype=np.uint8)
    blocks[:, 208:] = np.full((len(blocks), 1), 2.0**-12, dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows.shape[0], -1)
