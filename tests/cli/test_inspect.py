"""``fastdms inspect`` against what the checkpoints hold."""

from __future__ import annotations

import pytest

from fastdms.checkpoint import open_checkpoint
from fastdms.cli import main
from fastdms.cli.inspect import dense_kv_bytes, expected_kv_bytes, num_parameters
from tests.checkpoint.files import edit_json
from tests.models import DMS_LAYOUTS, FAMILIES, save_checkpoint, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_right(tmp_path, family):
    checkpoint = open_checkpoint(save_checkpoint(tiny_model(family), tmp_path))
    stored = sum(tensor.numel() for _, tensor in checkpoint.tensors())
    assert num_parameters(checkpoint.config, checkpoint.dms) == stored


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_inspect(tmp_path, capsys, layout):
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "model", layout, window_tokens=7)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    checkpoint = open_checkpoint(folder)
    stored = sum(tensor.numel() for _, tensor in checkpoint.tensors())
    assert num_parameters(checkpoint.config, checkpoint.dms) == stored
    # 2 layers, 2 KV heads, K and V, 16 channels of 2 bytes; in fp8 16 of 1 byte and a scale of 2.
    assert dense_kv_bytes(checkpoint.config) == 2 * 2 * 2 * 16 * 2
    assert expected_kv_bytes(checkpoint.config, checkpoint.dms) == 2 * 2 * 2 * 18 / 8
    for expected in ("llama", "window 7 tokens", "256 bytes dense in bf16", "18 expected compact", "trained for 8x"):
        assert expected in out
    assert ("adapter of its own" if layout == "adapter" else "borrowed query channel") in out
    lines = [line for line in out.splitlines() if line.startswith("adapter")]
    if layout == "adapter":
        # Each layer: rows of width 64 for 2 KV heads and a norm, in fp32.
        size = f"2 layers x 2 KV heads, {2 * 3 * 64 * 4:,} bytes"
        assert lines == [f"{'adapter':<14}{size}, trained for 8x with a window of 7 tokens"]
    else:
        assert not lines
    assert f"shift {0 if layout == 'shisa' else 1}" in out


def test_inspect_a_model_without_dms(tmp_path, capsys):
    folder = save_checkpoint(tiny_model("qwen3"), tmp_path)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "keeps every token" in out
    assert "144 expected compact (fp8, no eviction): 1.8x less" in out


def test_inspect_an_adapter_of_unknown_compression(tmp_path, capsys):
    folder = save_checkpoint(tiny_model("qwen3"), tmp_path, "adapter")
    edit_json(folder / "config.json", remove=("dms_cr",))
    assert main(["inspect", str(folder)]) == 0
    assert "bytes, trained compression not known with a window of 7 tokens" in capsys.readouterr().out
