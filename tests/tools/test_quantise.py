"""``fastdms quantise``: the folder means what ``weights="int4"`` makes of the model, and loses nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdms.checkpoint import open_checkpoint
from fastdms.cli import main
from fastdms.decoder import Decoder
from fastdms.tools.quantise import quantise
from tests.int4_folder import announcement, int4_model, packed, rounded
from tests.models import LAYOUTS, Layout, save_checkpoint, tiny_model
from tests.running import compiled, engine_of
from tests.tiny_tokenizers import byte_level

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    with compiled(folder, weights="int4") as model:
        decoder: Decoder = engine_of(model).runner.decoder
        return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tied"), [("llama_bias", True), ("qwen3", False)])
def test_loads_back_to_the_same_numbers(tmp_path: Path, family: str, tied: bool, layout: Layout) -> None:
    source = save_checkpoint(int4_model(family, tie_word_embeddings=tied), tmp_path / "model", layout)
    byte_level().save_pretrained(source)
    folder = quantise(source, tmp_path / "int4")
    ours, expected = _weights(folder), _weights(source)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    assert open_checkpoint(folder).dms == open_checkpoint(source).dms
    kept = {path.name for path in source.iterdir()}
    assert {path.name for path in folder.iterdir()} == kept
    for name in kept - {"config.json", "model.safetensors"}:
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_is_what_llm_compressor_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = int4_model("qwen3").to(torch.bfloat16)
    source = save_checkpoint(model, tmp_path / "model", "adapter")
    assert main(["quantise", str(source), "--out", str(tmp_path / "int4")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'int4'}\n"
    alphas = [f"model.layers.{layer}.self_attn.dms_proj_alpha" for layer in (0, 1)]
    expected: Any = announcement(64, "lm_head", *alphas)
    del expected["global_compression_ratio"]
    values = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert values.pop("quantization_config") == expected
    assert values == json.loads((source / "config.json").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "int4"))
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            assert after.pop(name).equal(tensor)
            continue
        q, scale = rounded(tensor, 64)
        assert after.pop(f"{layer}.weight_packed").equal(packed(q))
        assert after.pop(f"{layer}.weight_scale").equal(scale)
        assert after.pop(f"{layer}.weight_shape").tolist() == list(tensor.shape)
    assert not after


def test_refusals_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save_checkpoint(int4_model("qwen3"), tmp_path / "good")
    stored = quantise(good, tmp_path / "stored")
    broken = int4_model("qwen3")
    broken.state_dict()["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    other = save_checkpoint(int4_model("qwen3"), tmp_path / "run" / "other")
    (tmp_path / "run" / "training_log.json").write_text('{"config": {"window_size": 7}}')
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for source, out, message in (
        (good, stored, "is not an empty folder; nothing is overwritten"),
        (stored, tmp_path / "new", "is int4 already"),
        (tmp_path / "none", tmp_path / "new", "no existing folder"),
        (other, tmp_path / "new", "declares its DMS rule outside of its folder"),
    ):
        assert main(["quantise", str(source), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    for damage, message in (
        ({Q_PROJ: torch.zeros(64, 50)}, r"q_proj.weight has shape \(64, 50\), the config asks for \(64, 64\)"),
        ({Q_PROJ: torch.zeros(60, 64)}, r"q_proj.weight has shape \(60, 64\), the config asks for \(64, 64\)"),
        ({Q_PROJ: None}, f"the checkpoint lacks {Q_PROJ}"),
        ({f"{Q_PROJ}_packed": torch.zeros(64, 8, dtype=torch.int32)}, "weight_packed has no place in this model"),
    ):
        tensors = load_file(good / "model.safetensors") | damage
        whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(whole, good / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            quantise(good, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        save_checkpoint(int4_model("qwen3"), good)
    for model, message in ((broken, "up_proj.weight has values that are not"), (tiny_model("qwen3"), "112 inputs")):
        source = save_checkpoint(model, tmp_path / message[:3])
        with pytest.raises(ValueError, match=message):
            quantise(source, tmp_path / "new")
        assert not (tmp_path / "new").exists()
