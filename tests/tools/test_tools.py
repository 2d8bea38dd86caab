"""The tools: what they print, and what they refuse in one line."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastdms
from fastdms.bundled_model import default_model
from fastdms.cli import main
from fastdms.decoder import DecoderLayer
from fastdms.ops.int4 import INT4
from fastdms.tools import demo
from fastdms.tools.shapes import SHAPES, keep_share_rule, random_model
from tests.checkpoint.files import edit_json
from tests.int4_folder import int4_model, pack_folder
from tests.models import save_checkpoint, tiny_model
from tests.running import engine_of
from tests.tiny_tokenizers import byte_level, smollm2


def test_kv_error_compares_with_fp32_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tiny_model("qwen3", intermediate_size=128), tmp_path / "model")
    byte_level().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for this " * 4)
    assert main(["kv-error", str(folder), "--text", str(text), "--prompt-tokens", "20", "--decode-tokens", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("mean")[0].strip() for line in lines[1:]] == [
        "fp32", "bf16", "fp8", "fp8, no scale", "fp8 weights", "int4 weights", "int4, exact head", "int4, int4 head",
    ]  # fmt: skip
    means = [float(line.split("mean")[1].split()[0]) for line in lines[1:]]
    exact, bf16, fp8, plain, weights = means[:5]
    assert exact == 0.0 < bf16 < fp8
    assert fp8 != plain
    assert bf16 < weights != fp8
    assert len(set(means[4:])) == 4


def test_kv_error_leaves_out_weights_that_the_model_can_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for this " * 4)
    odd = save_checkpoint(tiny_model("qwen3"), tmp_path / "odd")
    stored = pack_folder(save_checkpoint(int4_model("qwen3"), tmp_path / "stored"), 64)
    pages = ["fp32", "bf16", "fp8", "fp8, no scale"]
    for folder, names, reason in (
        (odd, [*pages, "fp8 weights"], "int4 weights; int4 weights come in groups of 128, 64, 32"),
        (stored, pages, "other weights; the checkpoint's are int4"),
    ):
        byte_level().save_pretrained(folder)
        options = ["--text", str(text), "--prompt-tokens", "20", "--decode-tokens", "10"]
        assert main(["kv-error", str(folder), *options]) == 0
        _, *lines, last = capsys.readouterr().out.splitlines()
        assert [line.split("mean")[0].strip() for line in lines] == names
        assert last.startswith(f"left out: {reason}")


def test_demo_compares_with_a_dense_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastdms, "default_model", lambda: default_model(adapter=False))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--max-tokens", "3"]) == 0
    assert not list(tmp_path.iterdir()), "nothing to draw"
    out = capsys.readouterr().out
    assert "eviction is off and every token is kept" in out
    assert out.splitlines()[-1].startswith("Compact cache: ")
    # fp32 pages can't be smaller than a dense bf16 cache, fp8 ones can.
    assert ("times less" if torch.cuda.is_available() else "times as much") in out.splitlines()[-1]


@pytest.fixture
def sparse_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model that evicts is the default, its passage is short, and the current folder is empty."""
    model = tiny_model("llama", max_position_embeddings=4096)
    folder = save_checkpoint(model, tmp_path / "model", "adapter", window_tokens=7)
    byte_level().save_pretrained(folder)
    passage = tmp_path / "demo.txt"
    passage.write_text("CHAPTER 1. A short one.\n\nIt is told again.\n")
    monkeypatch.setattr(fastdms, "default_model", lambda: folder)
    monkeypatch.setattr(demo, "PASSAGE", passage)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("sparse_default")
def test_demo_shows_eviction_on_a_passage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("CHAPTER 1. A short one ... (9 words: ")
    assert "> Tell this story again" in out
    found = re.search(r"Eviction: (\d+\.\d)% of the tokens outside the window of 7 are kept \((.*)x fewer; (.*)\)", out)
    assert found is not None
    assert 10 < float(found[1]) < 90
    assert float(found[2]) == pytest.approx(100 / float(found[1]), abs=0.06)
    assert found[3] == "trained for 8x"
    assert "Heat map, layers x KV heads: fastdms-live-share.png" in out
    assert Path("fastdms-live-share.png").read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[-1].startswith("Compact cache: ")


@pytest.mark.usefixtures("sparse_default")
def test_demo_with_a_prompt_and_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "hello there", "--max-tokens", "3", "--heat-map", "map.png"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> hello there\n")
    assert [path.name for path in Path().iterdir()] == ["map.png"]


@pytest.mark.usefixtures("sparse_default")
def test_demo_goes_on_where_the_picture_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "hello there", "--max-tokens", "3", "--heat-map", "no-such-folder/map.png"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^No heat map: .*no-such-folder/map\.png", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("Compact cache: ")


@pytest.mark.usefixtures("sparse_default")
def test_demo_within_the_window_has_nothing_to_show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(fastdms.default_model() / "config.json", dms_window_size=300)
    assert main(["demo", "hello there", "--max-tokens", "3"]) == 0
    assert "tokens lie within the window of 300: nothing to evict yet." in capsys.readouterr().out
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("sparse_default")
def test_demo_without_matplotlib_says_how_to_get_the_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "No heat map: a picture needs matplotlib: pip install 'fastdms[plots]'" in out
    assert out.splitlines()[-1].startswith("Compact cache: ")


def test_the_shipped_passage_is_long_enough_to_evict_from_and_fits() -> None:
    text = demo.PASSAGE.read_text(encoding="utf-8")
    assert 1500 < len(smollm2()(text)["input_ids"]) < 2500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kv-error"], "the following arguments are required: --text"),
        (["kv-error", "--text", "no-such-file"], "No such file"),
        (["demo", "--max-tokens", "0"], "max_tokens must be"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdms: error: ")
    assert message in line


def test_kv_error_needs_a_tokenizer_and_enough_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert main(["kv-error", str(folder), "--text", str(text)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    byte_level().save_pretrained(folder)
    assert main(["kv-error", str(folder), "--text", str(text)]) == 2
    assert "384 are needed" in capsys.readouterr().err


def test_a_random_model_of_each_shape_is_what_it_says() -> None:
    for config in SHAPES.values():
        assert keep_share_rule(config, 1.0, 256) is None
        rule = keep_share_rule(config, 0.125, 256)
        assert isinstance(rule, fastdms.DMSConfig)
        assert rule.alpha_offset < 0, "most tokens must be flagged"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["auto", "fp8", "int4"])
def test_a_random_model_has_weights_of_any_kind(weights: str, tied: bool) -> None:
    config = replace(SHAPES["tiny"], tie_word_embeddings=tied)
    with random_model(config, None, device="cpu", weights=weights, max_context=64) as model:
        decoder = engine_of(model).runner.decoder
        layer = decoder.layers[1]
        assert isinstance(layer, DecoderLayer)
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down, decoder.lm_head):
            fp8 = weights == "fp8" or (weights == "int4" and linear is decoder.lm_head)
            assert (linear.weight.dtype == torch.float8_e4m3fn) == fp8
            assert (linear.weight.dtype == INT4) == (weights == "int4" and not fp8)
            assert linear.dequantised(torch.float32).std() == pytest.approx(0.02, rel=0.05)
        assert (decoder.lm_head.weight is decoder.embed) == (tied and weights == "auto")
        close = (decoder.lm_head.dequantised(torch.float32) - decoder.embed).abs().max() < 0.01
        assert bool(close) == tied
        assert bool((layer.post_norm == 1).all())
        assert bool(torch.isfinite(model.score([1, 2, 3], 1)).all())
