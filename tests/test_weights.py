"""Loading: tensors that don't fit the config are refused by name, and what becomes of those that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fastdms import weights
from fastdms.checkpoint import open_checkpoint
from fastdms.config import DMSConfig
from fastdms.decoder import Decoder, Linear
from fastdms.ops.int4 import INT4
from fastdms.weights import load_weights
from tests.int4_folder import int4_model
from tests.models import Layout, dms_config, save_checkpoint, tiny_model, tiny_tokens
from tests.running import compiled, engine_of, one

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


FP8 = torch.float8_e4m3fn


def empty_decoder(
    model: PreTrainedModel, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> Decoder:
    config = open_checkpoint(model).config
    return Decoder(config, None, num_positions=8, dtype=dtype, weight_dtype=weight_dtype, device=torch.device(device))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_fp8_and_what_is_not(tmp_path: Path, dtype: str, tied: bool) -> None:
    folder = save_checkpoint(tiny_model("llama_bias", tie_word_embeddings=tied), tmp_path, "adapter")
    with compiled(folder, weights="fp8", dtype=dtype) as model:
        decoder = engine_of(model).runner.decoder
        assert (model.options.weights, model.options.dtype) == (FP8, decoder.embed.dtype)
        dtypes = {name: tensor.dtype for name, tensor in decoder.state_dict().items()}
        linears = ["lm_head", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("qkv", "o", "gate_up", "down"))]
        assert {name for name, found in dtypes.items() if found == FP8} == {f"{name}.weight" for name in linears}
        scales = {f"{name}.scale" for name in linears}
        assert {name for name in dtypes if name.endswith("scale")} == scales
        assert {dtypes[name] for name in scales} == {torch.float32}
        others = {found for name, found in dtypes.items() if found != FP8 and name not in scales}
        assert others == {model.options.dtype}
        assert len(one(model(tiny_tokens(20), temperature=0, max_tokens=4, ignore_eos=True)).token_ids) == 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "tied"),
    [
        (f"{Q_PROJ}.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("lm_head.weight", False),
        ("model.embed_tokens.weight", True),
    ],
)
def test_fp8_weights_are_finite(name: str, tied: bool, value: float) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    model.state_dict()[name][-1, 3] = value
    compiled(model).close()
    with pytest.raises(ValueError, match=rf"^tensor {name} has values that are not finite, which fp8 weights can't"):
        compiled(model, weights="fp8")


def test_fp8_rows_of_any_size() -> None:
    """Each is as exact as e4m3 is; zeros stay zeros, and what is too small for a scale becomes zero."""
    model = tiny_model("qwen3")
    head = model.state_dict()["lm_head.weight"]
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38])
    head[: len(sizes)] = head[: len(sizes)] / head[: len(sizes)].abs().amax(1, keepdim=True) * sizes[:, None]
    decoder = empty_decoder(model, torch.float32, FP8)
    load_weights(decoder, open_checkpoint(model).tensors())
    stored = decoder.lm_head.dequantised(torch.float32)
    assert bool(stored.isfinite().all())
    assert not stored[:2].any()
    # Half of e4m3's step: a sixteenth of the number, or half of the smallest subnormal.
    largest = head.abs().amax(1, keepdim=True)
    error = (stored - head).abs()
    assert bool((error[2:] <= torch.maximum(head.abs() / 16, largest / 448 / 512 / 2)[2:] * 1.001).all())


def test_fp8_weights_are_rounded_once() -> None:
    linear = Linear(
        torch.nn.Parameter(torch.randn(40, 24).to(FP8), requires_grad=False),
        torch.nn.Parameter(torch.rand(40), requires_grad=False),
    )
    assert linear.scale is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert linear.dequantised(dtype).equal((linear.weight.float() * linear.scale[:, None]).to(dtype))


@pytest.mark.parametrize("stored", ["fp8", "int4"])
def test_a_chunk_copies_the_weights_of_its_layers_alone(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head, which few rows are multiplied by, stays as it is."""
    made: list[Linear] = []
    dequantised = Linear.dequantised

    def spied(linear: Linear, dtype: torch.dtype) -> Tensor:
        made.append(linear)
        return dequantised(linear, dtype)

    with compiled(int4_model("qwen3"), weights=stored) as model:
        monkeypatch.setattr(Linear, "dequantised", spied)
        model.score(tiny_tokens(9), prompt_len=8)
        layers = [m for m in engine_of(model).runner.decoder.layers.modules() if isinstance(m, Linear)]
    assert made == layers


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor made under it, beside what lies in the memory of ``known``."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.num_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8, INT4])
def test_loading_makes_no_second_copy(monkeypatch: pytest.MonkeyPatch, weight_dtype: torch.dtype, tied: bool) -> None:
    monkeypatch.setattr(weights, "_BLOCK_VALUES", 256)
    model = tiny_model("llama_bias", tie_word_embeddings=tied, intermediate_size=128)
    decoder, tensors = empty_decoder(model, torch.bfloat16, weight_dtype), list(open_checkpoint(model).tensors())
    with LargestTensor([*decoder.parameters(), *(tensor for _, tensor in tensors)]) as largest, torch.no_grad():
        load_weights(decoder, tensors)
    assert all(not parameter.float().isnan().any() for parameter in decoder.parameters()), "something was left unset"
    assert largest.num_bytes <= (0 if weight_dtype == torch.bfloat16 else 256 * 4)


@pytest.mark.gpu
def test_loading_makes_no_second_copy_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK_VALUES", 2**18)
    model = tiny_model("llama", vocab_size=2**18)
    decoder = empty_decoder(model, torch.bfloat16, FP8, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_weights(decoder, open_checkpoint(model).tensors())
    added = torch.cuda.max_memory_allocated() - before
    assert added <= 6 * 4 * 2**18 < decoder.lm_head.weight.nbytes / 2
