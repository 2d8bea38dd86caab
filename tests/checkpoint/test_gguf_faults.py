"""GGUF files that can't be read: each refusal says which file, which tensor or key, and what is wrong with it."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.checkpoint import open_checkpoint
from tests.checkpoint.files import flip_byte
from tests.checkpoint.gguf_models import set_type_number, wide_model, write_gguf
from tests.models import tiny_model

PARTS = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(tiny_model("llama"), path, lambda name: Kind.Q8_0 if name.startswith("blk.0.ffn_gate") else Kind.F32)
    return path


@pytest.fixture
def file(pristine: Path, tmp_path: Path) -> Path:
    """A readable file that the test may damage."""
    return Path(shutil.copy(pristine, tmp_path / "model.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with a model in three parts."""
    write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", split_max_tensors=10)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "label"),
    [
        (999, "unknown (999)"),
        (2**32 - 1, "unknown (4294967295)"),
        (4, "unknown (4)"),
        (Kind.Q8_1, "Q8_1 (9)"),
        (Kind.Q8_K, "Q8_K (15)"),
        (Kind.I32, "I32 (26)"),
        (Kind.F64, "F64 (28)"),
    ],
)
@pytest.mark.parametrize("tensor", ["blk.1.attn_v.weight", "token_embd.weight", "output_norm.weight"])
def test_block_type_that_cannot_be_read(file: Path, tensor: str, number: int, label: str) -> None:
    set_type_number(file, tensor, number)
    message = f"{file}: tensor {tensor} has block type {label}, which can't be read"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_checkpoint(file)


def test_rows_that_are_no_whole_blocks(file: Path) -> None:
    set_type_number(file, "blk.1.attn_v.weight", Kind.Q6_K)
    with pytest.raises(ValueError, match=r"blk.1.attn_v.weight has rows of 64, no multiple of Q6_K's block of 256"):
        open_checkpoint(file)


@pytest.mark.parametrize("keep", [0, 3, 4, 8, 20, 24, 30, 200, 5000, 8000, -1, -300, -100_000])
def test_truncated_file(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"^{file}.*(can't be read|truncated|no GGUF)"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (0, b"GGML", "is no GGUF file"),
        (0, b"\x00\x00\x00\x00", "is no GGUF file"),
        (4, b"\x01\x00\x00\x00", "GGUF version 1 is not supported; supported are little-endian 2 and 3"),
        (4, b"\x00\x00\x00\x03", "GGUF version 50331648 is not supported"),
        (8, b"\xff" * 8, "truncated or damaged"),
        (16, b"\xff" * 8, "truncated or damaged"),
        (24, b"\xff" * 8, "truncated or damaged"),
        (32, b"\xff", "not UTF-8"),
    ],
)
def test_damaged_header(file: Path, position: int, content: bytes, message: str) -> None:
    data = bytearray(file.read_bytes())
    data[position : position + len(content)] = content
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{file}.*{message}"):
        open_checkpoint(file)


@settings(max_examples=300)
@given(position=st.integers(0, 12_000), value=st.integers(0, 255))
def test_any_damage_is_a_value_error(pristine: Path, position: int, value: int) -> None:
    """Whatever one byte becomes (the header is the first half of that range), the file is read or refused."""
    path = pristine.with_name("damaged.gguf")
    shutil.copy(pristine, path)
    flip_byte(path, position, value)
    with contextlib.suppress(ValueError), np.errstate(all="ignore"):
        list(open_checkpoint(path).tensors())


@pytest.mark.parametrize("part", PARTS)
def test_missing_part(parts: Path, part: str) -> None:
    (parts / part).unlink()
    named = PARTS[1] if part == PARTS[0] else PARTS[0]
    with pytest.raises(ValueError, match=f"{part} is missing: {named} is one of 3 parts"):
        open_checkpoint(parts / named)


@pytest.mark.parametrize("part", PARTS)
def test_truncated_part(parts: Path, part: str) -> None:
    (parts / part).write_bytes((parts / part).read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{part}: tensor .* goes past the end of the file"):
        open_checkpoint(parts / PARTS[0])


def test_part_in_anothers_place(parts: Path) -> None:
    shutil.copy(parts / PARTS[1], parts / PARTS[2])
    with pytest.raises(ValueError, match=f"{PARTS[2]} must be part 2 of 3, but calls itself part 1 of 3"):
        open_checkpoint(parts / PARTS[0])


def test_part_of_another_model(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_gguf(tiny_model("qwen2", num_hidden_layers=3), tmp_path / "other" / "m.gguf", split_max_tensors=13)
    shutil.copy(tmp_path / "other" / PARTS[1], parts / PARTS[1])
    with pytest.raises(ValueError, match=r"is in an earlier part too|the parts hold \d+ tensors, but"):
        open_checkpoint(parts / PARTS[0])


@pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00004.gguf", "m-1-of-3.gguf"])
def test_part_under_another_name(parts: Path, name: str) -> None:
    (parts / PARTS[0]).rename(parts / name)
    with pytest.raises(ValueError, match=f"{name} is one of 3 parts and must be named like NAME-00001-of-00002.gguf"):
        open_checkpoint(parts / name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_length": None}, "llama.context_length must be one integer, got None"),
        ({"block_count": None}, "llama.block_count must be one integer, got None"),
        ({"block_count": 0}, "num_layers must be a positive integer, got 0"),
        ({"block_count": "2"}, "llama.block_count must be one integer, got '2'"),
        ({"block_count": 2.0}, "llama.block_count must be one integer, got 2.0"),
        ({"embedding_length": 0}, "must be positive"),
        ({"attention.head_count": 0}, "must be positive"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count must be one integer, got an array of 2"),
        ({"attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv must be one integer, got an array of 2"),
        ({"attention.head_count_kv": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"attention.head_count_kv": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"attention.head_count_kv": 4}, "blk.0.attn_k.weight has 32 rows, but the model has 4 heads of 16"),
        ({"attention.key_length": 15}, ""),
        ({"attention.value_length": 32}, "attention.value_length 32 is not supported"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon must be a finite number, got None"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon must be positive, got 0.0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon must be a finite number"),
        ({"attention.sliding_window": 128}, "sliding_window 128 is not supported"),
        ({"expert_count": 8}, "mixture-of-experts models are not supported"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8 is not supported"),
        ({"rope.freq_base": -1.0}, "rope_theta must be"),
        ({"rope.freq_base": "x"}, "llama.rope.freq_base must be a finite number, got 'x'"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope type 'longrope' is not supported"),
        ({"rope.scaling.type": 3}, "llama.rope.scaling.type must be text, got 3"),
        ({"rope.scaling.type": "yarn"}, "rope parameter factor must be a positive finite number, got 0.0"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 0.1},
            "rope.scaling.yarn_log_multiplier 0.1.* is not supported",
        ),
    ],
)
def test_metadata_that_describes_no_model(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama_bias"), path, metadata=metadata)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("architecture", ["gemma3", "mistral3", "qwen2moe", "clip"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"architecture '{architecture}' is not supported; supported are llama, qwen2"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name",
    [
        *("rope_factors_long.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.2.attn_q.weight"),
        *("blk.00.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.scale", "output_norm.bias"),
    ],
)
def test_tensor_that_the_family_does_not_have(name: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "model.gguf", extra={name: np.ones((64,), dtype=np.float32)})
    with pytest.raises(ValueError, match=f"tensor {name} is not part of a llama model of 2 layers"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 7, "rope_freqs.weight holds 7 factors, a head has 8 pairs"),
        ([1.0] * 7 + [0.0], "rope frequency factor must be a positive finite number, got 0.0"),
        ([float("nan")] * 8, "rope frequency factor must be a positive finite number, got nan"),
    ],
)
def test_rope_factors_that_fit_no_head(factors: list[float], message: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "model.gguf", rope_factors=factors)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "model.gguf")


def test_without_the_gguf_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "fastdms\[gguf\]"'):
        open_checkpoint(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no existing folder or \.gguf file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_folder_named_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "model.gguf")


def test_heads_of_another_size(tmp_path: Path) -> None:
    halved = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), 32)
    write_gguf(wide_model("llama"), tmp_path / "model.gguf", metadata=halved)
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight has 256 rows, but the model has 4 heads of 32"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "tensor blk.0.attn_q.weight repeats"),
        (
            b"llama.attention.head_count\x04",
            b"llama.attention.key_length\x04",
            "key llama.attention.key_length repeats",
        ),
    ],
)
def test_names_that_repeat(file: Path, old: bytes, new: bytes, message: str) -> None:
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(file)
