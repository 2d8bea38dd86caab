"""rope_tables against transformers' rotary modules, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from fastdms.config import ModelConfig, RopeConfig
from fastdms.rope import ROPE_TYPES, inverse_frequencies, rope_config, rope_tables

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 2.5}),
    "dynamic": ("dynamic", {"factor": 4.0}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn-betas": ("yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    "yarn-attention": ("yarn", YARN | {"attention_factor": 0.8}),
    "yarn-mscale": ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn-shrinking": ("yarn", YARN | {"factor": 0.5}),
    "yarn-singular": ("yarn", YARN | {"original_max_position_embeddings": 1}),
}


def _config(rope: RopeConfig, head_dim: int = 64, max_positions: int = 2048) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=300,
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=max_positions,
        rope=rope,
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [4, 16, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, head_dim: int, theta: float) -> None:
    rope_type, parameters = CASES[case]
    shape = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    rope_parameters = {"rope_type": rope_type, "rope_theta": theta, **parameters}
    module = LlamaRotaryEmbedding(
        LlamaConfig(max_position_embeddings=2048, rope_parameters=dict(rope_parameters), **shape)
    )
    config = _config(rope_config(rope_type, theta, parameters), head_dim)
    cos, sin = rope_tables(config, 2048)
    expected_cos, expected_sin = module(torch.zeros(1, 1), torch.arange(2048)[None])
    assert cos.shape == sin.shape == (2048, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    # The same fp32 operations in the same order: not a bit may differ.
    assert torch.equal(cos, expected_cos[0, :, : head_dim // 2])
    assert torch.equal(sin, expected_sin[0, :, : head_dim // 2])
    # transformers repeats the table for the other half, which is the pairing that rope_tables documents.
    assert torch.equal(cos, expected_cos[0, :, head_dim // 2 :])


def test_equals_qwen3_far_out() -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
    module = Qwen3RotaryEmbedding(
        Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **shape),
    )
    cos, sin = rope_tables(_config(rope_config("default", 1e6, {}), 128, 131072), 131072)
    expected_cos, expected_sin = module(torch.zeros(1, 1), torch.arange(131072)[None])
    assert torch.equal(cos, expected_cos[0, :, :64])
    assert torch.equal(sin, expected_sin[0, :, :64])


def test_every_type_is_tested() -> None:
    assert {rope_type for rope_type, _ in CASES.values()} == set(ROPE_TYPES)


def test_scaled_types_differ_from_default() -> None:
    tables = [rope_tables(_config(rope_config(kind, 1e4, values)), 512)[0] for kind, values in CASES.values()]
    same = [name for name, table in zip(CASES, tables, strict=True) if torch.equal(table, tables[0])]
    assert same == ["default", "dynamic"]


def test_factors_divide_the_frequencies() -> None:
    plain = _config(rope_config("default", 1e4, {}), 8)
    divided = _config(rope_config("default", 1e4, {}, (1.0, 2.0, 4.0, 8.0)), 8)
    expected = inverse_frequencies(plain)[0] / torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert torch.equal(inverse_frequencies(divided)[0], expected)
    cos, _ = rope_tables(divided, 5)
    assert torch.equal(cos[4], (4 * expected).cos())


def test_factors_of_the_wrong_number() -> None:
    config = _config(rope_config("default", 1e4, {}, (1.0, 2.0)), 8)
    with pytest.raises(ValueError, match="2 rope frequency factors for the 4 pairs"):
        rope_tables(config, 5)


def test_dynamic_stops_at_the_trained_length() -> None:
    config = _config(rope_config("dynamic", 1e4, {"factor": 4.0}), max_positions=100)
    default = _config(rope_config("default", 1e4, {}), max_positions=100)
    assert torch.equal(rope_tables(config, 100)[0], rope_tables(default, 100)[0])
    with pytest.raises(ValueError, match=r"'dynamic'.*beyond 100 positions.*101 positions"):
        rope_tables(config, 101)


@pytest.mark.parametrize("count", [0, -1])
def test_needs_a_position(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {count}"):
        rope_tables(_config(RopeConfig()), count)


@pytest.mark.parametrize("rope_type", ["longrope", "proportional", "mrope", "", None, 3, ["default"]])
def test_unknown_type_is_refused_by_name(rope_type: object) -> None:
    with pytest.raises(ValueError, match=r"is not supported; supported are default, linear, dynamic, llama3, yarn"):
        rope_config(rope_type, 1e4, {})


def test_unknown_type_in_a_handmade_config() -> None:
    with pytest.raises(ValueError, match="rope type 'longrope' is not supported"):
        rope_tables(_config(RopeConfig(type="longrope")), 4)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "yarn"])
def test_missing_parameter(rope_type: str) -> None:
    with pytest.raises(ValueError, match=f"rope type '{rope_type}' needs factor, which is missing"):
        rope_config(rope_type, 1e4, {"factor": None})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 10**400, "4", True, [4.0]])
def test_factor_of_a_wrong_kind(value: object) -> None:
    with pytest.raises(ValueError, match="rope parameter factor must be a positive finite number"):
        rope_config("linear", 1e4, {"factor": value})


@pytest.mark.parametrize("theta", [0, 1.0, -1e4, float("nan"), None, "1e4", True])
def test_theta_of_a_wrong_kind(theta: object) -> None:
    with pytest.raises(ValueError, match="rope_theta must be"):
        rope_config("default", theta, {})


def test_llama3_bands_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="high_freq_factor must be above low_freq_factor"):
        rope_config("llama3", 1e4, LLAMA3 | {"low_freq_factor": 4.0})


def test_truncate_of_a_wrong_kind() -> None:
    with pytest.raises(ValueError, match="truncate must be true or false"):
        rope_config("yarn", 1e4, YARN | {"truncate": 1})
