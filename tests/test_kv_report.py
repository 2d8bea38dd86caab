"""What the reports say against what the cache's own tensors hold."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch

from fastdms import options
from fastdms.cache import CompactCache
from fastdms.kv_report import KVReport, RowUsage
from fastdms.options import resolve_cache, resolve_options
from fastdms.sampling_params import SamplingParams
from fastdms.tools.shapes import SHAPES
from tests import oracle
from tests.models import HEAD_DIM, dms_config, tiny_tokens
from tests.running import compiled, drain, engine_of, kv_bytes, many, submit

MASKED = dms_config("nvidia", 7)
PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SPANS = (2, 2)  # layers, KV heads
PROMPTS = [tiny_tokens(length, seed=length) for length in (70, 3, 150)]


def nbytes(cache: CompactCache) -> tuple[int, int]:
    """(pool, metadata), summed over every tensor that the cache owns."""
    tensors = {name: value for name, value in vars(cache).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 11
    pool = {"k_pages", "v_pages", "k_scales", "v_scales"}
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in tensors.items()}
    return sum(sizes[name] for name in pool), sum(size for name, size in sizes.items() if name not in pool)


def check_arithmetic(report: KVReport, cache: CompactCache) -> None:
    pool, metadata = nbytes(cache)
    assert (report.bytes_pool, report.bytes_metadata) == (pool, metadata)
    assert report.dense_bytes == report.tokens * 2 * SPANS[0] * SPANS[1] * HEAD_DIM * 2
    assert isinstance(report.live_tokens, numpy.ndarray)
    assert report.live_tokens.shape == SPANS
    if report.tokens:
        assert report.live_share == pytest.approx(report.live_tokens.sum() * report.rows / report.tokens / 4)
        assert report.ratio == report.dense_bytes / report.bytes_in_use
    for word in ("rows", "tokens", "live share", "pages in use", "dense bf16", "whole cache", f"{report.tokens:,}"):
        assert word in str(report)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp8"])
def test_before_during_and_after(weights, kv_dtype: str) -> None:
    with compiled(weights, dms=MASKED, kv_dtype=kv_dtype) as model:
        cache = engine_of(model).cache
        page = cache.config.page_size
        slot = {"fp32": HEAD_DIM * 4, "bf16": HEAD_DIM * 2, "fp8": HEAD_DIM + 2}[kv_dtype]

        before = model.kv_report()
        check_arithmetic(before, cache)
        assert (before.rows, before.tokens, before.bytes_in_use, before.ratio, before.live_share) == (0, 0, 0, 0.0, 0.0)
        assert not before.live_tokens.any()

        streams = [model.stream(prompt, PARAMS) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
        during = model.kv_report()
        check_arithmetic(during, cache)
        seen = [request.computed for request in engine_of(model).running]
        assert (during.rows, during.tokens) == (3, sum(seen))
        held = cache.config.num_pages - int(cache.num_free)
        assert held > 12
        assert during.bytes_in_use == held * 2 * page * slot
        assert during.live_tokens.tolist() == (cache.live_len.sum(1).double() / 3).tolist()
        kept = during.live_tokens.copy()
        for stream in streams:
            list(stream)
        assert (during.live_tokens == kept).all(), "a report changes after it was given"

        completions = many(model(PROMPTS, PARAMS))
        after = model.kv_report()
        check_arithmetic(after, cache)
        assert cache.pages_in_use() == 0
        assert after.rows == 3
        assert after.tokens == sum(done.kv.tokens for done in completions) == 70 + 3 + 150 + 3 * 9
        assert after.bytes_in_use == sum(done.kv.bytes_in_use for done in completions) > 0
        assert after.live_tokens.tolist() == numpy.mean([done.kv.live_tokens for done in completions], 0).tolist()
        for done in completions:
            check_arithmetic(done.kv, cache)
            assert (done.kv.rows, done.kv.tokens) == (1, done.prompt_tokens + 9)
            pages = numpy.ceil(done.kv.live_tokens / page).sum()
            assert done.kv.bytes_in_use == pages * 2 * page * slot


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_live_tokens_are_those_of_the_definition(weights, prefill: Any) -> None:
    assert MASKED is not None
    rule = replace(MASKED, prefill=prefill)
    with compiled(weights, dms=rule, prefill_chunk=33) as model:
        completions = many(model(PROMPTS, PARAMS))
    for prompt, done in zip(PROMPTS, completions, strict=True):
        expected = oracle.kept(weights, prompt + done.token_ids[:-1], rule, prompt_len=len(prompt)).sum(-1)
        assert done.kv.live_tokens.tolist() == expected.tolist()
    assert completions[2].kv.live_share < 0.8
    assert completions[2].kv.live_tokens.std() > 0


def test_which_call_is_reported(weights) -> None:
    """That of the last finished call: scores and streams count, refused and unread ones don't."""
    with compiled(weights, dms=MASKED) as model:
        model(PROMPTS[0], PARAMS)
        assert model.kv_report().tokens == 79
        model.score(PROMPTS[2], 100)
        assert model.kv_report().tokens == 150
        model.score_batch(PROMPTS, [1, 2, 3])
        assert (model.kv_report().rows, model.kv_report().tokens) == (3, 223)
        list(model.stream(PROMPTS[1], PARAMS))
        assert (model.kv_report().rows, model.kv_report().tokens) == (1, 12)
        model.stream(PROMPTS[0], PARAMS)
        with pytest.raises(ValueError, match="empty"):
            model([])
        assert model.kv_report().tokens == 12
        waiting = [submit(model, PROMPTS[0], PARAMS) for _ in range(5)]
        engine_of(model).step()
        assert model.kv_report().rows == 4, "a queued request holds nothing"
        drain(model, waiting)
        assert model.kv_report().tokens == 12


@pytest.mark.parametrize(("chunk", "computed"), [(2048, 0), (128, 0), (64, 64), (16, 64)])
def test_the_chunk_that_found_no_page_counts(weights, chunk: int, computed: int) -> None:
    """Seven pages, four spans, no eviction: none finds a second page for all of them, but some of them do."""
    prompt = tiny_tokens(200)
    with compiled(weights, dms="off", pages=7, prefill_chunk=chunk) as model:
        engine = engine_of(model)
        engine._live_share = 0.25
        with pytest.raises(ValueError, match="kv_memory is too small"):
            model(prompt, PARAMS)
        report = model.kv_report()
        seen = min(computed + chunk, len(prompt))
        assert (report.rows, report.tokens) == (1, seen)
        assert report.live_tokens.max() == seen
        assert report.live_tokens.min() == computed
        assert 0 < report.live_share < 1
        check_arithmetic(report, engine.cache)
        engine._read_live_share()
        assert engine._live_share == (1.0 if computed else 0.25), "a span that lacks a chunk evicts nothing"


def test_two_threads_ask_at_once_what_a_row_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finds it on the device, and has it on the host by the time that the other has looked where it is."""
    usage = RowUsage(num_tokens=9, live_tokens=torch.full(SPANS, 7, dtype=torch.int32))

    def look(usage: RowUsage) -> Any:
        found = vars(usage)["_live_tokens"]
        vars(usage)["_live_tokens"] = numpy.full(SPANS, 7)
        return found

    def put(usage: RowUsage, value: Any) -> None:
        vars(usage)["_live_tokens"] = value

    monkeypatch.setattr(RowUsage, "_live_tokens", property(look, put), raising=False)
    assert (usage.live_tokens == 7).all()


def test_a_call_that_is_broken_off_is_not_reported(weights, monkeypatch) -> None:
    """Its spans hold half a step, and nobody knows of how many tokens."""
    with compiled(weights, dms=MASKED) as model:
        model(PROMPTS[1], PARAMS)
        before = str(model.kv_report())
        layer = engine_of(model).runner.decoder.layers[1]
        monkeypatch.setattr(layer, "prefill", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model([PROMPTS[0], PROMPTS[2]], PARAMS)
        assert str(model.kv_report()) == before


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp8"])
def test_kv_memory_bounds_the_whole_cache(weights, kv_dtype: str) -> None:
    with compiled(weights, dms=MASKED, kv_dtype=kv_dtype) as model:
        page = engine_of(model).cache.config.page_bytes + 4
        assert engine_of(model).cache.config.num_pages == 4 * 4 * 4, "all rows in full, if there is memory for it"
        few, most = kv_bytes(model, 17), kv_bytes(model, 64)
    for asked, pages in ((few, 17), (few + page - 1, 17), (few + page, 18), (most, 64), (10 * most, 64)):
        with compiled(weights, dms=MASKED, kv_dtype=kv_dtype, kv_memory=asked) as model:
            report = model.kv_report()
            assert engine_of(model).cache.config.num_pages == pages
            assert report.bytes_pool + report.bytes_metadata <= asked
            assert report.bytes_pool + report.bytes_metadata == sum(nbytes(engine_of(model).cache))


def test_kv_memory_as_a_share(weights, monkeypatch) -> None:
    """Of the memory that is free once the weights are loaded; without one, half of it on the CPU."""
    with compiled(weights, dms=MASKED) as model:
        few = kv_bytes(model, 20)
    for share, free in ((0.25, 4 * few), (1.0, few), (None, 2 * few)):
        monkeypatch.setattr(options, "_free_memory", lambda device, free=free: free)
        with compiled(weights, dms=MASKED, kv_memory=share) as model:
            assert engine_of(model).cache.config.num_pages == 20
    monkeypatch.setattr(options, "_free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="kv_memory of 500 bytes is too small"):
        compiled(weights, dms=MASKED)


def test_no_memory_for_the_cache(weights, monkeypatch) -> None:
    def none(self: CompactCache, *args: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(CompactCache, "__init__", none)
    with pytest.raises(ValueError, match=r"no memory on cpu for a cache of 64 pages: can't allocate"):
        compiled(weights, dms=MASKED)


@pytest.mark.parametrize("chunk", [512, 2048, 8192, 10_000])
def test_a_share_leaves_room_for_a_dense_chunk_on_a_gpu(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """For what its activations take beyond those of one chunk: 6,144 tokens of 30,720 bf16 numbers, say."""
    config = SHAPES["llama-3.2-1b"]
    given: dict[str, Any] = {
        "device": "cpu", "dtype": "bf16", "kv_dtype": "bf16", "weights": "auto", "max_concurrency": 8, "mode": "eager",
        "max_context": 131_072, "kv_memory": 0.5, "prefill_chunk": chunk,
    }  # fmt: skip
    found = replace(resolve_options(config, **given), device=torch.device("cuda"))
    free, history = 40 * 10**9, 2 * 16 * 131_072 * 512 * 2
    monkeypatch.setattr(options, "_free_memory", lambda device: free)
    more = {512: 1536, 2048: 6144}.get(chunk, 0) * (2 * 8192 + 7 * 2048) * 2
    cache = resolve_cache(config, None, found)
    assert cache.num_pages == replace(cache, num_pages=0).pages_within(free // 2 - history - more)


@pytest.mark.parametrize("rule", ["dense", "off"])
def test_a_share_leaves_room_for_a_dense_prefill(weights, monkeypatch, rule: str) -> None:
    """One prompt of 256 tokens, whole, in fp32; at most half of what the cache would have had."""
    assert MASKED is not None
    dms: Any = "off" if rule == "off" else replace(MASKED, prefill="dense")
    given: dict[str, Any] = {"dms": dms, "prefill_chunk": 256}
    with compiled(weights, **given) as model:
        few = kv_bytes(model, 20)
    history = 256 * 2 * SPANS[0] * SPANS[1] * HEAD_DIM * 4
    assert history < few
    for share, free in ((None, 2 * (few + history)), (1.0, few + history)):
        monkeypatch.setattr(options, "_free_memory", lambda device, free=free: free)
        with compiled(weights, **given, kv_memory=share) as model:
            assert engine_of(model).cache.config.num_pages == 20
    if rule == "off":  # no prompt fills a chunk, so that none is prefilled densely
        with compiled(weights, dms=dms, prefill_chunk=257, kv_memory=few / (few + history)) as model:
            assert engine_of(model).cache.config.num_pages == 20
    monkeypatch.setattr(options, "_free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="kv_memory of 250 bytes is too small"):
        compiled(weights, **given)


def requested_bytes() -> int:
    """What all live tensors asked the allocator for; the blocks that it hands out may be larger by up to 1 MiB each."""
    gc.collect()
    torch.cuda.init()  # before it there are no statistics
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp8"])
def test_bytes_are_those_of_the_allocator(weights, kv_dtype: str) -> None:
    """Two pools that differ in size: reports and allocator agree on by how much, and a request keeps nothing."""
    held, told = [], []
    for pages in (2000, 2000, 4000):  # the first run also allocates what the libraries keep for good
        before = requested_bytes()
        with compiled(
            weights, dms=MASKED, kv_dtype=kv_dtype, device="cuda", mode="eager", max_context=1024, max_concurrency=256,
            pages=pages,
        ) as model:  # fmt: skip
            model(PROMPTS[0], PARAMS)
            report = model.kv_report()
            held.append(requested_bytes() - before)
            told.append(report.bytes_pool + report.bytes_metadata)
            check_arithmetic(report, engine_of(model).cache)
    assert told[2] - told[1] > 1_000_000
    assert held[2] - held[1] == told[2] - told[1]
