"""The folders that other tests load: complete, and declaring DMS as each public family does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import DMS_LAYOUTS, FAMILIES, adapter_weights, dms_config, save_checkpoint, tiny_model, tiny_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), torch.tensor([tiny_tokens(20)])
    loaded = type(model).from_pretrained(save_checkpoint(model, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not [key for key in json.loads((tmp_path / "config.json").read_text()) if "dms" in key]


def test_layouts_declare_themselves(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    for layout in DMS_LAYOUTS:
        folder = save_checkpoint(model, tmp_path / layout, layout, window_tokens=5)
        config = json.loads((folder / "config.json").read_text())
        names = set(load_file(folder / "model.safetensors"))
        assert ("dms_window_size" in config) == (layout in ("nvidia", "adapter"))
        assert (folder / "dms_metadata.json").exists() == (layout == "shisa")
        assert bool(config.get("dms_separate_alpha")) == (layout == "adapter")
        assert any("dms_proj_alpha" in name for name in names) == (layout == "adapter")
        assert (dms := dms_config(layout, 5)) is not None
        assert dms.window_tokens == 5
    stored = load_file(tmp_path / "adapter" / "model.safetensors")
    for layer, (norm, weight) in adapter_weights(model).items():
        prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        assert torch.equal(stored[f"{prefix}.weight"], weight)
        assert torch.equal(stored[f"{prefix}_norm.weight"], norm)
