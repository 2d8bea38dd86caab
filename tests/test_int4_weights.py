"""int4 weights from end to end: quantised while they are loaded, or read as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdms
from fastdms.checkpoint import open_checkpoint
from fastdms.cli import main
from fastdms.decoder import Decoder
from fastdms.ops import MOST_ROWS
from fastdms.ops.int4 import INT4
from fastdms.options import WEIGHTS
from tests import oracle
from tests.checkpoint.files import edit_json
from tests.int4_folder import announcement, int4_model, pack_folder, scheme, through_int4
from tests.models import adapter_weights, dms_config, save_checkpoint, tiny_model, tiny_tokens
from tests.running import compiled, engine_of, one
from tests.test_end_to_end import DEVICES, check_scores, expected_run, expected_runs
from tests.tolerance import assert_logits_close

FP8 = torch.float8_e4m3fn
LAYERS = tuple(f"layers.{i}.{name}" for i in (0, 1) for name in ("qkv", "o", "gate_up", "down"))
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "layout", "tied"), [("llama_bias", "adapter", True), ("qwen3", "nvidia", False)])
def test_quantised_while_loading(tmp_path: Path, family: str, layout: Any, tied: bool, device: str) -> None:
    """Prefill, which dequantises, and decode, which doesn't; the head is fp8, the table of tokens is not rounded."""
    exact = int4_model(family, tie_word_embeddings=tied)
    runs = expected_runs(through_int4(exact, family, 64), dms_config(layout), layout)
    unrounded = expected_run(exact, dms_config(layout), layout, 0)
    assert (runs[0].logits - unrounded.logits).abs().max() > 0.1, "int4 changes nothing: the case tests nothing"
    check_scores(save_checkpoint(exact, tmp_path, layout), runs, device, 5, weights="int4")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("group", "scale_dtype", "ignore"),
    [(64, torch.bfloat16, ("lm_head",)), (32, torch.float16, ()),
     (32, torch.float32, ("lm_head", "model.layers.1.mlp.down_proj"))],
    ids=str,
)  # fmt: skip
def test_read_as_stored(
    tmp_path: Path, group: int, scale_dtype: torch.dtype, ignore: tuple[str, ...], device: str
) -> None:
    """What is ignored stays as it is; with weights="int4" the head alone does not."""
    exact = int4_model("qwen3")
    folder = pack_folder(save_checkpoint(exact, tmp_path, "adapter"), group, scale_dtype=scale_dtype, ignore=ignore)
    stored_head = "as it is" if "lm_head" in ignore else "int4"
    for weights, head in (("auto", stored_head), ("int4", "fp8" if "lm_head" in ignore else "int4")):
        rest = tuple(name for name in ignore if name != "lm_head")
        rounded = through_int4(exact, "qwen3", group, scale_dtype=scale_dtype, head=head, ignore=rest)
        runs = expected_runs(rounded, dms_config("adapter"), "adapter")
        check_scores(folder, runs, device, 5, weights=weights)


@pytest.mark.parametrize("tied", [False, True])
def test_in_batches_of_any_size(tmp_path: Path, tied: bool) -> None:
    """Also of more rows than their kernel takes."""
    exact = int4_model("llama", tie_word_embeddings=tied)
    rounded = through_int4(exact, "llama", 64)
    sequences = [tiny_tokens(9, seed=seed) for seed in range(MOST_ROWS + 1)]
    with compiled(save_checkpoint(exact, tmp_path, "nvidia"), weights="int4", max_concurrency=len(sequences)) as model:
        for count in (1, MOST_ROWS + 1):
            scored = model.score_batch(sequences[:count], [5] * count)
            for logits, ids in zip(scored, sequences, strict=False):
                assert_logits_close(logits, oracle.dms_logits(rounded, ids, dms_config("nvidia"))[4:])


def test_greedy_tokens_are_those_of_a_model_of_the_same_weights() -> None:
    exact = int4_model("qwen2")
    rounded: Any = through_int4(exact, "qwen2", 64)
    prompt = tiny_tokens(12)
    with compiled(exact, weights="int4") as model:
        found = one(model(prompt, temperature=0, max_tokens=12, ignore_eos=True)).token_ids
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(rounded(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[12:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_int4_and_what_is_not(tmp_path: Path, dtype: str) -> None:
    folder = save_checkpoint(int4_model("llama_bias", tie_word_embeddings=True), tmp_path, "adapter")
    with compiled(folder, weights="int4", dtype=dtype) as model:
        decoder = engine_of(model).runner.decoder
        assert (model.options.weights, model.options.head) == (INT4, FP8)
        dtypes = {name: tensor.dtype for name, tensor in decoder.state_dict().items()}
        assert {name for name, found in dtypes.items() if found == INT4} == {f"{name}.weight" for name in LAYERS}
        assert {name for name, found in dtypes.items() if found == FP8} == {"lm_head.weight"}
        scales = {name: dtypes[name] for name in dtypes if name.endswith("scale")}
        assert scales == {f"{name}.scale": torch.bfloat16 for name in LAYERS} | {"lm_head.scale": torch.float32}
        others = {found for name, found in dtypes.items() if found not in (INT4, FP8) and name not in scales}
        assert others == {model.options.dtype}
        assert len(one(model(tiny_tokens(20), temperature=0, max_tokens=4, ignore_eos=True)).token_ids) == 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_int4_weights_are_finite(value: float) -> None:
    model = int4_model("qwen3")
    model.state_dict()[f"{Q_PROJ}.weight"][-1, 3] = value
    with pytest.raises(
        ValueError, match=rf"^tensor {Q_PROJ}.weight has values that are not finite, which int4 weights"
    ):
        compiled(model, weights="int4")


def test_layers_of_no_whole_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"groups of 128, 64, 32 .* model.layers.0.mlp.down_proj has 112 inputs"):
        compiled(tiny_model("qwen3"), weights="int4")


def test_the_largest_group_that_fits_all_layers() -> None:
    config = open_checkpoint(int4_model("qwen3", hidden_size=128, head_dim=32, intermediate_size=384)).config
    for hidden, group in ((128, 128), (64, 64), (96, 32)):
        sized = type(config)(**{name: getattr(config, name) for name in config.__slots__} | {"hidden_size": hidden})
        decoder = Decoder(
            sized, None, num_positions=8, dtype=torch.float32, device=torch.device("cpu"), weight_dtype=INT4
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in decoder.named_parameters() if name.endswith("scale")}
        assert shapes["layers.0.qkv.scale"][1] == hidden // group
        assert shapes["layers.0.down.scale"][1] == 384 // group


# name -> (what is done to the tensors of a packed folder, what the error says)
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a zero point": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_zero_point": torch.zeros(8, 2)}),
        f"tensor {Q_PROJ}.weight_zero_point has no place",
    ),
    "an order": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
        f"tensor {Q_PROJ}.weight_g_idx is I32",
    ),
    "other groups": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_scale": torch.ones(64, 1)}),
        rf"tensor {Q_PROJ}.weight_scale has shape \(64, 1\), the config asks for \(64, 2\)",
    ),
    "bytes": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_packed": torch.zeros(64, 32, dtype=torch.uint8)}),
        f"tensor {Q_PROJ}.weight_packed is U8; supported are I32",
    ),
    "too few words": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}),
        rf"tensor {Q_PROJ}.weight_packed has shape \(64, 7\), the config asks for \(64, 8\)",
    ),
    "another shape": (
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_shape": torch.tensor([64, 63])}),
        rf"tensor {Q_PROJ}.weight_shape is \[64, 63\], the config asks for \[64, 64\]",
    ),
    "an infinite scale": (
        lambda tensors: tensors[f"{Q_PROJ}.weight_scale"].fill_(torch.inf),
        f"tensor {Q_PROJ}.weight_scale has values that are not finite",
    ),
    "no scale": (lambda tensors: tensors.pop(f"{Q_PROJ}.weight_scale"), f"the checkpoint lacks {Q_PROJ}.weight_scale"),
    "a part of qkv": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(Q_PROJ)],
        f"model.layers.1.self_attn.k_proj is int4 and {Q_PROJ} is not",
    ),
    "nothing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("weight_packed")],
        "announces int4 weights, but there is no tensor",
    ),
    "an embedding": (
        lambda tensors: tensors.update({"model.embed_tokens.weight_packed": torch.zeros(300, 8, dtype=torch.int32)}),
        "tensor model.embed_tokens.weight_packed has no place",
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_folder(save_checkpoint(int4_model("llama_bias"), tmp_path_factory.mktemp("int4")), 32)


def _copied(stored: Path, folder: Path) -> Path:
    for path in stored.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_layers_are_refused(stored: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    folder = _copied(stored, tmp_path)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        compiled(folder)


@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name not in ("auto", "int4")])
def test_int4_weights_are_made_nothing_else_of(stored: Path, weights: str) -> None:
    with pytest.raises(ValueError, match=f"weights are int4; weights must be 'auto' or 'int4', got '{weights}'"):
        compiled(stored, weights=weights)


def _announced(**changes: Any) -> dict[str, Any]:
    return announcement(32, "lm_head") | changes


def _scheme(**changes: Any) -> dict[str, Any]:
    return _announced(config_groups={"group_0": scheme(32) | changes})


def _weights(**changes: Any) -> dict[str, Any]:
    return _scheme(weights=scheme(32)["weights"] | changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_announced(format="int-quantized"), "format 'int-quantized' is not supported; supported is 'pack-quantized'"),
        (_announced(quantization_status="frozen"), "quantization_status 'frozen'"),
        (_announced(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme {'num_bits': 8}"),
        (_announced(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (_announced(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (_announced(config_groups={}), "config_groups must be a non-empty object, got {}"),
        (_announced(config_groups={"W4A16": ["Linear"]}), "W4A16: weights must be an object, got None"),
        (_announced(config_groups={"a": scheme(32), "b": scheme(64)}), r"different sizes \[32, 64\]"),
        (_scheme(input_activations={"num_bits": 8}), "group_0: input_activations {'num_bits': 8}"),
        (_scheme(format="marlin-24"), "group_0: format 'marlin-24'"),
        (_weights(num_bits=8), "group_0: weights: num_bits 8 is not supported; supported is 4"),
        (_weights(type="float"), "type 'float'"),
        (_weights(symmetric=False), "symmetric False"),
        (_weights(strategy="channel", group_size=None), "strategy 'channel'"),
        (_weights(group_size=16), "group_size 16 is not supported; supported is 128 or 64 or 32"),
        (_weights(group_size=32.0), "group_size 32.0"),
        (_weights(dynamic=True), "dynamic True"),
        (_weights(actorder="group"), "actorder 'group'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_formats_are_refused_by_name(stored: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = _copied(stored, tmp_path)
    edit_json(folder / "config.json", quantization_config=values)
    with pytest.raises(ValueError, match=rf"config.json: quantization_config: .*{message}"):
        open_checkpoint(folder)


def test_what_means_the_same_is_read(stored: Path, tmp_path: Path) -> None:
    folder = _copied(stored, tmp_path)
    plain = open_checkpoint(folder)
    assert plain.config.int4 is not None
    assert (plain.config.int4.group, plain.config.int4.scale_dtype) == (32, torch.bfloat16)
    assert "lm_head" not in plain.config.int4.names
    # The key of the compiler's artifacts is made of its repr, which must be the same in every process.
    assert plain.config.int4.names == tuple(sorted(plain.config.int4.names))
    for values in (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {
            "num_bits": 4, "strategy": "group", "group_size": 32}}}},
        _weights(actorder="static"), _announced(sparsity_config={}), _announced(version="0.9"),
    ):  # fmt: skip
        edit_json(folder / "config.json", quantization_config=values)
        assert open_checkpoint(folder).config == plain.config


def test_inspect_tells_of_it(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stored)]) == 0
    assert "million, float32, 14 linear layers int4 in groups of 32" in capsys.readouterr().out


def test_an_adapter_stays_as_it_is(tmp_path: Path) -> None:
    model = int4_model("qwen3")
    folder = pack_folder(save_checkpoint(model, tmp_path, "adapter"), 32)
    with fastdms.compile(folder, device="cpu", max_context=64) as runtime:
        layer: Any = engine_of(runtime).runner.decoder.layers[1]
        assert layer.alpha.weight.equal(adapter_weights(model)[1][1])
