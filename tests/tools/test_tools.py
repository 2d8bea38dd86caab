"""The tools: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastdms
from fastdms.cli import main
from tests.models import save_checkpoint, tiny_model
from tests.tiny_tokenizers import byte_level

BENCH = ["bench", "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--new-tokens", "4"]


def test_bench_reports_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--context", "600", "--window", "32", "--concurrency", "1", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rows"] for line in lines] == [1, 3]
    for line in lines:
        assert 0.05 < line["live_share"] < 0.4
        assert line["kv_bytes"] < line["kv_pool_bytes"]
        assert line["prefill_tok_s"] > 0


def test_bench_without_eviction_keeps_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--context", "40", "--kept", "1", "--concurrency", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["live_share"] == 1.0


def test_kv_error_compares_with_fp32_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tiny_model("qwen3"), tmp_path / "model")
    byte_level().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for this " * 4)
    assert main(["kv-error", str(folder), "--text", str(text), "--prompt-tokens", "20", "--decode-tokens", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("mean")[0].strip() for line in lines[1:]] == ["fp32", "bf16", "fp8", "fp8, no scale"]
    exact, bf16, fp8, plain = (float(line.split("mean")[1].split()[0]) for line in lines[1:])
    assert exact == 0.0 < bf16 < fp8
    assert fp8 != plain


def test_demo_compares_with_a_dense_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "eviction is off and every token is kept" in out
    assert out.splitlines()[-1].startswith("Compact cache: ")
    assert "times as much" in out.splitlines()[-1], "fp32 pages can't be smaller than a dense bf16 cache"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shape", "gpt-5"], "--shape must be one of llama-3.2-1b"),
        ([*BENCH, "--kept", "0"], "--kept must be in (0, 1], got 0.0"),
        ([*BENCH, "--repeats", "0"], "--repeats must be at least 1, got 0"),
        ([*BENCH, "--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
        (["bench", "--rows"], "unrecognized arguments: --rows"),
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
    from fastdms.tools.shapes import SHAPES, keep_share_rule

    for config in SHAPES.values():
        assert keep_share_rule(config, 1.0, 256) is None
        rule = keep_share_rule(config, 0.125, 256)
        assert isinstance(rule, fastdms.DMSConfig)
        assert rule.alpha_offset < 0, "most tokens must be flagged"
