"""The evaluation in transformers that ``fastdms quality`` is checked by, against the oracle and the runtime."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdms.tools.quality.masked import MaskedModel, measure_masked, relative_differences
from fastdms.tools.quality.measure import measure, open_subject
from fastdms.tools.quality.settings import Settings
from fastdms.tools.reference_model import load_reference
from tests import oracle
from tests.models import DMS_LAYOUTS, Layout, adapter_weights, dms_config, tiny_model, tiny_tokens
from tests.tolerance import LOGITS_RELATIVE, QUALITY_RELATIVE, assert_logits_close
from tests.tools.test_quality import sparse_checkpoint, wikitext

FAMILIES = ("llama", "llama_group3", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_the_mask_is_the_definition(layout: Layout, family: str, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path, layout, family)
    model, rule = tiny_model(family), dms_config(layout)
    assert rule is not None
    adapter = adapter_weights(model) if layout == "adapter" else None
    ids = tiny_tokens(50)
    masked = MaskedModel(folder, rule, torch.device("cpu"))
    for evict, window_tokens in ((True, 7), (False, 10**6), (True, 7)):
        expected = oracle.run(model, ids, dms_config(layout, window_tokens), adapter)
        logits, flagged = masked.run(ids, evict=evict, last=30)
        assert_logits_close(logits, expected.logits[20:])
        assert torch.equal(flagged, expected.flagged & evict)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_the_runtime_gives_the_same_figures(layout: Layout, family: str, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path, layout, family)
    settings = Settings(context=65, prompt_tokens=50, sequences=2, prefill_points=0, device="cpu")
    subject = open_subject(folder, [wikitext()], settings)
    (runtime,), (masked,) = measure(subject), measure_masked(subject)
    differences = relative_differences(runtime, masked)
    assert set(differences) == {"live_share_outside_window", "perplexity_off", "perplexity_on", "kld"}
    for name, difference in differences.items():
        assert difference == pytest.approx(0.0, abs=LOGITS_RELATIVE), name
    assert masked["decode"]["greedy_match"] == runtime["decode"]["greedy_match"] < 1.0
    assert masked["decode"]["steps"] == runtime["decode"]["steps"] == 30
    spans = torch.tensor(runtime["live_share_outside_window_spans"])
    assert torch.allclose(torch.tensor(masked["live_share_outside_window_spans"]), spans, rtol=LOGITS_RELATIVE)


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_a_model_that_has_run_is_freed(layout: Layout, tmp_path: Path) -> None:
    rule = dms_config(layout)
    assert rule is not None
    model = MaskedModel(sparse_checkpoint(tmp_path, layout), rule, torch.device("cpu"))
    model.run(tiny_tokens(20), evict=True, last=1)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_nothing_of_the_model_is_left_when_the_engines_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(*given: Any) -> Any:
        model = load_reference(*given)
        alive.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    monkeypatch.setattr("fastdms.tools.quality.masked.load_reference", watched)
    settings = Settings(context=30, prompt_tokens=20, sequences=1, device="cpu")
    measure_masked(open_subject(sparse_checkpoint(tmp_path, "adapter"), [wikitext()], settings))
    assert alive
    assert not [ref for ref in alive if ref() is not None]


def test_relative_differences_of_zeros() -> None:
    def figures(kld: float) -> dict:
        decode = {"kld": kld, "perplexity_off": 2.0, "perplexity_on": 2.0}
        return {"decode": decode, "live_share_outside_window": 0.5}

    assert relative_differences(figures(0.0), figures(0.0))["kld"] == 0.0
    assert relative_differences(figures(0.1), figures(0.0))["kld"] is None
    assert relative_differences(figures(0.3), figures(0.2))["kld"] == pytest.approx(0.5)


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path, "shisa", intermediate_size=100)
    rule = dms_config("shisa")
    assert rule is not None
    with pytest.raises(ValueError, match="transformers can't load"):
        MaskedModel(folder, rule, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_the_runtime_gives_the_same_figures_on_a_gpu(layout: Layout, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path, layout, "qwen3")
    settings = Settings(context=90, prompt_tokens=50, sequences=2, kv_dtypes=("fp32", "fp8"), device="cuda")
    subject = open_subject(folder, [wikitext()], settings)
    (masked,) = measure_masked(subject)
    runtime, rounded = measure(subject)
    for name, difference in relative_differences(runtime, masked).items():
        assert difference == pytest.approx(0.0, abs=QUALITY_RELATIVE), name
    assert rounded["kv_dtype"] == "fp8"
    assert rounded["kv_bytes"] < runtime["kv_bytes"]
