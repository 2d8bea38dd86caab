"""config.json and generation_config.json: what is read, and what is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.hf_config import parse_config, published_values
from fastdms.config import ModelConfig
from fastdms.rope import ROPE_TYPES
from fastdms.tools.shapes import SHAPES
from tests.checkpoint.files import edit_json
from tests.models import tiny_model

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
KEYS = [
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "layer_types"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config"),
]
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def _parse(family: str = "llama", generation: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    return parse_config({"model_type": family, **SHAPE, **values}, generation or {}, "config.json", torch.float32)


def test_published_llama() -> None:
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        {"eos_token_id": [128001, 128008, 128009]},
        "config.json",
        torch.bfloat16,
    )
    assert (config.head_dim, config.group_size, config.num_layers) == (64, 4, 16)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.tie_word_embeddings
    assert (config.rope.type, config.rope.theta, dict(config.rope.parameters)) == ("llama3", 500000.0, LLAMA3)


def test_published_nvidia_qwen3_runs_none_of_its_code() -> None:
    code = {"AutoConfig": "configuration_qwen3_dms.Qwen3Config", "AutoModelForCausalLM": "no.such.module"}
    config = _parse(
        "qwen3",
        architectures=["Qwen3ForCausalLM"],
        auto_map=code,
        head_dim=128,
        rope_theta=1e6,
        rope_scaling=None,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=36,
        dms_window_size=512,
    )
    assert (config.family, config.head_dim, config.qk_norm, config.qkv_bias) == ("qwen3", 128, True, False)
    assert (config.rope.type, config.rope.theta) == ("default", 1e6)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3ForCausalLMDMS"])
def test_class_names_of_the_adapter_family(architecture: str) -> None:
    assert _parse("qwen3", architectures=[architecture]).family == "qwen3"


@pytest.mark.parametrize(
    ("key", "value", "rope_type", "parameters"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "linear", {"factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2}, "dynamic", {"factor": 2.0}),
        (
            "rope_scaling",
            {"rope_type": "yarn", "factor": 4.0},
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 4096.0},
        ),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 512.0, "truncate": False},
        ),
        ("rope_parameters", {"rope_type": "llama3", **LLAMA3}, "llama3", LLAMA3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "default", {}),
    ],
)
def test_rope_in_old_and_new_spelling(key: str, value: Any, rope_type: str, parameters: dict[str, Any]) -> None:
    before = dict(value)
    rope = _parse(**{key: value}).rope
    assert (rope.type, rope.theta, dict(rope.parameters)) == (rope_type, 1e4, parameters)
    assert value == before


def test_top_level_theta_and_original_length() -> None:
    rope = _parse(rope_theta=12345.0, original_max_position_embeddings=77, rope_scaling={"type": "yarn", "factor": 2})
    assert rope.rope.theta == 12345.0
    assert dict(rope.rope.parameters)["original_max_position_embeddings"] == 77


def test_head_dim_is_derived_where_absent() -> None:
    assert _parse("qwen2").head_dim == 16
    assert _parse("llama", head_dim=32).head_dim == 32
    assert _parse("mistral", sliding_window=None, head_dim=None).head_dim == 16


def test_old_llama_without_kv_heads() -> None:
    assert _parse(num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": [9, 5]}, {"eos_token_id": 7}, (5, 7, 9)),
        ({"eos_token_id": None}, {"eos_token_id": [7, 7]}, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {}, (2,)),  # Llama's default
    ],
)
def test_end_tokens_of_both_files(own: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert _parse(generation=generation, **own).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gemma3_text", {}, "model_type 'gemma3_text'.* not supported; supported are LlamaForCausalLM, Mistral"),
        ("mixtral", {"architectures": ["MixtralForCausalLM"]}, "mixtral.*MixtralForCausalLM.* not supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("qwen3", {"architectures": ["LlamaForCausalLM"]}, "model_type 'qwen3' with architectures"),
        ("llama", {"architectures": ["LlamaForCausalLM", "Other"]}, "Other"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'"),
        ("mistral", {}, "sliding_window 4096 is not supported"),
        ("mistral", {"sliding_window": 128}, "sliding_window 128 is not supported"),
        ("llama", {"sliding_window": 128}, "sliding_window 128 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64 is not supported"),
        ("qwen3", {"use_sliding_window": True}, "sliding_window 4096 is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \['sliding_attention'\]"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 5]}}, "mrope"),
        ("qwen2", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 5]}}, "mrope_section"),
        ("llama", {"rope_scaling": {"type": "frobnicate"}}, "rope type 'frobnicate' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "x"}}, "factor must be a positive finite number"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
        ("llama", {"quantization_config": "odd"}, "quantised by 'odd'"),
        ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    ],
)
def test_refused_by_name(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        _parse(family, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, got -1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive integer, got 2.0"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"hidden_size": 62}, "62"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"intermediate_size": True}, "intermediate_size must be a positive integer, got True"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer, got 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, got 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_theta": 0}, "rope_theta must be a positive finite number, got 0"),
        ({"rope_theta": "big"}, "rope_theta must be a positive finite number, got 'big'"),
        ({"rope_scaling": "linear"}, "not a valid"),
        ({"rope_parameters": [1]}, "not a valid"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be a token id, got -1"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"layer_types": 3}, "layer_types|not a valid"),
        ({"layer_types": [["full_attention"], 2]}, "layer_types|not a valid"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_values_that_make_no_model(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^config.json: .*({message})"):
        _parse(family, **values)


@pytest.mark.parametrize(("key", "value"), [("attention_bias", "yes"), ("mlp_bias", 1)])
def test_bias_flags_of_a_wrong_kind(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"(?s)^config.json: .*{key}"):
        _parse("llama", **{key: value})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [10_001, 10**12, 10**400])
def test_more_layers_than_can_be_are_refused_at_once(family: str, layers: int) -> None:
    """A config class makes a list of as many."""
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 10,000"):
        _parse(family, sliding_window=None, num_hidden_layers=layers)
    assert _parse(family, sliding_window=None, num_hidden_layers=10_000).num_layers == 10_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400)
@given(family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), key=st.sampled_from(KEYS), value=JSON)
def test_any_value_of_any_key_is_read_or_refused(family: str, key: str, value: Any) -> None:
    with contextlib.suppress(ValueError):
        _parse(family, **{"sliding_window": None, key: value})


@given(rope_type=st.sampled_from(ROPE_TYPES), key=st.sampled_from([*LLAMA3, "rope_theta", "type"]), value=JSON)
def test_any_value_of_any_rope_key_is_read_or_refused(rope_type: str, key: str, value: Any) -> None:
    with contextlib.suppress(ValueError):
        _parse(rope_parameters={"rope_type": rope_type, **LLAMA3, key: value})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"{} {}", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_corrupt_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name} (is not readable JSON|must hold a JSON object)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{}", '{"model_type": null}', '{"model_type": ["llama"]}'])
def test_config_without_a_model_type(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"/config.json: model_type .* is not supported"):
        open_checkpoint(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        open_checkpoint(folder)


def test_missing_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).config.eos_token_ids == (2,)


def test_message_names_the_file(folder: Path) -> None:
    edit_json(folder / "config.json", num_key_value_heads=0)
    with pytest.raises(ValueError, match=rf"^{folder}/config.json: num_key_value_heads must be"):
        open_checkpoint(folder)


def test_unsupported_model_is_refused_before_its_weights_are_missed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit_json(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_published_is_read_back(shape: ModelConfig) -> None:
    read = parse_config(json.loads(json.dumps(published_values(shape))), {}, "config.json", shape.weight_dtype)
    assert dataclasses.replace(read, bos_token_id=None, eos_token_ids=()) == shape
