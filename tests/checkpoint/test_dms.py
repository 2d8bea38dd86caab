"""DMS metadata: every place, key and layout, the rule that tells layouts apart, and lies of every kind."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.dms import read_dms
from fastdms.config import DMSConfig, ModelConfig, RopeConfig
from tests.checkpoint.files import edit_json
from tests.models import DMS_LAYOUTS, FAMILIES, Layout, adapter_weights, dms_config, save_checkpoint, tiny_model

SHISA = DMSConfig(window_tokens=256, shift=0, zero_borrowed="pre_rope")
NVIDIA = DMSConfig(window_tokens=512, shift=1, zero_borrowed="pre_and_post_rope")
ADAPTER = DMSConfig(window_tokens=512, shift=1, zero_borrowed="none", source="adapter")
PUBLISHED_NVIDIA = {
    "model_type": "qwen3",
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 512,
    "dms_cr": 8,
    "auto_map": {
        "AutoConfig": "configuration_qwen3_dms.Qwen3Config",
        "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLM",
    },
}
CONFIG = ModelConfig(
    family="llama",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=112,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    rope=RopeConfig(),
)
ADAPTER_NAMES = [
    f"model.layers.{layer}.self_attn.dms_proj_alpha{suffix}.weight" for layer in (0, 1) for suffix in ("", "_norm")
]


def _read(
    values: dict[str, Any] | None = None, folder: Path | None = None, names: list[str] | None = None
) -> DMSConfig | None:
    return read_dms({"model_type": "llama"} | (values or {}), "config.json", folder, names or [], CONFIG)


def _write(folder: Path, where: str, values: dict[str, Any]) -> dict[str, Any]:
    """Puts metadata into one of the three places; returns the model's configuration."""
    if where == "dms_metadata.json":
        (folder / where).write_text(json.dumps(values))
    elif where == "training_log.json":
        (folder.parent / where).write_text(json.dumps({"config": values, "log": []}))
    return values if where == "config.json" else {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    return tmp_path / "final"


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folders_of_every_layout(family: str, layout: Layout, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tiny_model(family), tmp_path, layout, window_tokens=9))
    assert checkpoint.dms == dms_config(layout, 9)


def test_adapter_tensors_are_among_the_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    found = dict(open_checkpoint(save_checkpoint(model, tmp_path, "adapter")).tensors())
    for layer, (norm, weight) in adapter_weights(model).items():
        prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        assert found[f"{prefix}.weight"].equal(weight)
        assert found[f"{prefix}_norm.weight"].equal(norm)


def test_no_metadata_no_eviction(folder: Path) -> None:
    assert _read(folder=folder) is None
    assert _read() is None


def test_published_nvidia_checkpoint() -> None:
    assert _read(PUBLISHED_NVIDIA) == replace(NVIDIA, target_compression=8.0)


def test_published_shisa_checkpoint(folder: Path) -> None:
    keys = {"dms_window_size": 256, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8.0}
    _write(folder, "dms_metadata.json", {"window_size": 256, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8})
    assert _read(keys, folder) == replace(SHISA, target_compression=8.0)
    assert _read(keys) == replace(SHISA, target_compression=8.0)


def test_trainer_output_folder(folder: Path) -> None:
    log = {
        "model": "base",
        "target_cr": 8,
        "context_len": 4096,
        "window_size": 128,
        "zeroing_steps": 2000,
        "lr": 3e-5,
        "alpha_scale": 100.0,
        "alpha_offset": 4.0,
        "compression_mode": "uniform",
    }
    _write(folder, "training_log.json", log)
    assert _read(folder=folder) == replace(SHISA, window_tokens=128, alpha_offset=4.0, target_compression=8.0)


def test_hipengine_metadata(folder: Path) -> None:
    values = {
        "artifact_fingerprint": "abc", "model_family": "llama", "evidence_source": "eval",
        "num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "window_size": 64, "target_compression_ratio": 4.0, "alpha_scale": 50.0, "alpha_offset": 2.5,
        "borrowed_query_channel": -1, "zero_borrowed_query_channel": True, "corrected_mask": True,
        "trained_checkpoint": True,
    }  # fmt: skip
    expected = replace(SHISA, window_tokens=64, alpha_scale=50.0, alpha_offset=2.5, target_compression=4.0)
    for changes, meaning in (
        ({}, expected),
        ({"borrowed_query_channel": 15}, expected),
        ({"zero_borrowed_query_channel": False}, replace(expected, zero_borrowed="none")),
        ({"trained_checkpoint": False}, None),
    ):
        _write(folder, "dms_metadata.json", values | changes)
        assert _read(folder=folder) == meaning


EVERY_KEY = pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("window_size", 77, {"window_tokens": 77}),
        ("dms_window_size", 0, {"window_tokens": 0}),
        ("alpha_scale", 10, {"alpha_scale": 10.0}),
        ("dms_alpha_scale", -2.5, {"alpha_scale": -2.5}),
        ("alpha_offset", 0.5, {"alpha_offset": 0.5}),
        ("dms_alpha_offset", 3, {"alpha_offset": 3.0}),
        ("dms_initial_alpha_offset", -1.5, {"alpha_offset": -1.5}),
        ("target_cr", 4, {"target_compression": 4.0}),
        ("dms_cr", 1, {"target_compression": 1.0}),
        ("target_compression_ratio", 2.5, {"target_compression": 2.5}),
        ("shift", 1, {"shift": 1}),
        ("zero_borrowed", "none", {"zero_borrowed": "none"}),
        ("dms_window_size", None, {}),
    ],
)


@EVERY_KEY
def test_every_key_in_metadata(folder: Path, key: str, value: Any, change: dict[str, Any]) -> None:
    for values in ({key: value}, {"config": {key: value}}, {key: value, "config": {key: value, "note": "twice"}}):
        _write(folder, "dms_metadata.json", values)
        assert _read(folder=folder) == replace(SHISA, **change)


@EVERY_KEY
def test_every_key_in_a_training_log(folder: Path, key: str, value: Any, change: dict[str, Any]) -> None:
    marker = {"dms_alpha_scale": 100.0} if "scale" not in key else {}
    _write(folder, "training_log.json", marker | {key: value})
    assert _read(folder=folder) == replace(SHISA, **change)


@EVERY_KEY
def test_every_key_in_config(key: str, value: Any, change: dict[str, Any]) -> None:
    marker = {"dms_alpha_scale": 100.0} if "scale" not in key else {"dms_window_size": 256}
    assert _read(marker | {key: value}) == replace(SHISA, **change)


@pytest.mark.parametrize(
    "key", ["dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_alpha_offset", "dms_cr"]
)
def test_each_of_these_in_config_declares_eviction(key: str) -> None:
    assert _read({key: 7}) is not None
    assert _read({key.removeprefix("dms_"): 7}) is None


def test_metadata_file_comes_before_training_log_before_config(folder: Path) -> None:
    own = _write(folder, "config.json", {"dms_window_size": 1})
    assert _read(own, folder) == replace(SHISA, window_tokens=1)
    _write(folder, "training_log.json", {"window_size": 2})
    assert _read(own, folder) == replace(SHISA, window_tokens=2)
    _write(folder, "dms_metadata.json", {"window_size": 3})
    assert _read(own, folder) == replace(SHISA, window_tokens=3)


OTHER_LOGS = [
    "", "{", "[]", "3", "\x00", "\x80", "[" * 100_000, '{"step": 1}\n{"step": 2}', '{"config": {"window_size": ',
    "{}", '{"config": {"lr": 1e-5, "context_len": 4096}}', '{"config": [1]}', '{"config": null}', '{"loss": [1, 2]}',
]  # fmt: skip


@pytest.mark.parametrize("log", OTHER_LOGS, ids=lambda log: repr(log[:20]))
def test_training_log_of_another_trainer_is_ignored(folder: Path, log: str) -> None:
    (folder.parent / "training_log.json").write_text(log, encoding="latin-1")
    assert _read(folder=folder) is None
    assert _read({"dms_cr": 4, "model_type": "qwen3"}, folder) == replace(NVIDIA, target_compression=4.0)


def test_training_log_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be what declares the eviction, a folder can't."""
    path = folder.parent / "training_log.json"
    path.mkdir()
    assert _read(folder=folder) is None
    path.rmdir()
    path.touch()
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError("denied")))
    with pytest.raises(ValueError, match=f"^{path} is not readable JSON: denied"):
        _read(folder=folder)


def test_training_log_is_found_from_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(folder, "training_log.json", {"window_size": 5})
    monkeypatch.chdir(folder)
    assert _read(folder=Path()) == replace(SHISA, window_tokens=5)


@pytest.mark.parametrize(
    ("values", "metadata", "names", "expected"),
    [
        ({"model_type": "qwen3", "dms_cr": 1}, None, False, NVIDIA),
        ({"model_type": "llama", "dms_cr": 1}, None, False, SHISA),
        ({"model_type": "qwen2", "dms_cr": 1}, None, False, SHISA),
        ({"model_type": "qwen3"}, {"dms_cr": 1}, False, SHISA),
        ({"model_type": "qwen3", "dms_cr": 1, "zero_borrowed_query_channel": True}, None, False, SHISA),
        ({"model_type": "qwen3", "dms_cr": 1, "borrowed_query_channel": 15}, None, False, SHISA),
        ({"model_type": "qwen3", "dms_cr": 1, "auto_map": {"AutoModel": "plain.Model"}}, None, False, NVIDIA),
        ({"model_type": "llama", "dms_cr": 1, "auto_map": {"AutoModel": "llama_dms.Model"}}, None, False, NVIDIA),
        ({"auto_map": {"AutoModel": "x.Qwen3ForCausalLMDMS"}}, {"dms_cr": 1}, False, NVIDIA),
        ({"dms_separate_alpha": True, "dms_cr": 1}, None, True, ADAPTER),
        ({"dms_separate_alpha": True}, {"dms_cr": 1}, True, ADAPTER),
        ({"dms_cr": 1}, None, True, ADAPTER),
        ({}, {"dms_cr": 1}, True, ADAPTER),
        ({}, {"dms_cr": 1, "dms_separate_alpha": True, "dms_alpha_per": "head"}, True, ADAPTER),
        (PUBLISHED_NVIDIA | {"dms_cr": 1}, None, True, ADAPTER),
    ],
)
def test_rule_for_telling_layouts(
    folder: Path, values: dict[str, Any], metadata: dict[str, Any] | None, names: bool, expected: DMSConfig
) -> None:
    if metadata is not None:
        _write(folder, "dms_metadata.json", metadata)
    found = _read(values, folder, ADAPTER_NAMES if names else [])
    assert found == replace(expected, target_compression=1.0)


def test_adapter_tensors_alone_take_the_defaults() -> None:
    assert _read(names=ADAPTER_NAMES) == ADAPTER
    assert _read({"dms_separate_alpha": True}, names=ADAPTER_NAMES) == ADAPTER


@pytest.mark.parametrize("place", ["own", "metadata"])
@pytest.mark.parametrize("names", [[], ADAPTER_NAMES])
def test_eviction_can_be_disabled(folder: Path, place: str, names: list[str]) -> None:
    disabled = {"dms_disable_eviction": True}
    _write(folder, "dms_metadata.json", {"window_size": 8} | (disabled if place == "metadata" else {}))
    assert _read(disabled if place == "own" else {}, folder, names) is None


def test_eviction_explicitly_not_disabled() -> None:
    assert _read({"dms_disable_eviction": False, "dms_window_size": 8}) == replace(SHISA, window_tokens=8)
    assert _read({"dms_disable_eviction": False}) is None


@pytest.mark.parametrize("missing", ADAPTER_NAMES)
def test_adapter_that_lacks_a_layer(missing: str) -> None:
    names = [name for name in ADAPTER_NAMES if name != missing]
    for values in ({}, {"dms_separate_alpha": True}):
        with pytest.raises(ValueError, match=f"declares a DMS adapter but has no tensor {missing}"):
            _read(values, names=names)


def test_adapter_declared_without_any_tensor(tmp_path: Path) -> None:
    save_checkpoint(tiny_model("qwen3"), tmp_path, "none")
    edit_json(tmp_path / "config.json", dms_separate_alpha=True)
    with pytest.raises(ValueError, match=r"config.json: the checkpoint declares a DMS adapter but has no tensor model"):
        open_checkpoint(tmp_path)


def test_adapter_with_one_row_for_all_heads(folder: Path) -> None:
    values = {"dms_alpha_per": "layer", "dms_separate_alpha": True}
    with pytest.raises(ValueError, match=r"^config.json: dms_alpha_per 'layer' is not supported; supported is 'head'"):
        _read(values, names=ADAPTER_NAMES)
    _write(folder, "dms_metadata.json", values)
    with pytest.raises(ValueError, match=r"/dms_metadata.json: dms_alpha_per 'layer' is not supported"):
        _read({}, folder, ADAPTER_NAMES)


def test_adapter_with_a_bias() -> None:
    bias = "model.layers.0.self_attn.dms_proj_alpha.bias"
    with pytest.raises(ValueError, match=f"tensor {bias} is not supported"):
        _read(names=[*ADAPTER_NAMES, bias])


def test_adapter_tensors_that_the_configuration_denies() -> None:
    with pytest.raises(ValueError, match="dms_separate_alpha is false, but the checkpoint has dms_proj_alpha tensors"):
        _read({"dms_separate_alpha": False}, names=ADAPTER_NAMES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_size": -1}, "window_size must be >= 0, got -1"),
        ({"dms_window_size": -5}, "dms_window_size must be >= 0, got -5"),
        ({"window_size": 256.0}, "window_size must be an integer, got 256.0"),
        ({"window_size": "256"}, "window_size must be an integer, got '256'"),
        ({"window_size": True}, "window_size must be an integer, got True"),
        ({"alpha_scale": "100"}, "alpha_scale must be a finite number, got '100'"),
        ({"dms_alpha_scale": [1]}, "dms_alpha_scale must be a finite number"),
        ({"alpha_scale": float("nan")}, "alpha_scale must be a finite number, got nan"),
        ({"alpha_offset": float("-inf")}, "alpha_offset must be a finite number, got -inf"),
        ({"dms_initial_alpha_offset": False}, "dms_initial_alpha_offset must be a finite number, got False"),
        ({"dms_alpha_offset": 10**400}, "dms_alpha_offset must be a finite number"),
        ({"target_cr": 0.5}, "target_cr must be >= 1, got 0.5"),
        ({"dms_cr": "8x"}, "dms_cr must be a finite number, got '8x'"),
        ({"window_size": 1, "dms_window_size": 2}, "window_size 1 and dms_window_size 2 disagree"),
        ({"alpha_offset": 1, "dms_initial_alpha_offset": 2}, "alpha_offset 1 and dms_initial_alpha_offset 2 disagree"),
        ({"window_size": 1, "config": {"window_size": 2}}, "window_size 1 and window_size 2 disagree"),
        ({"config": [1]}, "config must be an object"),
        ({"shift": 2}, "shift must be one of 0, 1, got 2"),
        ({"shift": "1"}, "shift must be an integer, got '1'"),
        ({"zero_borrowed": "always"}, "zero_borrowed must be one of 'none', 'pre_rope', 'pre_and_post_rope'"),
        ({"zero_borrowed": False}, "zero_borrowed must be one of"),
        ({"zero_borrowed": ["none"]}, "zero_borrowed must be one of"),
        ({"zero_borrowed_query_channel": "yes"}, "zero_borrowed_query_channel must be true or false"),
        ({"dms_disable_eviction": 1}, "dms_disable_eviction must be true or false, got 1"),
        ({"dms_separate_alpha": "no"}, "dms_separate_alpha must be true or false"),
        ({"trained_checkpoint": 1}, "trained_checkpoint must be true or false"),
        ({"corrected_mask": False}, "corrected_mask false is not supported"),
        ({"borrowed_query_channel": 0}, "borrowed_query_channel is 0, but the model needs -1 or 15"),
        ({"num_layers": 16}, "num_layers is 16, but the model needs 2"),
        ({"num_q_heads": 32}, "num_q_heads is 32, but the model needs 4"),
        ({"num_kv_heads": "2"}, "num_kv_heads must be an integer"),
        ({"head_dim": 64}, "head_dim is 64, but the model needs 16"),
    ],
)
def test_lies_name_file_and_key(folder: Path, values: dict[str, Any], message: str) -> None:
    _write(folder, "dms_metadata.json", values)
    with pytest.raises(ValueError, match=f"^{folder}/dms_metadata.json: {message}"):
        _read(folder=folder)


def test_lies_in_the_other_places(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^config.json: dms_window_size must be >= 0"):
        _read({"dms_window_size": -1})
    _write(folder, "training_log.json", {"window_size": "wide"})
    with pytest.raises(ValueError, match=rf"^{folder.parent}/training_log.json: window_size must be an integer"):
        _read(folder=folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00"])
def test_corrupt_metadata_file(folder: Path, content: str) -> None:
    (folder / "dms_metadata.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{folder}/dms_metadata.json "):
        _read(folder=folder)


KEYS = (
    *("window_size", "dms_window_size", "alpha_scale", "dms_alpha_scale", "alpha_offset", "dms_alpha_offset"),
    *("dms_initial_alpha_offset", "target_cr", "dms_cr", "target_compression_ratio", "shift", "zero_borrowed"),
    *("config", "dms_separate_alpha", "dms_disable_eviction", "dms_alpha_per", "trained_checkpoint", "corrected_mask"),
    *("borrowed_query_channel", "zero_borrowed_query_channel", "num_layers", "head_dim", "auto_map", "model_type"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.dictionaries(st.sampled_from(KEYS), JSON), adapter=st.booleans())
def test_any_metadata_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], adapter: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-dms"
    folder.mkdir(exist_ok=True)
    for where in ("dms_metadata.json", "config.json"):
        own = _write(folder, where, values)
        with contextlib.suppress(ValueError):
            _read(own, folder, ADAPTER_NAMES if adapter else [])
        (folder / "dms_metadata.json").unlink(missing_ok=True)
