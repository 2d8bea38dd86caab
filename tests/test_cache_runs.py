"""Whole runs on caches that are nearly empty, full of garbage, at a page's edge, compressed, or quantised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdms.cache import PAGE_SIZE, CompactCache
from fastdms.config import DMSConfig
from fastdms.ops import quantise
from fastdms.sampling_params import SamplingParams
from tests import oracle
from tests.models import DMS_LAYOUTS, Layout, adapter_weights, dms_config, save_checkpoint, tiny_model, tiny_tokens
from tests.running import (
    Watch,
    check_idle,
    compiled,
    drain,
    engine_of,
    many,
    steered_checkpoint,
    steered_tokens,
    submit,
)
from tests.tolerance import assert_logits_close

STEERED = DMSConfig(window_tokens=7, source="adapter", shift=0)
MASKED = dms_config("nvidia", 7)
KV_DTYPES = ("fp32", "bf16", "fp8")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SPANS = 4  # of a row: 2 layers, 2 KV heads


def fill_free_pages(cache: CompactCache, value: float) -> None:
    """Slots that no span owns hold ``value``, scales too; in fp8 what comes nearest."""
    free = cache.free_pages[: int(cache.num_free)].long()
    for tensor in (cache.k_pages, cache.v_pages, cache.k_scales, cache.v_scales):
        if tensor.dtype == torch.float8_e4m3fn:
            byte = torch.tensor(value).clamp(-448, 448).to(tensor.dtype).view(torch.uint8)
            tensor.view(torch.uint8)[free] = byte
        elif tensor.numel():
            tensor[free] = value


@pytest.mark.parametrize("prefill", ["masked", "dense"])
@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_a_model_that_flags_every_token(monkeypatch, tmp_path: Path, layout: Layout, window: int, prefill: Any) -> None:
    """Prompts of 1, 2 and 3 tokens, then 20 steps: never a span without a token, and what the definition says."""
    model = tiny_model("qwen3")
    declared = dms_config(layout, window)
    assert declared is not None
    rule = replace(declared, alpha_offset=-1e6, prefill=prefill)
    lengths = (1, 2, 3)
    sequences = [tiny_tokens(length + 20, seed=length) for length in lengths]
    seen: list[int] = []
    with compiled(save_checkpoint(model, tmp_path, layout), dms=rule) as runtime:
        engine = engine_of(runtime)
        prefill_step, decode_step = engine.runner.prefill, engine.runner.decode

        def watched(step: Any, inputs: Any) -> Any:
            result = step(inputs)
            seen.extend(engine.cache.live_len[:, [row.row for row in inputs]].flatten().tolist())
            return result

        monkeypatch.setattr(engine.runner, "prefill", lambda inputs: watched(prefill_step, inputs))
        monkeypatch.setattr(engine.runner, "decode", lambda inputs: watched(decode_step, inputs))
        scored = runtime.score_batch(sequences, lengths)
        live = runtime.kv_report().live_tokens
    assert len(seen) >= 3 * 20 * SPANS
    assert min(seen) == 1
    assert max(seen) <= max(window + 2, 3)
    adapter = adapter_weights(model) if layout == "adapter" else None
    for ids, length, logits in zip(sequences, lengths, scored, strict=True):
        run = oracle.run(model, ids, rule, adapter, length)
        assert bool(run.flagged[..., :-1].all()), "the model does not flag every token"
        assert_logits_close(logits, run.logits[length - 1 :])
        assert live.tolist() == run.kept.sum(-1).tolist()


def at_page_edges(evicts: bool) -> tuple[list[list[int]], list[int]]:
    """Prompts that leave spans of k * PAGE - 1, k * PAGE and k * PAGE + 1 tokens, and four tokens more of each."""
    sequences, prompt_lens = [], []
    for live in (k * PAGE_SIZE + edge for k in (1, 2, 3) for edge in (-1, 0, 1)):
        flags = [False] * live
        if evicts:  # 40 more, flagged, all of which have left the window
            flags = [i % 2 == 0 and i < 80 for i in range(live + 40)]
        sequences.append(steered_tokens([*flags, *[False] * 4], seed=live))
        prompt_lens.append(len(flags))
    return sequences, prompt_lens


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("evicts", [False, True])
def test_page_edges_on_a_pool_just_used(tmp_path: Path, evicts: bool, kv_dtype: str) -> None:
    """Equal to a fresh pool bit for bit, and to the definition: what lies beyond a span's end is never read."""
    model, adapter, folder = steered_checkpoint(tmp_path)
    rule = STEERED if evicts else None
    sequences, prompt_lens = at_page_edges(evicts)
    options: dict[str, Any] = {"dms": rule or "off", "kv_dtype": kv_dtype, "max_concurrency": 9, "prefill_chunk": 100}
    with compiled(folder, **options) as fresh:
        expected = fresh.score_batch(sequences, prompt_lens)
    with compiled(folder, **options) as used:
        cache = engine_of(used).cache
        used([tiny_tokens(length, seed=length) for length in range(20, 220, 17)], GREEDY)
        check_idle(used)
        assert cache.free_pages.tolist() != sorted(cache.free_pages.tolist()), "the pages come in the same order again"
        fill_free_pages(cache, 1e4)
        actual = used.score_batch(sequences, prompt_lens)
        live = used.kv_report().live_tokens
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    ends = [PAGE_SIZE * k + edge + 4 for k in (1, 2, 3) for edge in (-1, 0, 1)]
    assert (live == sum(ends) / 9).all(), "the spans don't end where this test wants them"
    if kv_dtype == "fp32":
        for ids, length, logits in zip(sequences, prompt_lens, actual, strict=True):
            run = oracle.run(model, ids, rule, adapter if evicts else None)
            assert int(run.kept[0, 0].sum()) == ends.pop(0)
            assert_logits_close(logits, run.logits[length - 1 :])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rule", ["masked", "dense", "off"])
def test_pools_full_of_nan(rule: str, kv_dtype: str) -> None:
    """Before the first request and again after each release: the same as in a pool of zeros."""
    assert MASKED is not None
    rules: dict[str, Any] = {"masked": MASKED, "dense": replace(MASKED, prefill="dense"), "off": "off"}
    model = tiny_model("qwen3")
    prompts = [tiny_tokens(length, seed=length) for length in (1, PAGE_SIZE - 1, 100, PAGE_SIZE, 2, 130, 9)]
    sequences = [prompt + tiny_tokens(3, seed=i) for i, prompt in enumerate(prompts[:3])]
    results = []
    for value in (0.0, torch.nan):
        with compiled(model, dms=rules[rule], kv_dtype=kv_dtype, prefill_chunk=60) as runtime:
            engine = engine_of(runtime)
            release = engine.runner.release
            releases: list[list[int]] = []

            def soiling(rows: list[int], engine=engine, release=release, releases=releases, value=value) -> None:
                release(rows)
                releases.append(rows)
                fill_free_pages(engine.cache, value)

            engine.runner.release = soiling  # type: ignore[method-assign]
            fill_free_pages(engine.cache, value)
            # Three rows of four: one span of every layer and head stays empty.
            logits = runtime.score_batch(sequences, [1, PAGE_SIZE - 1, 100])
            completions = many(runtime(prompts, replace(GREEDY, logprobs=5)))
            logits += runtime.score_batch(sequences, [1, PAGE_SIZE - 9, 91])  # steps past a page's end and the window
            assert len(releases) == 2 + len(prompts)
            assert engine.cache.k_pages.float().isnan().any() == (value != 0.0)
        results.append((logits, [(done.token_ids, done.logprobs) for done in completions]))
    (zero_logits, zero_done), (nan_logits, nan_done) = results
    assert all(torch.equal(one, other) for one, other in zip(zero_logits, nan_logits, strict=True))
    assert zero_done == nan_done
    assert all(logits.isfinite().all() for logits in nan_logits)


CONTEXT = 4096


def seven_of_eight(num_tokens: int) -> list[bool]:
    return [i % 8 != 0 for i in range(num_tokens)]


def test_compression_frees_pages(tmp_path: Path) -> None:
    """A long prompt with 7/8 of its tokens flagged beside one with none: pages follow the live tokens, up and down."""
    _, _, folder = steered_checkpoint(tmp_path, max_position_embeddings=CONTEXT + 8)
    flags = [[False] * CONTEXT, seven_of_eight(CONTEXT)]
    with compiled(folder, dms=STEERED, max_context=CONTEXT + 8, max_concurrency=2, prefill_chunk=1024) as model:
        engine, cache = engine_of(model), engine_of(model).cache
        assert cache.config.num_spans == SPANS
        requests = [submit(model, steered_tokens(some), replace(GREEDY, max_tokens=8)) for some in flags]
        while not all(request.output_ids for request in requests):
            engine.step()
        held = []
        for request, some in zip(requests, flags, strict=True):
            assert request.row is not None
            tokens = request.computed  # of which only prompt tokens can have left the window
            live = 8 + sum(not flag for flag in some[: tokens - 8])
            assert cache.live_len[:, request.row].unique().tolist() == [live]
            held.append(-(-live // PAGE_SIZE) * SPANS)
        assert held[0] > 7 * held[1]
        assert cache.pages_in_use() == sum(held)
        both = model.kv_report()
        assert both.bytes_in_use == sum(held) * cache.k_pages[0].nbytes * 2
        engine.cancel(requests[0])
        assert cache.pages_in_use() == held[1]
        one = model.kv_report()
        assert one.bytes_in_use == held[1] * cache.k_pages[0].nbytes * 2
        assert one.ratio > 3 * both.ratio  # 8 against less than 2, in fp32 pages
        engine.cancel(requests[1])
        check_idle(model)


def test_more_compressed_prompts_fit_at_once(tmp_path: Path) -> None:
    """Into the same kv_memory, once the engine has seen how much such prompts keep; and none of them starves."""
    _, _, folder = steered_checkpoint(tmp_path)
    together = []
    for flags in ([False] * 900, seven_of_eight(900)):
        with compiled(folder, dms=STEERED, max_context=1024, max_concurrency=12, pages=100) as model:
            watch = Watch(model)
            drain(model, [submit(model, steered_tokens(flags, seed=i), GREEDY) for i in range(12)])
            check_idle(model)
        assert watch.counts["starved"] == 0
        together.append(watch.most_rows)
    assert together[0] == 1  # 100 pages, of which each takes 60
    assert together[1] >= 6  # of which each takes 8 to 12; 4 if the engine had not learned that


@pytest.mark.gpu
def test_prefill_memory_does_not_grow_with_the_prompt(tmp_path: Path) -> None:
    """At its peak, beside the cache, a prefill holds one chunk's activations, however long the prompt."""
    _, _, folder = steered_checkpoint(tmp_path, max_position_embeddings=CONTEXT + 8)
    with compiled(
        folder, dms=STEERED, device="cuda", mode="eager", kv_dtype="bf16", max_context=CONTEXT + 8, max_concurrency=1,
        prefill_chunk=256,
    ) as model:  # fmt: skip
        peaks = []
        for length in (512, 512, CONTEXT):
            prompt = steered_tokens(seven_of_eight(length))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(prompt, replace(GREEDY, max_tokens=1))
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= peaks[1] + 2**20


IDS = tiny_tokens(100, seed=5)
OUTLIERS = (1, 30, 440, 464, 600)


def score_with_outlier(outlier: float, kv_dtype: str, device: str = "cpu") -> torch.Tensor:
    """Logits of a Qwen2 model with this key bias in one channel of every head."""
    model: Any = tiny_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(-1, 16)[:, 8] = outlier
    with compiled(model, kv_dtype=kv_dtype, device=device, dtype="fp32", mode="eager", prefill_chunk=40) as runtime:
        return runtime.score(IDS, 70)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean KL divergence in nats of the next token's distribution."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_fp8_keys_with_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error grows smoothly, through fp8's largest number too, and is never more than e4m3's 4 bits have to cost.

    That bound is measured: the same run with fp32 KV whose every number is rounded to 4 significant bits, without any
    limit of range. A scale per token lets the outlier, whose error weighs most, fall near fp8's largest number, which
    is exact, so the real error stays below it. A bias of 464 instead of 440 makes scores 5 % larger, their error too,
    and a divergence of second order in it 11 %: more than half as much again would be a cliff.
    """
    exact = {outlier: score_with_outlier(outlier, "fp32") for outlier in OUTLIERS}
    assert all(logits.isfinite().all() for logits in exact.values())
    fp8 = {outlier: divergence(exact[outlier], score_with_outlier(outlier, "fp8")) for outlier in OUTLIERS}
    bf16 = {outlier: divergence(exact[outlier], score_with_outlier(outlier, "bf16")) for outlier in (1, 30, 600)}

    def four_bits(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 16).round() / 16, exponent), None

    monkeypatch.setattr(quantise, "quantise", four_bits)
    unlimited = {outlier: divergence(exact[outlier], score_with_outlier(outlier, "fp32")) for outlier in (1, 30, 600)}
    assert unlimited[1] > 1e-3, "the rounding did not reach the cache"
    for outlier in (1, 30, 600):
        assert 0 < bf16[outlier] < fp8[outlier] <= unlimited[outlier]
    assert fp8[1] < fp8[30] < min(fp8[440], fp8[464], fp8[600])
    assert 1 / 1.5 < fp8[464] / fp8[440] < 1.5
    assert fp8[1] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_outliers_on_a_gpu_as_on_the_cpu(kv_dtype: str) -> None:
    for outlier in (1, 600):
        expected, actual = (score_with_outlier(outlier, kv_dtype, device) for device in ("cpu", "cuda"))
        assert actual.isfinite().all()
        if kv_dtype == "fp32" and outlier == 1:
            assert_logits_close(actual, expected)
        # Elsewhere a value on the border between two stored numbers may fall on either side.
        exact = score_with_outlier(outlier, "fp32")
        assert divergence(exact, actual) <= 2 * divergence(exact, expected) + 1e-6


def test_bf16_kv_is_close_to_fp32_kv() -> None:
    model = tiny_model("qwen3")
    with compiled(model, dms="off") as exact, compiled(model, dms="off", kv_dtype="bf16") as rounded:
        assert engine_of(rounded).cache.k_pages.dtype == torch.bfloat16
        one, other = exact.score(IDS, 50), rounded.score(IDS, 50)
    assert not torch.equal(one, other)
    assert divergence(one, other) < 1e-3
