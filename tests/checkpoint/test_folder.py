"""Folders of safetensors: every family, shards, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastdms.checkpoint import open_checkpoint
from tests.checkpoint.files import assert_same_tensors, edit_json, flip_byte
from tests.models import FAMILIES, tiny_model

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


def _weights(model: Any) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return _weights(tiny_model("qwen3"))


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_model("qwen3").save_pretrained(folder, max_shard_size="160KB")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == list(SHARDS)
    return folder


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    """A folder in three shards that the test may damage."""
    return Path(shutil.copytree(pristine_shards, tmp_path / "model"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one file that the test may damage."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_every_family(family: str, shard_size: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "50KB")
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tensors(checkpoint, _weights(model))
    config, heads = checkpoint.config, model.config.num_attention_heads
    assert checkpoint.dms is None
    assert checkpoint.tokenizer_path == tmp_path
    assert checkpoint.name == str(tmp_path)
    assert config.family == family.split("_")[0]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (300, 16 * heads, 112)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, heads, 2, 16)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 1024)
    assert (config.bos_token_id, config.eos_token_ids, config.weight_dtype) == (1, (2,), torch.float32)
    names = set(_weights(model))
    layer = "model.layers.1."
    assert config.qkv_bias == (f"{layer}self_attn.k_proj.bias" in names)
    assert config.o_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert config.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)
    assert config.qk_norm == (f"{layer}self_attn.q_norm.weight" in names)
    assert config.tie_word_embeddings == ("lm_head.weight" not in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_stored_one(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(dtype)
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype="float64")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.weight_dtype == dtype
    assert_same_tensors(checkpoint, _weights(model))


def test_reads_again_from_the_start(shards: Path, weights: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(shards)
    first = checkpoint.tensors()
    next(first)
    assert_same_tensors(checkpoint, weights)
    assert len(list(first)) == len(weights) - 1


def test_output_head_beside_a_tying_config_is_used(single: Path) -> None:
    """transformers doesn't tie either when the file has a head of its own."""
    tensors = load_file(single / "model.safetensors") | {"lm_head.weight": torch.randn(300, 64)}
    save_file(tensors, single / "model.safetensors")
    checkpoint = open_checkpoint(single)
    assert not checkpoint.config.tie_word_embeddings
    assert_same_tensors(checkpoint, tensors)


def test_old_rotary_buffers_are_left_out(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, single / "model.safetensors")
    assert_same_tensors(open_checkpoint(single), tensors)


@pytest.mark.parametrize("shard", SHARDS)
def test_missing_shard(shards: Path, shard: str) -> None:
    (shards / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        open_checkpoint(shards)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_shard(shards: Path, keep: float) -> None:
    path = shards / SHARDS[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is truncated or no safetensors file"):
        open_checkpoint(shards)


def test_shard_with_bytes_after_its_end(shards: Path) -> None:
    with (shards / SHARDS[1]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=SHARDS[1]):
        open_checkpoint(shards)


def test_stale_file_beside_the_shards_is_ignored(shards: Path, weights: dict[str, torch.Tensor]) -> None:
    stale = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for name in ("model.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "a.safetensors"):
        save_file(stale, shards / name)
    (shards / "model-00004-of-00004.safetensors").write_bytes(b"broken, and nobody's business")
    assert_same_tensors(open_checkpoint(shards), weights)


def test_tensor_assigned_to_another_shard_is_ignored(shards: Path, weights: dict[str, torch.Tensor]) -> None:
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    strangers = {name: torch.zeros_like(weights[name]) for name, shard in weight_map.items() if shard != SHARDS[0]}
    assert strangers
    save_file(load_file(shards / SHARDS[0]) | strangers, shards / SHARDS[0])
    assert_same_tensors(open_checkpoint(shards), weights)


def test_index_names_a_tensor_that_the_shard_lacks(shards: Path) -> None:
    tensors = load_file(shards / SHARDS[2])
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shards / SHARDS[2])
    with pytest.raises(ValueError, match=f"{SHARDS[2]}: tensor {lost}, which {INDEX} assigns to this file"):
        open_checkpoint(shards)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/hostname", "..", ".", "", 3, None, ["a"]])
def test_index_points_out_of_the_folder(shards: Path, shard: object) -> None:
    edit_json(shards / INDEX, weight_map={"model.norm.weight": shard})
    with pytest.raises(ValueError, match="must be assigned to a file of this folder"):
        open_checkpoint(shards)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_corrupt_index(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        open_checkpoint(shards)


def test_shard_is_a_folder(shards: Path) -> None:
    (shards / SHARDS[0]).unlink()
    (shards / SHARDS[0]).mkdir()
    with pytest.raises(ValueError, match=f"{SHARDS[0]} is missing"):
        open_checkpoint(shards)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_tensor_of_an_unsupported_dtype(single: Path, dtype: torch.dtype) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, single / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.norm.weight is \w+; supported are F32, F16, BF16"):
        open_checkpoint(single)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_folder_with_pickles_only(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    with pytest.raises(ValueError, match=f"convert {name} to safetensors first"):
        open_checkpoint(single)


def test_folder_without_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        open_checkpoint(single)


def test_file_that_changes_after_opening(shards: Path) -> None:
    checkpoint = open_checkpoint(shards)
    (shards / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is missing"):
        list(checkpoint.tensors())


@pytest.mark.parametrize("model", ["", "no/such/folder", "./nowhere", "lonely", "a b/c", "x/y.gguf", 7, None, b"model"])
def test_neither_path_nor_hub_id(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"no existing folder or .gguf file|must be a path, a hub id or a transformers"
    ):
        open_checkpoint(model)


def test_path_of_the_weights_file(single: Path) -> None:
    with pytest.raises(ValueError, match="give the folder that holds the model"):
        open_checkpoint(single / "model.safetensors")


@given(st.data())
def test_any_damage_to_a_header_is_a_value_error(pristine_shards: Path, data: st.DataObject) -> None:
    """Whatever one byte of a file's header becomes, it is read or refused, and nothing else."""
    path = pristine_shards / data.draw(st.sampled_from(["config.json", INDEX, SHARDS[1]]))
    original = path.read_bytes()
    flip_byte(path, data.draw(st.integers(0, min(len(original), 600) - 1)), data.draw(st.integers(0, 255)))
    try:
        list(open_checkpoint(pristine_shards).tensors())
    except ValueError:
        pass
    finally:
        path.write_bytes(original)
