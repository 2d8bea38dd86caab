"""Requests that nobody waits for any more, at every moment of their life: their pages come back at once."""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

import fastdms
from fastdms.request import Request
from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_tokens
from tests.running import STEP_LIMIT, Watch, check_idle, compiled, drain, engine_of, many, one, submit

MASKED = dms_config("nvidia", 7)
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [tiny_tokens(length, seed=length) for length in (100, 3, 90, 40)]
CHUNK = 20  # 100 tokens are prefilled in 5 chunks
FATES = ("queued", "prefilling", "decoding", "finishing", "never")


@pytest.fixture(scope="module")
def alone(weights: PreTrainedModel) -> list[list[int]]:
    with compiled(weights, dms=MASKED, max_concurrency=1) as model:
        return [one(model(prompt, PARAMS)).token_ids for prompt in PROMPTS]


def due(request: Request, fate: str) -> bool:
    """Whether the moment has come at which this request is to be cancelled."""
    if fate == "queued":
        return request.row is None and not request.finished
    if fate == "prefilling":
        return request.computed == 2 * CHUNK and not request.output_ids
    if fate == "decoding":
        return len(request.output_ids) == 5
    return fate == "finishing" and request.finished


def test_two_hundred_requests_cancelled_at_random(weights, alone) -> None:
    dice = random.Random(1)
    fates: dict[Request, str] = {}
    cancelled: Counter[str] = Counter()
    with compiled(weights, dms=MASKED, pages=24, prefill_chunk=CHUNK) as model:
        engine, watch = engine_of(model), Watch(model)
        while len(fates) < 200 or any(not request.finished and fates[request] == "never" for request in fates):
            for _ in range(min(dice.randrange(4), 200 - len(fates))):
                which = dice.randrange(len(PROMPTS))
                fates[submit(model, PROMPTS[which], PARAMS)] = dice.choice(FATES)
            engine.step()
            for request, fate in fates.items():
                if not due(request, fate):
                    continue
                held = request.row
                for _ in range(dice.choice((1, 2))):
                    engine.cancel(request)
                cancelled[fate] += 1
                fates[request] = "gone"
                assert request not in engine.running
                assert request not in engine._waiting
                assert held is None or not engine.cache.live_len[:, held].any(), "the pages come back at once"
            assert watch.counts["step"] < STEP_LIMIT
        for request in fates:
            engine.cancel(request)
        check_idle(model)
        steps = watch.counts["decode"]
        engine.step()
        assert watch.counts["decode"] == steps, "something still runs"
    assert watch.most_rows > 1
    assert set(cancelled) == set(FATES) - {"never"}
    assert min(cancelled.values()) > 5
    finished = [request for request in fates if request.finished]
    assert len(finished) > 20
    for request in fates:
        expected = alone[PROMPTS.index(request.prompt_ids)]
        assert request.output_ids == (expected if request.finished else expected[: len(request.output_ids)])


def test_a_cancelled_request_never_runs_on(weights) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=2, prefill_chunk=CHUNK) as model:
        engine, watch = engine_of(model), Watch(model)
        requests = [submit(model, prompt, PARAMS) for prompt in PROMPTS[:3]]
        engine.step()
        assert [request.row for request in requests] == [0, 1, None]
        for request in requests:
            engine.cancel(request)
        check_idle(model)
        engine.step()
        assert watch.counts["prefill"] == 1
        assert [request.finished for request in requests] == [False] * 3


@pytest.mark.parametrize("how", ["dropped", "closed", "collected"])
@pytest.mark.parametrize("read", [0, 1, 5])
def test_a_stream_nobody_reads_on(weights, alone, read: int, how: str) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=2) as model:
        watch = Watch(model)
        stream = model.stream(PROMPTS[0], replace(PARAMS, max_tokens=100))
        for _ in range(read):
            next(stream)
        assert len(engine_of(model).running) == (read > 0)
        if how == "closed":
            stream.close()  # type: ignore[attr-defined]
            stream.close()  # type: ignore[attr-defined]
            assert list(stream) == []
        elif how == "collected":
            cycle = [stream]
            cycle.append(cycle)  # type: ignore[arg-type]
            del cycle
        del stream
        gc.collect()
        check_idle(model)
        before = watch.counts["decode"]
        assert one(model(PROMPTS[1], PARAMS)).token_ids == alone[1]
        assert watch.counts["decode"] - before == PARAMS.max_tokens - 1, "it ran on beside the next call"
        assert watch.most_rows == 1


def test_streams_side_by_side(weights, alone) -> None:
    """Read in turns; two are given up half-way; calls and scores run in between; each gives its own tokens."""
    with compiled(weights, dms=MASKED, prefill_chunk=CHUNK) as model:
        watch = Watch(model)
        streams = [model.stream(prompt, PARAMS) for prompt in PROMPTS]
        tokens: list[list[int]] = [[] for _ in streams]
        for turn in range(PARAMS.max_tokens):
            for index, stream in enumerate(streams):
                if turn == 4 and index in (1, 2):
                    stream.close()  # type: ignore[attr-defined]
                tokens[index] += [
                    token for piece in list(zip(range(1), stream, strict=False)) for token in piece[1].token_ids
                ]
            if turn == 6:
                assert [done.token_ids for done in many(model(PROMPTS, PARAMS))] == alone
                model.score(PROMPTS[0], 50)
        assert [tokens[0], tokens[3]] == [alone[0], alone[3]]
        assert [tokens[1], tokens[2]] == [alone[1][:4], alone[2][:4]]
        assert all(list(stream) == [] for stream in streams)
        check_idle(model)
    assert watch.most_rows == 4


def test_a_stream_is_carried_on_by_a_call(weights, alone) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=1) as model:
        Watch(model)
        stream = model.stream(PROMPTS[0], PARAMS)
        pieces = [next(stream)]
        assert one(model(PROMPTS[1], PARAMS)).token_ids == alone[1], "the call waits for the only row"
        pieces += list(stream)
        assert [token for piece in pieces for token in piece.token_ids] == alone[0]
        check_idle(model)


def test_a_broken_consumer_frees_its_stream(weights) -> None:
    with compiled(weights, dms=MASKED) as model:
        for kind in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(kind):
                _read_and_break(model, kind)
            gc.collect()
            check_idle(model)


def _read_and_break(model: fastdms.CompiledModel, kind: type[BaseException]) -> None:
    for _ in model.stream(PROMPTS[0], PARAMS):
        raise kind


def test_cancelling_what_is_over(weights, alone) -> None:
    with compiled(weights, dms=MASKED) as model:
        engine = engine_of(model)
        done, other = (submit(model, PROMPTS[i], replace(PARAMS, max_tokens=4 + 8 * i)) for i in (0, 1))
        drain(model, [done])
        assert done.row is None
        for _ in range(2):
            engine.cancel(done)
        assert done.finish_reason == "length"
        assert engine.running == [other]
        drain(model, [other])
        assert [done.output_ids, other.output_ids] == [alone[0][:4], alone[1]]
        check_idle(model)


@pytest.mark.parametrize("place", ["decode", "prefill", "release"])
def test_a_stream_collected_in_the_middle_of_a_step(weights, alone, place: str) -> None:
    """By the thread that steps: its pages are freed when the step is done, not under its hands."""
    with compiled(weights, dms=MASKED) as model:
        Watch(model)
        engine = engine_of(model)
        original, lost = getattr(engine.runner, place), list[Any]()

        def collecting(*args: Any) -> Any:
            held = engine.running
            lost.clear()  # its last reference: this closes the stream, which cancels its request
            result = original(*args)
            assert engine.running == held
            return result

        setattr(engine.runner, place, collecting)
        for n in range(3):
            stream = model.stream(PROMPTS[3], PARAMS)
            next(stream)
            lost.append(stream)
            del stream
            assert one(model(PROMPTS[n], PARAMS)).token_ids == alone[n]
            assert not lost
            check_idle(model)
