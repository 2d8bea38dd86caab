"""Logits of the whole runtime against a transformers model run in fp32 with the DMS mask written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fastdms
from fastdms.ops import MOST_ROWS
from tests import oracle
from tests.models import (
    DMS_LAYOUTS,
    FAMILIES,
    LAYOUTS,
    adapter_weights,
    dms_config,
    save_checkpoint,
    tiny_model,
    tiny_tokens,
)
from tests.tolerance import assert_logits_close

WINDOWS = (0, 1, 7, 64)
CHUNKS = (1, 5, 64, 1024)
# (tokens, of which prompt): ragged, one of them longer than every window and chunk
LENGTHS = ((82, 72), (34, 24), (13, 3), (4, 4))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

SEQUENCES = [tiny_tokens(length, seed=length) for length, _ in LENGTHS]
PROMPT_LENS = [prompt for _, prompt in LENGTHS]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: tiny_model(family) for family in FAMILIES}


def expected_run(model: PreTrainedModel, dms: fastdms.DMSConfig | None, layout: str, index: int) -> oracle.OracleRun:
    adapter = adapter_weights(model) if layout == "adapter" else None
    return oracle.run(model, SEQUENCES[index], dms, adapter, PROMPT_LENS[index])


def expected_runs(model: PreTrainedModel, dms: fastdms.DMSConfig | None, layout: str) -> list[oracle.OracleRun]:
    return [expected_run(model, dms, layout, index) for index in range(len(SEQUENCES))]


def check_scores(folder: Path, runs: list[oracle.OracleRun], device: str, chunk: int, **options: object) -> None:
    """Every logit from the last prompt token on, and what each span kept, exactly."""
    with fastdms.compile(
        folder, device=device, dtype="fp32", kv_dtype="fp32", max_concurrency=4, max_context=128, prefill_chunk=chunk,
        **({"mode": "eager"} | options),  # type: ignore[arg-type]
    ) as model:  # fmt: skip
        scored = model.score_batch(SEQUENCES, PROMPT_LENS)
        report = model.kv_report()
    for logits, run, prompt_len in zip(scored, runs, PROMPT_LENS, strict=True):
        assert_logits_close(logits, run.logits[prompt_len - 1 :])
    kept = torch.stack([run.kept.sum(-1) for run in runs]).double().mean(0)
    assert report.live_tokens.tolist() == kept.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_logits(
    models: dict[str, PreTrainedModel], tmp_path: Path, family: str, layout: str, window: int, device: str
) -> None:
    folder = save_checkpoint(models[family], tmp_path, layout, window_tokens=window)  # type: ignore[arg-type]
    runs = expected_runs(models[family], dms_config(layout, window), layout)  # type: ignore[arg-type]
    assert window == 64 or not all(bool(run.kept.all()) for run in runs), "nothing was evicted: the case tests nothing"
    for chunk in CHUNKS:
        check_scores(folder, runs, device, chunk)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_dense_prefill(
    models: dict[str, PreTrainedModel], tmp_path: Path, layout: str, window: int, device: str
) -> None:
    folder = save_checkpoint(models["qwen3"], tmp_path, layout, window_tokens=window)  # type: ignore[arg-type]
    declared = dms_config(layout, window)  # type: ignore[arg-type]
    assert declared is not None
    dense = replace(declared, prefill="dense")
    runs = expected_runs(models["qwen3"], dense, layout)
    masked = expected_run(models["qwen3"], declared, layout, 0)
    assert (runs[0].logits - masked.logits).abs().max() > 0.1, "dense and masked prefill agree: the case tests nothing"
    for chunk in CHUNKS:
        check_scores(folder, runs, device, chunk, dms=dense)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_off_is_the_plain_model(
    models: dict[str, PreTrainedModel], tmp_path: Path, family: str, device: str
) -> None:
    """And off for a checkpoint with DMS it is the trained model that never evicts: its borrowed channel stays zero."""
    plain = expected_runs(models[family], None, "none")
    check_scores(save_checkpoint(models[family], tmp_path / "plain"), plain, device, 5)
    check_scores(save_checkpoint(models[family], tmp_path / "adapter", "adapter"), plain, device, 64, dms="off")
    for layout in ("shisa", "nvidia"):
        zeroed = expected_runs(models[family], dms_config(layout, window_tokens=10_000), layout)
        assert (zeroed[0].logits - plain[0].logits).abs().max() > 0.1
        check_scores(save_checkpoint(models[family], tmp_path / layout, layout), zeroed, device, 64, dms="off")


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_differ_on_the_same_weights(models: dict[str, PreTrainedModel], tmp_path: Path, family: str) -> None:
    """A wrong shift or zeroing can't pass for a right one: each pair of rules gives other logits."""
    folder = save_checkpoint(models[family], tmp_path)
    rules = [
        fastdms.DMSConfig(window_tokens=7, shift=shift, zero_borrowed=zero)
        for shift in (0, 1)
        for zero in ("none", "pre_rope", "pre_and_post_rope")
    ]
    scores = []
    for rule in rules:
        with fastdms.compile(folder, dms=rule, device="cpu", max_context=128) as model:
            scores.append(model.score(SEQUENCES[0], PROMPT_LENS[0]))
    for i, one in enumerate(scores):
        for other in scores[:i]:
            assert (one - other).abs().amax() > 1e-2 * one.abs().amax()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_mode(models: dict[str, PreTrainedModel], tmp_path: Path, family: str) -> None:
    folder = save_checkpoint(models[family], tmp_path, "nvidia", window_tokens=7)
    runs = expected_runs(models[family], dms_config("nvidia", 7), "nvidia")
    check_scores(folder, runs, "cuda", 64, mode="graphs")


def through_fp8(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """The same model with its linear layers rounded to e4m3, a scale for each row; a tied head is one of its own."""
    rounded = tiny_model(family, tie_word_embeddings=False)
    rounded.load_state_dict(model.state_dict())
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.data.abs().amax(1, keepdim=True) / 448
            layer.weight.data = (layer.weight.data / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights(tmp_path: Path, family: str, layout: str, tied: bool, device: str) -> None:
    """Prefill, which dequantises, and decode, which doesn't; the table that tokens are looked up in is not rounded."""
    exact = tiny_model(family, tie_word_embeddings=tied)
    rounded = through_fp8(exact, family)
    runs = expected_runs(rounded, dms_config(layout), layout)  # type: ignore[arg-type]
    unrounded = expected_run(exact, dms_config(layout), layout, 0)  # type: ignore[arg-type]
    assert (runs[0].logits - unrounded.logits).abs().max() > 0.1, "fp8 changes nothing: the case tests nothing"
    folder = save_checkpoint(exact, tmp_path, layout)  # type: ignore[arg-type]
    check_scores(folder, runs, device, 5, weights="fp8")


@pytest.mark.parametrize(
    ("device", "mode"),
    [("cpu", "eager"), *(pytest.param("cuda", m, marks=pytest.mark.gpu) for m in ("eager", "graphs"))],
)
@pytest.mark.parametrize("tied", [False, True])
def test_fp8_weights_in_batches_of_any_size(tmp_path: Path, tied: bool, device: str, mode: str) -> None:
    """Also of more rows than their kernel takes."""
    exact = tiny_model("llama_bias", tie_word_embeddings=tied)
    rounded = through_fp8(exact, "llama_bias")
    sequences = [tiny_tokens(14, seed=seed) for seed in range(MOST_ROWS + 1)]
    with fastdms.compile(
        save_checkpoint(exact, tmp_path, "nvidia"), device=device, dtype="fp32", kv_dtype="fp32", weights="fp8",
        max_concurrency=len(sequences), max_context=32, mode=mode,
    ) as model:  # fmt: skip
        for count in (1, MOST_ROWS, MOST_ROWS + 1):
            scored = model.score_batch(sequences[:count], [5] * count)
            for logits, ids in zip(scored, sequences, strict=False):
                assert_logits_close(logits, oracle.dms_logits(rounded, ids, dms_config("nvidia"))[4:])
