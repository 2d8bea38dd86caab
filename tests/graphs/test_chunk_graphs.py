"""Recorded prefill chunks: whatever shares one, padded to whichever size, gives the tokens of plain prefills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdms
from fastdms.decoder import Chunk
from fastdms.graphs import GraphCache, RowChunk
from fastdms.graphs.chunk_graphs import ChunkBuffers, ChunkGraphs, chunk_sizes
from fastdms.runner import PrefillPiece, _state, inference
from fastdms.sampling_params import SamplingParams
from tests.graphs.toys import FakeRecorder
from tests.models import dms_config, tiny_model, tiny_tokens
from tests.running import check_idle, compiled, drain, engine_of, submit

CHUNK = 128
OPTIONS: dict[str, Any] = {
    "dms": dms_config("nvidia", 7), "max_concurrency": 3, "prefill_chunk": CHUNK, "mode": "eager", "max_context": 512,
}  # fmt: skip
PROMPTS = [tiny_tokens(length, seed=length) for length in (CHUNK, 20, 12, 3 * CHUNK + 33, 3)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def recorded() -> fastdms.CompiledModel:
    """A model that replays chunks, and checks where its tensors lie."""
    model = compiled(tiny_model("qwen3"), **OPTIONS)
    runner = engine_of(model).runner
    decoder, cache = runner.decoder, runner.cache
    step = runner.graphs._step
    assert step is not None
    runner.graphs = GraphCache(
        step, mode="eager", buckets=(1, 2, 3), device=torch.device("cpu"), recorder=FakeRecorder(), debug=True,
        state=lambda: _state(decoder, cache),
    )  # fmt: skip
    with inference(runner.device):
        runner.graphs.warm_up()
        runner.graphs.add_chunks(
            lambda buffers: decoder.prefill(Chunk(**buffers._asdict()), cache), CHUNK, FakeRecorder()
        )
    check_idle(model)  # warming up left nothing behind
    return model


def generate(model: fastdms.CompiledModel) -> list[list[int]]:
    requests = [submit(model, prompt, PARAMS) for prompt in PROMPTS]
    drain(model, requests)
    check_idle(model)
    return [request.output_ids for request in requests]


def test_the_tokens_are_those_of_plain_prefills() -> None:
    with compiled(tiny_model("qwen3"), **OPTIONS) as plain, recorded() as model:
        assert generate(model) == generate(plain)
        assert plain.graphs.stats()["chunks"] is None
        runs = model.graphs.stats()["chunks"]["runs"]
        assert list(runs) == [64, 128]
        assert all(runs.values())
        assert f"prefill chunks: {runs[64]} of 64 tokens, {runs[128]} of 128 tokens" in model.graphs.report()


def test_logits_and_cache_are_those_of_a_plain_prefill() -> None:
    """Several rows in one chunk, in no order, of which one goes on and one has a single token."""
    ids = tiny_tokens(200, seed=5)
    steps = [
        [PrefillPiece(row=2, token_ids=ids[:30], start=0)],
        [
            PrefillPiece(row=2, token_ids=ids[30:80], start=30),
            PrefillPiece(row=0, token_ids=ids[:1], start=0),
            PrefillPiece(row=1, token_ids=ids[90:131], start=0),
        ],
    ]
    with compiled(tiny_model("qwen3"), **OPTIONS) as plain, recorded() as model:
        for pieces in steps:
            expected, actual = (engine_of(m).runner.prefill(pieces) for m in (plain, model))
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # products of other sizes
        for name in ("live_len", "num_free", "starved"):
            assert torch.equal(getattr(engine_of(model).cache, name), getattr(engine_of(plain).cache, name))


def test_logits_outlive_the_next_run() -> None:
    with recorded() as model:
        runner = engine_of(model).runner
        first = runner.prefill([PrefillPiece(row=0, token_ids=PROMPTS[0], start=0)])
        kept = first.clone()
        runner.prefill([PrefillPiece(row=1, token_ids=PROMPTS[1], start=0)])
        assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (2048, (64, 128, 256, 512, 1024, 2048)),
        (40, (40,)),
        (1, (1,)),
        (130, (65, 130)),
        (2**20, (64, 128, 256, 512, 1024, 2048, 4096)),
    ],
)
def test_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert chunk_sizes(most) == sizes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_buffers_hold_the_chunk_and_nothing_of_the_one_before(data: st.DataObject) -> None:
    seen: list[list[list[int]]] = []

    def prefill(buffers: ChunkBuffers) -> torch.Tensor:
        seen.append([buffer.tolist() for buffer in buffers])
        return buffers.outputs.float()[:, None]

    graphs = ChunkGraphs(prefill, (4, 16), 3, torch.device("cpu"), FakeRecorder())
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
        chunks = [
            RowChunk(
                row, data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=8)), data.draw(st.integers(0, 50))
            )
            for row in rows
        ]
        total = sum(len(chunk.token_ids) for chunk in chunks)
        before = len(seen)
        logits = graphs.run(chunks)
        if total > 16 or len(chunks) > 3:
            assert logits is None
            assert len(seen) == before
            continue
        tokens, positions, held, indptr, outputs = seen[-1]
        size = 4 if total <= 4 else 16
        assert tokens == [token for chunk in chunks for token in chunk.token_ids] + [0] * (size - total)
        assert positions[total:] == [-1] * (size - total)
        assert held == rows + [0] * (3 - len(rows))
        assert indptr[len(rows) :] == [total] * (4 - len(rows))
        for chunk, begin, end, last in zip(chunks, indptr, indptr[1:], outputs, strict=False):
            assert tokens[begin:end] == chunk.token_ids
            assert positions[begin:end] == list(range(chunk.start, chunk.start + end - begin))
            assert last == end - 1
        assert outputs[len(rows) :] == [0] * (3 - len(rows))
        assert logits is not None
        assert logits[:, 0].tolist() == outputs[: len(rows)]


def test_a_closed_cache_runs_none() -> None:
    with recorded() as model:
        graphs = model.graphs
        assert graphs.run_chunk([RowChunk(0, PROMPTS[0], 0)]) is not None
    assert graphs.run_chunk([RowChunk(0, PROMPTS[0], 0)]) is None


def test_a_pool_that_was_moved_is_noticed() -> None:
    with recorded() as model:
        cache = engine_of(model).cache
        cache.k_pages = cache.k_pages.clone()
        with pytest.raises(AssertionError, match=r"prefill chunk was captured, these moved: k_pages$"):
            model(PROMPTS[0], PARAMS)


class _Full(FakeRecorder):
    """Runs out of memory once, while it warms up or records the size that is the ``at``-th."""

    def __init__(self, at: int, warming: bool, error: RuntimeError) -> None:
        super().__init__()
        self.at, self.warming, self.error = at, warming, error

    def warm_up(self, run: Any) -> None:
        super().warm_up(run)
        if self.warming and self.warmed == self.at:
            raise self.error

    def record(self, run: Any) -> Any:
        if not self.warming and self.warmed == self.at:
            raise RuntimeError("the capture was broken off") from self.error
        return super().record(run)


@pytest.mark.parametrize("warming", [True, False])
@pytest.mark.parametrize(("at", "left"), [(1, [4, 8]), (2, [4, 16]), (3, [8, 16])])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("none left"), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=["torch", "driver"],
)
def test_a_size_without_memory_is_left_out(at: int, left: list[int], warming: bool, error: RuntimeError) -> None:
    recorder = _Full(at, warming, error)
    graphs = ChunkGraphs(lambda b: b.outputs.float()[:, None], (4, 8, 16), 2, torch.device("cpu"), recorder)
    assert list(graphs.stats()["runs"]) == left
    assert (graphs.run([RowChunk(0, [1] * 12, 0)]) is None) == (16 not in left)
    assert graphs.run([RowChunk(0, [1] * 3, 0)]) is not None


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="broken off"):
        ChunkGraphs(lambda b: b.outputs, (4,), 2, torch.device("cpu"), _Full(1, False, RuntimeError("a bug")))


def test_more_rows_than_a_chunk_takes() -> None:
    graphs = ChunkGraphs(lambda b: b.outputs.float()[:, None], (64,), 20, torch.device("cpu"), FakeRecorder())
    assert graphs.run([RowChunk(row, [1], 0) for row in range(8)]) is not None
    assert graphs.run([RowChunk(row, [1], 0) for row in range(9)]) is None
