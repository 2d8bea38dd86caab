"""``fastdms quality``: its figures against the written-out definition, its files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import fastdms
from fastdms.cli import main
from fastdms.tools.quality import _parser, _settings, masked, needle
from fastdms.tools.quality import measure as measure_module
from fastdms.tools.quality.heatmap import save_heatmap
from fastdms.tools.quality.measure import batches, measure, open_subject
from fastdms.tools.quality.settings import PRESETS, Settings
from fastdms.tools.quality.texts import Text, token_windows
from tests import oracle
from tests.models import DMS_LAYOUTS, Layout, adapter_weights, dms_config, save_checkpoint, tiny_model
from tests.source_tree import ROOT
from tests.tiny_tokenizers import byte_level
from tests.tolerance import LOGITS_RELATIVE

WIKITEXT = ROOT / "tests" / "data" / "wikitext.txt"
SMALL = ["--context", "60", "--prompt-tokens", "40"]
SETTINGS = Settings(context=60, prompt_tokens=40, sequences=2, prefill_points=4, device="cpu")


def sparse_checkpoint(folder: Path, layout: Layout, family: str = "llama", **config: Any) -> Path:
    """A tiny model with a tokenizer; ``config``: keys of config.json to set besides."""
    save_checkpoint(tiny_model(family), folder, layout)
    byte_level().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def measured(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    return measure(open_subject(folder, [wikitext()], settings))


def wikitext() -> Text:
    return Text(name="wikitext", content=WIKITEXT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_the_figures_are_those_of_the_definition(layout: Layout, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "model", layout)
    (result,) = measured(folder, SETTINGS)
    model, rule = tiny_model("llama"), dms_config(layout)
    assert rule is not None
    adapter = adapter_weights(model) if layout == "adapter" else None
    never = dms_config(layout, window_tokens=10**6)  # zeroes as trained, evicts nothing
    windows = token_windows(byte_level(), wikitext(), 61, 2)
    points = [4, 9, 14, 19]  # after 45, 50, 55 and 60 tokens
    kld, match, nll, kept, single = [], [], [], [], []
    for window in windows:
        on = oracle.run(model, window[:60], rule, adapter)
        off = oracle.dms_logits(model, window[:60], never, adapter)
        log_p, log_q = (logits[40:60].double().log_softmax(-1) for logits in (off, on.logits))
        kld.append((log_p.exp() * (log_p - log_q)).sum(-1))
        match.append(log_p.argmax(-1) == log_q.argmax(-1))
        nll.append(torch.stack([-log[range(20), window[41:]] for log in (log_p, log_q)]))
        kept.append(on.kept.double())
        single.append(kld[-1][points])
    decode, prefill = result["decode"], result["prefill"]
    assert decode["steps"] == 40
    assert decode["kld"] == pytest.approx(torch.cat(kld).mean().item(), rel=LOGITS_RELATIVE)
    assert decode["kld_max"] == pytest.approx(torch.cat(kld).max().item(), rel=LOGITS_RELATIVE)
    assert decode["greedy_match"] == torch.cat(match).double().mean().item()
    perplexities = torch.cat(nll, dim=1).mean(1).exp().tolist()
    assert [decode["perplexity_off"], decode["perplexity_on"]] == pytest.approx(perplexities, rel=LOGITS_RELATIVE)
    assert prefill["steps"] == 8
    assert prefill["kld"] == pytest.approx(torch.cat(single).mean().item(), rel=LOGITS_RELATIVE)
    perplexities = torch.cat(nll, dim=1)[:, [*points, *(20 + point for point in points)]].mean(1).exp().tolist()
    assert [prefill["perplexity_off"], prefill["perplexity_on"]] == pytest.approx(perplexities, rel=LOGITS_RELATIVE)
    outside = torch.stack(kept)[..., : 60 - 8].mean((0, -1))  # the window is 7 and the token itself
    assert np.array(result["live_share_outside_window_spans"]) == pytest.approx(outside.numpy(), rel=LOGITS_RELATIVE)
    assert result["live_share"] == pytest.approx(torch.stack(kept).mean().item(), rel=LOGITS_RELATIVE)
    mean = result["live_share_outside_window"]
    assert mean == pytest.approx(outside.mean().item(), rel=LOGITS_RELATIVE)
    assert result["compression_outside_window"] == 1 / mean
    assert decode["kld"] > 0.01, "the model must feel what is evicted, or this test can't fail"
    assert 0.1 < mean < 0.9


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_without_eviction_nothing_differs(layout: Layout, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "model", layout)
    _set_offset(folder, 1e6)
    (result,) = measured(folder, SETTINGS)
    for path in ("decode", "prefill"):
        assert result[path]["kld_max"] <= LOGITS_RELATIVE**2  # of second order in the logits
        assert result[path]["greedy_match"] == 1.0
        assert result[path]["perplexity_change"] == pytest.approx(0.0, abs=LOGITS_RELATIVE)
    assert result["live_share"] == result["live_share_outside_window"] == result["compression_outside_window"] == 1.0


def test_everything_evicted_has_no_compression(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "model", "shisa")
    _set_offset(folder, -1e6)
    (result,) = measured(folder, SETTINGS)
    assert result["live_share_outside_window"] == 0.0
    assert result["compression_outside_window"] is None
    assert result["live_share"] == pytest.approx(8 / 60)


def _set_offset(folder: Path, offset: float) -> None:
    metadata, config = folder / "dms_metadata.json", folder / "config.json"
    if metadata.exists():
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"alpha_offset": offset}))
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dms_initial_alpha_offset": offset}))


def test_texts_and_kv_dtypes_are_measured_each(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "model", "shisa")
    texts = [wikitext(), Text(name="other", content=wikitext().content[::-1])]
    settings = Settings(
        context=60, prompt_tokens=40, sequences=1, prefill_points=0, kv_dtypes=("auto", "fp32", "fp8"), device="cpu"
    )
    results = measure(open_subject(folder, texts, settings))
    described = [(result["text"], result["kv_dtype"]) for result in results]
    assert described == [("wikitext", "fp32"), ("wikitext", "fp8"), ("other", "fp32"), ("other", "fp8")]
    assert len({result["decode"]["kld"] for result in results}) == 4
    assert all(result["prefill"] is None for result in results)
    fp32, fp8 = results[:2]
    assert fp8["kv_bytes"] < fp32["kv_bytes"]
    assert fp8["dense_bf16_bytes"] == fp32["dense_bf16_bytes"] == 60 * 2 * 2 * 2 * 16 * 2


def test_more_sequences_than_rows_run_in_turn(tmp_path: Path) -> None:
    """What is measured doesn't hang on how many sequences run at once."""
    folder = sparse_checkpoint(tmp_path / "model", "shisa")
    settings = Settings(context=30, prompt_tokens=20, sequences=3, prefill_points=3, device="cpu")
    (together,) = measured(folder, settings)
    (in_turn,) = measured(folder, replace(settings, rows=2))
    for path in ("decode", "prefill"):
        assert in_turn[path] == pytest.approx(together[path], rel=LOGITS_RELATIVE)
    for name in ("live_share_outside_window_spans", "kv_bytes", "dense_bf16_bytes", "sequences"):
        assert in_turn[name] == together[name]


def test_a_large_vocabulary_runs_fewer_rows_at_once() -> None:
    sequences = [[i] for i in range(10)]
    assert [len(batch) for batch in batches(sequences, 1025, 300, 8)] == [8, 2]
    assert [len(batch) for batch in batches(sequences, 1025, 151936, 8)] == [3, 3, 3, 1]
    assert [len(batch) for batch in batches(sequences, 10**6, 151936, 8)] == [1] * 10


def test_presets_and_options_that_win_over_them() -> None:
    assert _settings(_parser().parse_args(["--text", "x"])) == PRESETS["2k"] == Settings()
    shapes = {name: (preset.prompt_tokens, preset.decode_tokens, preset.sequences) for name, preset in PRESETS.items()}
    assert shapes == {"first-release": (1024, 16, 4), "2k": (1024, 1024, 4), "8k": (7168, 1024, 4)}
    given = ["--text", "x", "--preset", "8k", "--context", "7200", "--kv-dtype", "fp32", "fp8", "--prefill-points", "0"]
    assert _settings(_parser().parse_args(given)) == Settings(
        context=7200, prompt_tokens=7168, kv_dtypes=("fp32", "fp8"), prefill_points=0
    )


def test_the_command_prints_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle, "_NEEDLES_PER_DEPTH", 1)
    folder, out = sparse_checkpoint(tmp_path / "tiny-dms", "nvidia"), tmp_path / "new" / "report"
    command = ["quality", str(folder), "--text", str(WIKITEXT), "--context", "120", "--prompt-tokens", "100"]
    command += ["--sequences", "2", "--device", "cpu", "--kv-dtype", "fp32", "fp8"]
    assert main([*command, "--transformers", "--needle", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["live_share-wikitext.png", "quality.json", "quality.md"]
    assert (out / "quality.md").read_text() == printed
    report = json.loads((out / "quality.json").read_text())
    assert (report["model"], report["card"], report["settings"]["context"]) == ("tiny-dms", "cpu", 120)
    assert report["versions"]["torch"] == torch.__version__
    assert report["dms"]["zero_borrowed"] == "pre_and_post_rope"
    assert len(report["results"]) == 2
    assert len(report["needles"]) == 2 * 5
    (in_transformers,) = report["transformers"]
    assert max(map(abs, in_transformers["relative_differences"].values())) <= LOGITS_RELATIVE
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| wikitext | fp")]
    assert [row[2] for row in rows[:2]] == ["40", "40"]
    assert rows[0][3] == f"{report['results'][0]['live_share_outside_window']:.1%}"
    picture = matplotlib.image.imread(out / "live_share-wikitext.png")
    assert min(picture.shape[:2]) > 100
    assert picture.std() > 0.1


def test_help_does_not_load_torch() -> None:
    code = "import sys, fastdms.tools.quality as q; q._parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def forbid_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, weights must not be read."""
    for module, name in ((fastdms, "compile"), (masked, "MaskedModel")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("read weights before it looked"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-dtype", "fp32", "fp9"], "kv_dtype must be 'auto' or one of"),
        (["--context", "2000"], "max_context must be an integer in [2, 1024], got 2000"),
        (["--context", "900", "--prompt-tokens", "20"], "the text wikitext has"),
        (["--context", "8", "--prompt-tokens", "4"], "context must reach past the window of 7 tokens"),
        (["--context", "40", "--prompt-tokens", "40"], "leave none for the decode path"),
        (["--sequences", "0"], "sequences must be an integer >= 1, got 0"),
        (["--prefill-points", "-1"], "prefill_points must be an integer >= 0, got -1"),
        (["--preset", "3k"], "invalid choice: '3k'"),
        (["--device", "tpu"], "device must be"),
        (["--text", "missing.txt"], "missing.txt can't be read"),
        (["--text", str(WIKITEXT)], "two texts are named wikitext"),
        (["--needle", "--transformers"], "a context of 60 tokens is too short for a needle"),
    ],
)
def test_bad_arguments_are_one_line(
    options: list[str],
    message: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_running(monkeypatch)
    command = ["quality", str(checkpoint), "--text", str(WIKITEXT), "--device", "cpu", *SMALL]
    assert main([*command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdms: error: ")
    assert message in line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("checkpoint"), "shisa")


def test_a_checkpoint_must_have_eviction_and_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_checkpoint(tiny_model("llama"), tmp_path / "dense")
    byte_level().save_pretrained(dense)
    assert main(["quality", str(dense), "--text", str(WIKITEXT)]) == 2
    assert "has no trained eviction (DMS), so there is nothing to measure" in capsys.readouterr().err
    mute = save_checkpoint(tiny_model("llama"), tmp_path / "mute", "shisa")
    assert main(["quality", str(mute), "--text", str(WIKITEXT), *SMALL]) == 2
    assert "has no tokenizer, which reading text needs" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_first(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_running(monkeypatch)
    (tmp_path / "taken").write_text("")
    assert main(["quality", str(checkpoint), "--text", str(WIKITEXT), *SMALL, "--out", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_are_refused_first(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_running(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["quality", str(checkpoint), "--text", str(WIKITEXT), *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "a picture needs matplotlib: pip install 'fastdms[plots]'" in capsys.readouterr().err


def test_a_checkpoint_is_opened_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "_NEEDLES_PER_DEPTH", 1)
    opened = []

    def tokenizer_of(folder: Path) -> Any:
        opened.append(folder)
        return byte_level()

    monkeypatch.setattr(measure_module, "load_tokenizer", tokenizer_of)
    command = ["quality", str(checkpoint), "--text", str(WIKITEXT), "--context", "120", "--prompt-tokens", "118"]
    command += ["--sequences", "1", "--prefill-points", "0", "--device", "cpu", "--transformers", "--needle"]
    assert main(command) == 0
    assert opened == [checkpoint]


@pytest.mark.parametrize("share", [[0.5], [[]], [[0.5, 1.5]], [[0.5, -0.1]], [[0.5, float("nan")]]])
def test_a_heat_map_needs_shares_by_layer_and_head(share: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heat map"):
        save_heatmap(tmp_path / "a.png", share, "title")
    assert not list(tmp_path.iterdir())


def test_a_heat_map_says_how_to_get_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdms\[plots\]'"):
        save_heatmap(tmp_path / "a.png", [[0.5]], "title")


def test_a_heat_map_shows_what_is_kept(tmp_path: Path) -> None:
    """A span that keeps all is bright, one that keeps nothing is dark; layers lie across."""
    share = np.zeros((60, 8))
    share[:30] = 1.0
    save_heatmap(tmp_path / "a.png", share, "a title that is longer than one line could ever hold " * 6)
    brightness = matplotlib.image.imread(tmp_path / "a.png")[..., :3].mean(-1)
    height, width = brightness.shape
    middle = brightness[height // 2]
    assert middle[width // 4] > 2 * middle[width * 5 // 8]
