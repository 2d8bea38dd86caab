"""An adapter file: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastdms.checkpoint.adapter_file import read_adapter, write_adapter
from fastdms.config import DMSConfig

RULE = DMSConfig(window_tokens=128, alpha_scale=50.0, alpha_offset=2.5, shift=1, source="adapter", target_compression=4)
BASE = "0123456789abcdef" * 4
TRAINING = {"config": {"text": "größer"}, "steps": 3}
WEIGHT, NORM = (f"model.layers.{{}}.self_attn.dms_proj_alpha{suffix}.weight" for suffix in ("", "_norm"))


def made_up(layers: int = 2, heads: int = 3, hidden: int = 8) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return {
        name.format(layer): torch.randn(shape, generator=dice)
        for layer in range(layers)
        for name, shape in ((WEIGHT, (heads, hidden)), (NORM, (hidden,)))
    }


def write(path: Path, tensors: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    arguments: dict[str, Any] = {"dms": RULE, "base_sha256": BASE, "training": TRAINING}
    return write_adapter(path, tensors, **arguments | changes)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    tensors = made_up(layers=11)
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert (adapter.dms, adapter.base_sha256, adapter.training) == (RULE, BASE, TRAINING)
    assert adapter.tensors.keys() == tensors.keys()
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in tensors.items())
    assert (adapter.num_layers, adapter.num_kv_heads) == (11, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_are_stored_as_fp32_whatever_they_were(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in made_up().items()}
    adapter = read_adapter(write(tmp_path / "a.safetensors", parameters))
    for name, tensor in adapter.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, parameters[name].detach().float())


def test_the_file_is_plain_safetensors_with_json_metadata(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors", made_up()), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "fastdms-adapter"
    assert json.loads(metadata["dms"]) == asdict(RULE)
    assert json.loads(metadata["training"]) == TRAINING


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in made_up().items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "an adapter needs a tensor model.layers.0"),
        (without(WEIGHT.format(0)), "an adapter needs a tensor model.layers.0"),
        (without(NORM.format(1)), "dms_proj_alpha_norm.weight is missing"),
        (without(WEIGHT.format(1), NORM.format(1)) | {WEIGHT.format(2): torch.ones(3, 8)}, "layers.1.*is missing"),
        (made_up() | {"model.norm.weight": torch.ones(8)}, "model.norm.weight is not one of an adapter"),
        (made_up() | {WEIGHT.format(0): torch.ones(3)}, "an adapter needs a tensor model.layers.0"),
        (made_up() | {WEIGHT.format(1): torch.ones(2, 8)}, r"layers.1.*is torch.float32 \(2, 8\), not .* \(3, 8\)"),
        (made_up() | {NORM.format(1): torch.ones(3)}, r"alpha_norm.weight is torch.float32 \(3,\), not .* \(8,\)"),
    ],
)
def test_tensors_that_make_no_adapter(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.safetensors", tensors)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "b.safetensors"
    metadata = {"format": "fastdms-adapter", "dms": json.dumps(asdict(RULE)), "base_sha256": BASE, "training": "{}"}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dms": replace(RULE, source="borrowed_q")}, "an adapter's rule has source 'adapter'"),
        ({"dms": replace(RULE, shift=0)}, "an adapter's rule has .* shift 1"),
        ({"dms": replace(RULE, prefill="dense")}, "an adapter's rule has .* masked prefill"),
        ({"base_sha256": "abc"}, "base_sha256 must be 64 hexadecimal digits, got 'abc'"),
        ({"training": None}, "training must be an object, got NoneType"),
    ],
)
def test_what_can_not_be_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.safetensors", made_up(), **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", None, "is no DMS adapter"),
        ("format", "pt", "is no DMS adapter"),
        ("dms", None, "is no DMS adapter"),
        ("base_sha256", None, "is no DMS adapter"),
        ("training", None, "is no DMS adapter"),
        ("dms", "{", "metadata 'dms' is no JSON"),
        ("dms", "[]", "metadata 'dms' must be a JSON object, got list"),
        ("dms", '{"window": 3}', "unexpected keyword argument 'window'"),
        ("dms", '{"window_tokens": -1}', "window_tokens must be an integer >= 0"),
        ("dms", '{"window_tokens": 8}', "an adapter's rule has source 'adapter'"),
        ("base_sha256", "0" * 63, "base_sha256 must be 64 hexadecimal digits"),
        ("training", '"long"', "metadata 'training' must be a JSON object, got str"),
    ],
)
def test_wrong_metadata_names_the_file(tmp_path: Path, key: str, value: str | None, message: str) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "fastdms-adapter", "dms": json.dumps(asdict(RULE)), "base_sha256": BASE, "training": "{}"}
    changed = {name: text for name, text in (metadata | {key: value}).items() if text is not None}
    save_file(made_up(), path, metadata=changed)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        read_adapter(path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", made_up())
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{path} is damaged or no safetensors file"):
            read_adapter(path)
    with pytest.raises(ValueError, match=r"no-such-file is missing$"):
        read_adapter(tmp_path / "no-such-file")
    save_file(made_up(), path)
    with pytest.raises(ValueError, match=r"is no DMS adapter"):
        read_adapter(path)


def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", made_up())
    before = path.read_bytes()

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(ValueError, match=rf"can't write {path}: disk full"):
            write(path, made_up(layers=3))
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match="can't write"):
        write(tmp_path / "no-such-folder" / "a.safetensors", made_up())
    write(path, made_up(layers=3))
    assert read_adapter(path).num_layers == 3
