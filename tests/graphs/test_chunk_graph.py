"""A recorded prefill chunk: whole chunks of one row go by it, all others as before, and the tokens are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdms
from fastdms.decoder import Chunk
from fastdms.graphs import GraphCache
from fastdms.runner import PrefillPiece, _state, inference
from fastdms.sampling_params import SamplingParams
from tests.graphs.toys import FakeRecorder
from tests.models import dms_config, tiny_model, tiny_tokens
from tests.running import check_idle, compiled, drain, engine_of, submit

CHUNK = 24
OPTIONS: dict[str, Any] = {
    "dms": dms_config("nvidia", 7), "max_concurrency": 3, "prefill_chunk": CHUNK, "mode": "eager",
}  # fmt: skip
PROMPTS = [tiny_tokens(length, seed=length) for length in (CHUNK, 2 * CHUNK + 5, 3, 3 * CHUNK)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def recorded() -> fastdms.CompiledModel:
    """A model that replays whole chunks, and checks where its tensors lie."""
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
        runner.graphs.add_chunk(
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
        assert plain.graphs.stats()["chunk"] is None
        chunk = model.graphs.stats()["chunk"]
        assert (chunk["num_tokens"], chunk["runs"]) == (CHUNK, 6)
        assert f"prefill chunk of {CHUNK} tokens: 6 runs" in model.graphs.report()


def test_logits_and_cache_are_those_of_a_plain_prefill() -> None:
    ids = tiny_tokens(2 * CHUNK, seed=5)
    with compiled(tiny_model("qwen3"), **OPTIONS) as plain, recorded() as model:
        for start in (0, CHUNK):
            pieces = [PrefillPiece(row=2, token_ids=ids[start : start + CHUNK], start=start)]
            expected, actual = (engine_of(m).runner.prefill(pieces) for m in (plain, model))
            assert torch.equal(actual, expected)
        for name in ("live_len", "num_free", "ring", "starved"):
            assert torch.equal(getattr(engine_of(model).cache, name), getattr(engine_of(plain).cache, name))


def test_logits_outlive_the_next_run() -> None:
    with recorded() as model:
        runner = engine_of(model).runner
        first = runner.prefill([PrefillPiece(row=0, token_ids=PROMPTS[0], start=0)])
        kept = first.clone()
        runner.prefill([PrefillPiece(row=1, token_ids=PROMPTS[1][:CHUNK], start=0)])
        assert torch.equal(first, kept)


def test_a_closed_cache_and_other_lengths() -> None:
    with recorded() as model:
        graphs = model.graphs
        assert graphs.run_chunk(0, PROMPTS[2], 0) is None
        assert graphs._chunk is not None
        with pytest.raises(ValueError, match="24 tokens, got 3"):
            graphs._chunk.run(0, PROMPTS[2], 0)
    assert graphs.run_chunk(0, PROMPTS[0], 0) is None


def test_a_pool_that_was_moved_is_noticed() -> None:
    with recorded() as model:
        cache = engine_of(model).cache
        cache.k_pages = cache.k_pages.clone()
        with pytest.raises(AssertionError, match=r"prefill chunk was captured, these moved: k_pages$"):
            model(PROMPTS[0], PARAMS)


class _NoMemory(FakeRecorder):
    def record(self, run: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")


def test_without_memory_prefills_go_unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with recorded() as model:
        graphs = model.graphs
        graphs._chunk = None
        with inference(torch.device("cpu")):
            graphs.add_chunk(lambda buffers: buffers.outputs, CHUNK, _NoMemory())
        assert graphs.stats()["chunk"] is None
        assert len(model(PROMPTS[0], PARAMS).token_ids) == 12  # type: ignore[union-attr]
