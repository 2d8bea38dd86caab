"""Captured graphs on a GPU: padding touches nothing, replay gives what eager gives, and closing gives memory back."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import fastdms
from fastdms.cache import CompactCache
from fastdms.graphs import GraphCache
from fastdms.ops import MOST_ROWS
from fastdms.request import Request
from fastdms.runner import ModelRunner, _state, inference
from fastdms.sampling_params import SamplingParams
from tests.graphs.generated import allocations, inputs_of_shape, uses
from tests.models import VOCAB_SIZE, dms_config, tiny_model, tiny_tokens
from tests.poison import poison
from tests.running import check_idle, check_pool, compiled, drain, engine_of, many, one, submit
from tests.tolerance import assert_logits_close

pytestmark = pytest.mark.gpu

MASKED = dms_config("nvidia", 7)
STEPS = 200
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.8, seed=7, frequency_penalty=0.1, repetition_penalty=1.2)
OPTIONS: dict[str, Any] = {
    "device": "cuda", "dtype": "fp32", "kv_dtype": "fp32", "dms": MASKED, "max_concurrency": 8, "max_context": 512,
}  # fmt: skip
PROMPTS = [tiny_tokens(length, seed=length) for length in (1, 63, 64, 65, 7, 130, 90)]


def graphed(**given: Any) -> fastdms.CompiledModel:
    return compiled(tiny_model("qwen3"), **OPTIONS | {"mode": "graphs"} | given)


def owned_slots(cache: CompactCache) -> torch.Tensor:
    """[P, S] bool: slots that hold a live token of some span."""
    owned = torch.zeros(cache.k_pages.shape[:2], dtype=torch.bool)
    page = cache.config.page_size
    for table, live in zip(cache.page_table.flatten(0, 2).tolist(), cache.live_len.flatten().tolist(), strict=True):
        for first in range(0, live, page):
            owned[table[first // page], : min(page, live - first)] = True
    return owned.to(cache.k_pages.device)


@contextmanager
def unwaited() -> Iterator[None]:
    """Where the host may wait for nothing on the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Tokens of each prompt, run by itself in bucket 1 of a model that captures nothing; seeded for every other."""
    with graphed(mode="eager", max_concurrency=1) as model:
        return [one(model(prompt, SEEDED if n % 2 else GREEDY)).token_ids for n, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_padding_touches_no_state(alone: list[list[int]], rows: int) -> None:
    """Only slots of real rows ever change, their last pages above all; the free count is right at each step."""
    with graphed() as model:
        engine, cache = engine_of(model), engine_of(model).cache
        for tensor in (cache.k_pages, cache.v_pages):
            poison(tensor)
        assert model.graphs.stats()["buckets"] == (1, 2, 4, 8)
        requests = [submit(model, PROMPTS[n], SEEDED if n % 2 else GREEDY) for n in range(rows)]
        engine.step()
        assert len(engine.running) == rows
        padded = 1
        while not any(request.finished for request in requests):
            before = (cache.k_pages.clone(), cache.v_pages.clone())
            used = engine.running
            engine.step()
            padded += 1
            if not all(request in engine.running for request in used):
                break  # a row that has left owns nothing any more
            check_pool(cache)
            owned = owned_slots(cache)
            for old, new in zip(before, (cache.k_pages, cache.v_pages), strict=True):
                changed = (old.view(torch.int32) != new.view(torch.int32)).any(-1)
                assert not (changed & ~owned).any(), "a slot of no real row was written"
                assert int(changed.sum()) <= rows * 4, "a row writes one slot in each of its 4 spans"
                assert changed.any()
        assert padded >= STEPS - 2
        while not all(request.finished for request in requests):
            engine.step()
        check_idle(model)
        stats = model.graphs.stats()
    assert [request.output_ids for request in requests] == alone[:rows]
    bucket = 4 if rows == 3 else 8
    assert stats["runs"][bucket] >= STEPS - 2
    assert stats["padded_rows"][bucket] == stats["runs"][bucket] * (bucket - rows)


def test_batches_that_change_size_give_the_tokens_of_lone_runs(alone: list[list[int]]) -> None:
    """Through every bucket and back, as rows join and leave; nothing is captured or compiled on the way."""
    with graphed(max_concurrency=6, prefill_chunk=130) as model:
        stats = model.graphs.stats()
        assert stats["captures"] == stats["compiles"] == len(stats["buckets"]) == 4
        requests = []
        for n, prompt in enumerate(PROMPTS):
            requests.append(submit(model, prompt, replace(SEEDED if n % 2 else GREEDY, max_tokens=20 + 25 * n)))
            for _ in range(5):
                engine_of(model).step()
        while not all(request.finished for request in requests):
            engine_of(model).step()
        check_idle(model)
        after = model.graphs.stats()
    assert (after["captures"], after["compiles"]) == (4, 4)
    assert list(after["chunks"]["runs"]) == [65, 130]
    assert all(after["chunks"]["runs"].values())
    assert all(runs > 0 for runs in after["runs"].values())
    assert [request.output_ids for request in requests] == [ids[: 20 + 25 * n] for n, ids in enumerate(alone)]


def test_ten_thousand_steps_compile_and_capture_nothing() -> None:
    """Rows join and leave all the while, with prompts of every length."""
    dice = random.Random(0)
    with graphed(max_concurrency=6, prefill_chunk=128) as model:
        engine = engine_of(model)
        before, traced = model.graphs.stats(), counters["stats"]["unique_graphs"]
        requests: list[Request] = []
        while sum(model.graphs.stats()["runs"].values()) < 10_000:
            if len(engine.running) < dice.randint(1, 6):
                prompt = tiny_tokens(dice.randint(1, 200), seed=len(requests))
                requests.append(submit(model, prompt, replace(SEEDED, max_tokens=dice.randint(1, 250))))
            for _ in range(dice.randint(1, 20)):
                engine.step()
        drain(model, requests)
        check_idle(model)
        after = model.graphs.stats()
        assert counters["stats"]["unique_graphs"] == traced
    assert len(requests) > 100
    assert all(request.finished for request in requests)
    for name in ("compiles", "captures", "recompiles", "misses", "evictions"):
        assert after[name] == before[name], name
    assert all(after["chunks"]["runs"].values())


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("mode", ["compile", "graphs"])
def test_modes_agree(mode: str, kv_dtype: str) -> None:
    ids = [tiny_tokens(100, seed=1), tiny_tokens(70, seed=2), tiny_tokens(150, seed=3)]
    with graphed(mode="eager", kv_dtype=kv_dtype) as eager, graphed(mode=mode, kv_dtype=kv_dtype) as other:
        expected, actual = (model.score_batch(ids, [60, 9, 129]) for model in (eager, other))
        assert engine_of(other).cache.k_pages.dtype == engine_of(eager).cache.k_pages.dtype
    for one_logits, logits in zip(actual, expected, strict=True):
        # A value on the border between two stored numbers may fall on either side; most rows have none.
        error = (one_logits - logits).abs().amax(-1) / logits.abs().amax(-1)
        assert error.isfinite().all()
        assert (error < 1e-4).float().mean() > 0.5
        assert_logits_close(one_logits, logits, relative=0.05)


def test_a_step_that_goes_on_neither_waits_nor_allocates(alone: list[list[int]]) -> None:
    with graphed(max_concurrency=2) as model:
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=60)) for n in (0, 2)]
        for _ in range(10):
            engine_of(model).step()
        lengths = [len(request.output_ids) for request in requests]
        before = _allocations()
        with unwaited():
            for _ in range(30):
                engine_of(model).step()
        assert _allocations() == before
        assert [len(request.output_ids) for request in requests] == [length + 30 for length in lengths]
        drain(model, requests)
        assert [request.output_ids for request in requests] == [alone[n][:60] for n in (0, 2)]


def test_rows_that_end_by_length_make_no_step_wait() -> None:
    """Eight rows become five, which need the same graph."""
    with graphed(mode="eager", max_concurrency=1) as model:
        expected = [one(model([5 + n], GREEDY)).token_ids for n in range(8)]
    with graphed() as model:
        lengths = [20, 21, 30, *[60] * 5]
        requests = [submit(model, [5 + n], replace(GREEDY, max_tokens=length)) for n, length in enumerate(lengths)]
        for _ in range(10):
            engine_of(model).step()
        with unwaited():
            for _ in range(30):
                engine_of(model).step()
        assert [request.finished for request in requests] == [True] * 3 + [False] * 5
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [
        ids[:length] for ids, length in zip(expected, lengths, strict=True)
    ]
    assert all(
        request.usage is not None and request.usage.num_tokens == n
        for request, n in zip(requests, lengths, strict=True)
    )


@pytest.mark.parametrize("rule", [MASKED, "off"], ids=["masked", "off"])
@pytest.mark.parametrize("call", ["prefill", "sample", "decode"])
def test_chunks_and_what_stands_behind_them_start_without_a_wait(monkeypatch, call: str, rule: Any) -> None:
    """By graphs, or densely: a step may be under way that a chunk stands behind, and the next step behind that."""
    with graphed(dms=rule, prefill_chunk=64) as model:
        expected = many(model(PROMPTS, replace(GREEDY, max_tokens=5)))
        runner, called = engine_of(model).runner, []
        original = getattr(runner, call)

        def started(*args: Any) -> Any:
            called.append(args)
            with unwaited():
                return original(*args)

        monkeypatch.setattr(runner, call, started)
        done = many(model(PROMPTS, replace(GREEDY, max_tokens=5)))
        assert [answer.token_ids for answer in done] == [answer.token_ids for answer in expected]
        assert called
        if call == "decode":
            assert any(len(args) > 1 and args[1] is not None for args in called), "fed with tokens that nobody has read"


def _allocations() -> tuple[int, int]:
    """So far, of device memory and of pinned memory."""
    pinned = torch.cuda.host_memory_stats()["active_requests.allocated"]
    return torch.cuda.memory_stats()["allocation.all.allocated"], pinned


def test_the_generated_code_copies_no_cache() -> None:
    made: list[fastdms.CompiledModel] = []
    _, code = run_and_get_code(lambda: made.append(graphed(max_context=1024)))
    with made[0] as model:
        cache = engine_of(model).cache
        assert len(code) == 4 * 3  # each bucket's first, inner and last piece
        with_pools = 0
        for source in code:
            pools = inputs_of_shape(source, tuple(cache.k_pages.shape))
            with_pools += len(pools) > 0
            assert len(pools) in (0, 2)
            assert all(uses(source, name) == {"decode_append", "decode_attention"} for name in pools)
            assert max(allocations(source), default=0) < cache.k_pages.numel() // 8
        assert with_pools == 4 * 2  # nothing attends in the last


def test_residuals_are_added_to_no_copy() -> None:
    made: list[fastdms.CompiledModel] = []
    options = {"dtype": "bf16", "kv_dtype": "bf16", "max_context": 64, "max_concurrency": MOST_ROWS + 1}
    _, code = run_and_get_code(lambda: made.append(graphed(**options)))
    with made[0]:
        assert any("extern_kernels.mm" in source for source in code)
        assert not any("extern_kernels.addmm" in source for source in code)


def test_closing_gives_the_memory_back() -> None:
    """Allocated and reserved, five times: graphs, their pool, weights and cache."""
    seen = []
    for _ in range(6):
        model = graphed(max_concurrency=2)
        assert len(many(model(PROMPTS[:3], replace(GREEDY, max_tokens=5)))) == 3
        model.close()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert all(after == seen[1] for after in seen[1:]), seen
    assert seen[0][0] <= seen[1][0] + 2**20


def test_peak_memory_is_that_of_eager() -> None:
    peaks = {}
    for mode in ("eager", "compile"):
        for _ in range(2):
            with graphed(mode=mode, max_context=1024, max_concurrency=4) as model:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                model(PROMPTS[:4], replace(GREEDY, max_tokens=20))
                peaks[mode] = torch.cuda.max_memory_allocated() - before
                pool = engine_of(model).cache.k_pages.nbytes
            gc.collect()
    assert peaks["compile"] <= peaks["eager"] + pool // 4


def test_graphs_that_come_and_go_change_no_token(alone: list[list[int]]) -> None:
    """With room for one at a time; and no weight and no part of the cache lies elsewhere than at capture."""
    with graphed(mode="eager", max_concurrency=4) as model:
        runner = engine_of(model).runner
        step = runner.graphs._step
        assert step is not None
        runner.graphs = GraphCache(
            step, mode="graphs", buckets=(1, 2, 4), device=runner.device, memory_limit=0, debug=True,
            state=lambda: _state(runner.decoder, runner.cache),
        )  # fmt: skip
        with inference(runner.device):
            runner.graphs.warm_up()
        requests = [
            submit(model, PROMPTS[n], replace(SEEDED if n % 2 else GREEDY, max_tokens=10 + 9 * n)) for n in range(4)
        ]
        for _ in range(60):
            engine_of(model).step()
        stats = model.graphs.stats()
        assert all(request.finished for request in requests)
        assert len(stats["bytes"]) == 1
        assert stats["evictions"] == stats["captures"] - 1 >= 4
        assert stats["recompiles"] == 0
    assert [request.output_ids for request in requests] == [ids[: 10 + 9 * n] for n, ids in enumerate(alone[:4])]


def test_a_runner_that_is_debugged_notices_what_moved(alone: list[list[int]]) -> None:
    with graphed(mode="eager", max_concurrency=2) as model:
        engine = engine_of(model)
        engine.runner = ModelRunner(engine.runner.decoder, engine.cache, mode="graphs", max_concurrency=2, debug=True)
        assert one(model(PROMPTS[0], GREEDY)).token_ids == alone[0]
        engine.cache.live_len = engine.cache.live_len.clone()
        with pytest.raises(AssertionError, match=r"these moved: live_len$"):
            model(PROMPTS[0], GREEDY)


def test_a_graph_keeps_no_less_than_its_logits() -> None:
    with graphed(max_concurrency=4) as model:
        stats = model.graphs.stats()
        assert all(stats["bytes"][bucket] >= bucket * VOCAB_SIZE * 4 for bucket in (1, 2, 4))
        assert stats["pool_bytes"] >= sum(stats["bytes"].values())
