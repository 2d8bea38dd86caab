"""The graph cache: which entry runs, what the compiler makes of a step, and that nothing compiles or stays later."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import fastdms
from fastdms.cache import CacheConfig, CompactCache
from fastdms.graphs import GraphCache, RowInput, StepBuffers
from fastdms.ops import decode_append, decode_attention
from fastdms.sampling_params import SamplingParams
from tests.graphs.generated import allocations, inputs_of_shape, uses
from tests.graphs.toys import FakeRecorder, rows
from tests.models import HEAD_DIM, VOCAB_SIZE, dms_config, tiny_model, tiny_tokens
from tests.running import compiled, engine_of, many, one
from tests.tolerance import assert_logits_close

CPU = torch.device("cpu")
MASKED = dms_config("nvidia", 7)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PAGES = 8192  # 64 MiB: far more than any other buffer of a step
CACHE = CacheConfig(
    num_layers=2, num_rows=3, num_kv_heads=2, head_dim=HEAD_DIM, window_tokens=7, max_context=128,
    kv_dtype=torch.float32, num_pages=500,
)  # fmt: skip
OPTIONS: dict[str, Any] = {"dms": MASKED, "max_concurrency": 2, "max_context": 2**17, "pages": PAGES}


def weights() -> Any:
    return tiny_model("qwen3", max_position_embeddings=2**17)


class Toy:
    """A step that says which bucket it ran for."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, inputs: StepBuffers) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(inputs.tokens.shape[0])
        assert inputs.positions.shape == inputs.tokens.shape
        return inputs.tokens + inputs.positions, inputs.seeds[:, None].float()


def test_every_run_sees_its_own_inputs() -> None:
    """The buckets share their buffers, and only what differs is written to them."""
    graphs = GraphCache(lambda inputs: (inputs.tokens.clone(), inputs.positions[:, None].clone()), mode="eager",
                        buckets=(1, 2, 4), device=torch.device("cpu"))  # fmt: skip
    graphs.warm_up()
    for count, token in ((1, 5), (1, 5), (2, 5), (1, 5), (4, 5), (4, 6), (3, 6), (4, 6), (2, 6), (2, 6)):
        tokens, positions = graphs.run(rows(count, token=token))
        assert tokens.tolist() == [token + n for n in range(count)]
        assert positions.flatten().tolist() == list(range(count))


def test_a_run_goes_on_from_what_the_last_one_left() -> None:
    """And what the host then says of rows that it knows counts again."""

    def step(inputs: StepBuffers) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = inputs.tokens + 10, inputs.positions[:, None].clone()
        inputs.tokens.add_(10)
        inputs.positions.add_(inputs.positions >= 0)
        return outputs

    for mode in ("eager", "graphs"):
        graphs = GraphCache(step, mode=mode, buckets=(1, 2, 4), device=CPU, backend="aot_eager",
                            recorder=FakeRecorder() if mode == "graphs" else None)  # fmt: skip
        with pytest.raises(ValueError, match="no run has left anything"):
            graphs.run_on()
        graphs.warm_up()
        for count, token in ((3, 5), (3, 5), (1, 7), (4, 2), (3, 5)):
            graphs.run(rows(count, token=token))
            for more in (1, 2):
                tokens, positions = graphs.run_on()
                assert tokens.tolist() == [token + n + 10 * (more + 1) for n in range(count)]
                assert positions.flatten().tolist() == [n + more for n in range(count)]
        assert graphs.stats()["padded_rows"] == {1: 0, 2: 0, 4: 9}


def test_a_step_runs_in_the_smallest_bucket() -> None:
    step = Toy()
    graphs = GraphCache(step, mode="eager", buckets=(1, 2, 4, 6), device=CPU)
    graphs.warm_up()
    for count in (1, 2, 3, 4, 5, 6, 1):
        inputs = [RowInput(row=n, token=100 * n, position=count, seed=n) for n in range(count)]
        tokens, logits = graphs.run(inputs)
        assert tokens.tolist() == [100 * n + count for n in range(count)]
        assert logits.flatten().tolist() == list(range(count))
    assert step.batches == [1, 2, 4, 4, 6, 6, 1]
    stats = graphs.stats()
    assert (stats["mode"], stats["buckets"]) == ("eager", (1, 2, 4, 6))
    assert (stats["compiles"], stats["captures"], stats["hits"], stats["misses"]) == (0, 0, 7, 0)
    assert stats["runs"] == {1: 2, 2: 1, 4: 2, 6: 2}
    assert stats["padded_rows"] == {1: 0, 2: 0, 4: 1, 6: 1}
    with pytest.raises(ValueError, match="7 rows exceed the largest bucket, 6"):
        graphs.run([RowInput(row=n, token=0, position=0) for n in range(7)])


def test_refused_modes() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'graphs', 'compile', 'eager', got 'fast'"):
        GraphCache(Toy(), mode="fast", buckets=(1,), device=CPU)
    with pytest.raises(ValueError, match="mode 'graphs' needs a CUDA device, got cpu"):
        GraphCache(Toy(), mode="graphs", buckets=(1,), device=CPU)


def test_closing_drops_the_step() -> None:
    step = Toy()
    graphs = GraphCache(step, mode="eager", buckets=(1,), device=CPU)
    graphs.warm_up()
    dropped = weakref.ref(step)
    graphs.close()
    del step
    assert dropped() is None
    assert graphs.stats()["mode"] == "eager"


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[fastdms.CompiledModel, list[str], dict[str, int]]]:
    """A model in mode "compile", the code generated for it, and the compiler's own counts of its making."""
    counters.clear()
    models: list[fastdms.CompiledModel] = []
    _, code = run_and_get_code(lambda: models.append(compiled(weights(), mode="compile", **OPTIONS)))
    counted = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    yield models[0], code, counted
    models[0].close()


def test_one_whole_graph_for_all_buckets(made) -> None:
    model, code, counted = made
    stats = model.graphs.stats()
    assert stats["buckets"] == (1, 2)
    assert (stats["compiles"], counted["graphs"]) == (2, 1), "traced once, compiled for each size"
    assert counted["breaks"] == 0
    assert len(code) == 2 * 3, "what comes before, between and after the attentions"


def test_no_copy_of_the_cache_in_the_generated_code(made) -> None:
    """No buffer of the pool's size, and nothing but our own ops ever touches pool, page tables or rings."""
    model, code, _ = made
    cache = engine_of(model).cache
    assert cache.k_pages.numel() == PAGES * 64 * HEAD_DIM
    largest = max(size for source in code for size in allocations(source))
    assert VOCAB_SIZE <= largest <= VOCAB_SIZE * 2, "the logits are the largest buffer"
    sampling = [source for source in code if "fastdms.sample" in source]
    assert len(sampling) == 2
    for source in sampling:
        (counts,) = inputs_of_shape(source, tuple(cache.counts.shape))
        assert uses(source, counts) == {"sample"}
    attending = [source for source in code if "decode_attention" in source]
    assert len(attending) == 4
    for source in attending:
        pools = inputs_of_shape(source, tuple(cache.k_pages.shape))
        assert len(pools) == 2
        for name in pools:
            assert uses(source, name) == {"decode_append", "decode_attention"}
        (table,) = inputs_of_shape(source, tuple(cache.page_table.shape[1:]))
        assert uses(source, table) == {"decode_append", "decode_attention"}
        (ring,) = set(inputs_of_shape(source, tuple(cache.ring.shape[1:]))) - {table}
        assert uses(source, ring) == {"decode_append"}


def test_compiled_equals_eager(made) -> None:
    model, _, _ = made
    seeded = replace(GREEDY, temperature=0.8, seed=7, max_tokens=40)
    penalised = replace(seeded, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2)
    prompts = [tiny_tokens(length, seed=length) for length in (5, 70, 130)]
    with compiled(weights(), **OPTIONS) as eager:
        for params in (GREEDY, seeded, penalised):
            expected, actual = (many(either(prompts, params)) for either in (eager, model))
            assert [done.token_ids for done in actual] == [done.token_ids for done in expected]
            assert len(set(actual[0].token_ids)) > 5
        counts = engine_of(model).cache.counts
        assert counts.bool().any(-1).all()
        assert torch.equal(counts, engine_of(eager).cache.counts)
        ids = tiny_tokens(150)
        for one_logits, other in zip(
            model.score_batch([ids, ids[:80]], [60, 9]), eager.score_batch([ids, ids[:80]], [60, 9]), strict=True
        ):
            assert_logits_close(one_logits, other)
        assert model.kv_report().live_tokens.tolist() == eager.kv_report().live_tokens.tolist()


def test_serving_never_compiles(made) -> None:
    """50 prompts of all lengths and settings, under whatever the caller has set; and the count would show it."""
    model, _, _ = made
    dice = random.Random(0)
    settings = [
        replace(GREEDY, presence_penalty=1), replace(GREEDY, temperature=0.8, seed=3),
        replace(GREEDY, temperature=1.5, top_k=5, logprobs=4),
        replace(GREEDY, temperature=1, top_p=0.5, min_p=0.1, min_tokens=3, stop_token_ids=[9, 10]),
    ]  # fmt: skip
    before, counters_before = model.graphs.stats(), counters["stats"]["unique_graphs"]
    for number in range(25):
        lengths = dice.choice([(dice.randint(1, 200),), (dice.randint(1, 9), dice.randint(1, 200)), (200, 3, 1)])
        params = replace(settings[number % 4], max_tokens=dice.randint(1, 6), min_tokens=0)
        with torch.inference_mode(number % 2 == 1), torch.autocast("cpu", enabled=number % 3 == 1):
            model([tiny_tokens(length, seed=number) for length in lengths], params)
    after = model.graphs.stats()
    assert after["compiles"] == before["compiles"] == 2
    assert after["recompiles"] == after["misses"] == 0
    assert counters["stats"]["unique_graphs"] == counters_before
    assert all(after["runs"][bucket] > before["runs"][bucket] + 20 for bucket in (1, 2))
    torch.set_default_dtype(torch.float64)  # something that the compiler guards on
    try:
        assert one(model(tiny_tokens(9), GREEDY)).finish_reason == "length"
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.graphs.stats()["compiles"] == 3, "a compile while serving goes unseen"
    assert model.graphs.stats()["recompiles"] == 1
    assert counters["stats"]["unique_graphs"] == counters_before + 1


def resident_mib() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


def test_memory_is_flat_over_500_requests(made) -> None:
    model, _, _ = made
    prompts = [[3 + n] for n in range(20)]
    objects, resident = [], []
    for number in range(25):
        model(prompts, replace(GREEDY, max_tokens=2, temperature=number % 2, logprobs=2))
        if number in (4, 24):
            gc.collect()
            objects.append(len(gc.get_objects()))
            resident.append(resident_mib())
    assert objects[1] - objects[0] < 100, "requests leave objects behind"
    assert resident[1] - resident[0] < 10


def test_closed_models_leave_nothing_behind(made) -> None:
    """Nor do dropped ones: the compiler's caches forget them; no weights, no pool of 64 MiB, no growth."""
    seen = []
    for closes in (True, True, False, True, False):
        model = compiled(weights(), mode="compile", **OPTIONS)
        parts = [weakref.ref(part) for part in (engine_of(model).runner.decoder, engine_of(model).cache.k_pages)]
        assert one(model([5, 6], GREEDY)).finish_reason == "length"
        if closes:
            model.close()
        del model
        gc.collect()
        assert [part() for part in parts] == [None, None]
        seen.append(resident_mib())
    assert seen[-1] - seen[0] < 30


CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)


def live_slots(cache: CompactCache, name: str) -> torch.Tensor:
    """What the spans hold, in their own order: which page a span got may hang on the order of concurrent pops."""
    spans = []
    for span in np.ndindex(*cache.live_len.shape):
        token = torch.arange(int(cache.live_len[span]), device=cache.live_len.device)
        page = cache.page_table[span][token // cache.config.page_size].long()
        spans.append(getattr(cache, name)[page, token % cache.config.page_size])
    return torch.cat(spans)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_clone_taken_before_the_cache_is_written(device: torch.device) -> None:
    """Clone a layer's part, append to two views of one pool, attend, use the clone: as in eager, bit for bit."""
    caches = [CompactCache(CACHE, device) for _ in range(2)]
    dice = torch.Generator().manual_seed(0)
    cos, sin = (torch.ones(64, 8, device=device), torch.zeros(64, 8, device=device))
    rows = torch.tensor([0, 2], dtype=torch.int32, device=device)

    def step(cache: CompactCache, q: Any, k: Any, v: Any, positions: Any) -> tuple[torch.Tensor, ...]:
        before = cache.ring[0].clone()
        attended = []
        for index in range(2):
            layer = cache.layer(index)
            q_rotated = decode_append(
                q, k, v, layer, positions=positions, rows=rows, cos=cos, sin=sin, decision=(1.0, 0.0), shift=0,
                zero_borrowed="none", alpha=None, q_norm=None, k_norm=None, norm_eps=1e-6,
            )  # fmt: skip
            q = decode_attention(q_rotated, layer, positions=positions, rows=rows, sm_scale=0.25)
            # As in a decoder, the next layer hangs on this one: else the compiler reorders them, and copies the pool.
            k, v = k + q[:, :2], v + q[:, 2:]
            attended.append(q)
        return torch.stack(attended), before, cache.ring[0] - before

    compiled_step = torch.compile(step, fullgraph=True, dynamic=False)
    code: list[str] = []
    for position in range(40):
        q, k, v = (torch.randn(2, heads, HEAD_DIM, generator=dice).to(device) for heads in (4, 2, 2))
        positions = torch.full((2,), position, dtype=torch.int32, device=device)
        expected = step(caches[0], q, k, v, positions)
        if position == 0:
            actual, code = run_and_get_code(compiled_step, caches[1], q, k, v, positions)
        else:
            actual = compiled_step(caches[1], q, k, v, positions)
        for one_output, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one_output, other, rtol=0, atol=0, equal_nan=True)
        for name in ("live_len", "ring", "num_free", "starved"):
            assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), f"{name} after step {position}"
        for name in ("k_pages", "v_pages"):
            assert same_bits(*(live_slots(cache, name) for cache in caches)), f"{name} after step {position}"
    (source,) = code
    sizes = allocations(source)
    assert caches[0].ring[0].numel() in sizes, "the clone was not made, or this reads the code wrongly"
    assert caches[0].k_pages.numel() not in sizes


def same_bits(one_tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one_tensor.view(torch.uint8), other.view(torch.uint8))
