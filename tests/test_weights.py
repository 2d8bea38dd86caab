"""Checkpoints whose tensors don't fit their config are refused by the tensor's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdms.config import DMSConfig
from fastdms.decoder import Decoder
from fastdms.weights import load_weights
from tests.models import Layout, dms_config, save_checkpoint, tiny_model, tiny_tokens
from tests.running import compiled, one

Q_PROJ = "model.layers.1.self_attn.q_proj"
ALPHA = "model.layers.0.self_attn.dms_proj_alpha"

# name -> (layout of the folder, what is done to its tensors, what the error says)
Damage = Callable[[dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[Layout, Damage, str]] = {
    "too few rows": (
        "none",
        lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(63, 64)}),
        rf"tensor {Q_PROJ}.weight has shape \(63, 64\), the config asks for \(64, 64\)",
    ),
    "transposed": (
        "none",
        lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(112, 64)}),
        r"tensor model.layers.0.mlp.down_proj.weight has shape \(112, 64\), the config asks for \(64, 112\)",
    ),
    "smaller vocabulary": (
        "none",
        lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(299, 64)}),
        r"tensor model.embed_tokens.weight has shape \(299, 64\)",
    ),
    "a scalar": (
        "none",
        lambda tensors: tensors.update({"model.norm.weight": torch.tensor(1.0)}),
        r"model.norm.weight has",
    ),
    "missing": ("none", lambda tensors: tensors.pop(f"{Q_PROJ}.weight"), rf"the checkpoint lacks {Q_PROJ}.weight"),
    "missing head": ("none", lambda tensors: tensors.pop("lm_head.weight"), "the checkpoint lacks lm_head.weight"),
    "missing layer": (
        "none",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name],
        r"the checkpoint lacks model.layers.1.input_layernorm.weight, .* and 6 more",
    ),
    "a bias": (
        "none",
        lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.zeros(64)}),
        rf"tensor {Q_PROJ}.bias has no place in this model; its config does not announce it",
    ),
    "a third layer": (
        "none",
        lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.zeros(64)}),
        "tensor model.layers.2.input_layernorm.weight has no place",
    ),
    "integers": (
        "none",
        lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(64, 64, dtype=torch.int8)}),
        rf"tensor {Q_PROJ}.weight is I8; supported are F32, F16, BF16",
    ),
    "no adapter": ("adapter", lambda tensors: tensors.pop(f"{ALPHA}.weight"), f"no tensor {ALPHA}.weight"),
    "half an adapter": (
        "adapter",
        lambda tensors: tensors.pop(f"{ALPHA}_norm.weight"),
        f"no tensor {ALPHA}_norm.weight",
    ),
    "adapter of one row": (
        "adapter",
        lambda tensors: tensors.update({f"{ALPHA}.weight": torch.zeros(1, 64)}),
        rf"tensor {ALPHA}.weight has shape \(1, 64\), the config asks for \(2, 64\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refused(tmp_path: Path, name: str) -> None:
    layout, damage, message = DAMAGES[name]
    folder = save_checkpoint(tiny_model("qwen3"), tmp_path, layout)
    compiled(folder).close()
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        compiled(folder)


def test_what_has_no_use_is_ignored(tmp_path: Path) -> None:
    """An adapter where the rule in force doesn't ask for one, and the inverse frequencies of old exports."""
    folder = save_checkpoint(tiny_model("qwen2"), tmp_path, "adapter")
    expected = one(compiled(folder, dms="off")(tiny_tokens(9), temperature=0, max_tokens=8)).token_ids
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{ALPHA}.weight"].fill_(torch.nan)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((8,), torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dms in ("off", DMSConfig(window_tokens=64)):
        assert one(compiled(folder, dms=dms)(tiny_tokens(9), temperature=0, max_tokens=8)).token_ids == expected


def test_a_tensor_given_twice() -> None:
    model = tiny_model("qwen3")
    with compiled(model, dms=dms_config("nvidia")) as runtime:
        decoder = Decoder(runtime.config, None, num_positions=8, dtype=torch.float32, device=torch.device("cpu"))
    state = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
    load_weights(decoder, state)
    assert all(not parameter.isnan().any() for parameter in decoder.parameters()), "something was left unset"
    with pytest.raises(ValueError, match=r"tensor model.norm.weight occurs twice"):
        load_weights(decoder, [*state, ("model.norm.weight", torch.ones(64))])
