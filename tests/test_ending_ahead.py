"""Rows that end while the step after has begun: what an end id or its length ended stores nothing more, and all else is
as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

import fastdms
from fastdms.graphs import RowInput
from fastdms.kv_report import RowUsage
from fastdms.request import Request
from fastdms.runner import FirstTokens, Flight, PrefillPiece
from fastdms.sampling_params import SamplingParams
from tests.models import tiny_tokens
from tests.running import Watch, check_idle, compiled, drain, engine_of, one, submit
from tests.tiny_tokenizers import byte_level

PROMPTS = [tiny_tokens(length, seed=length) for length in (40, 63, 5, 90)]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def outputs(weights: PreTrainedModel) -> list[list[int]]:
    with compiled(weights, dms="off", max_concurrency=1) as model:
        return [one(model(prompt, GREEDY)).token_ids for prompt in PROMPTS]


class Stored:
    """``tokens``: of each row, all spans alike, as it was last given back. Nothing evicts here."""

    def __init__(self, model: fastdms.CompiledModel) -> None:
        self.tokens: dict[int, int] = {}
        runner = engine_of(model).runner
        release = runner.release

        def seen(rows: list[int]) -> None:
            for row in rows:
                (self.tokens[row],) = set(runner.cache.live_len[:, row].flatten().tolist())
            release(rows)

        runner.release = seen  # type: ignore[method-assign]


def run(model: fastdms.CompiledModel, params: list[SamplingParams]) -> tuple[list[Request], list[int]]:
    """The requests of all prompts, run a step ahead, and what each row held when it left."""
    Watch(model)
    engine_of(model)._run_ahead = True
    stored = Stored(model)
    requests = [submit(model, prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
    engine_of(model).step()
    rows = [request.row for request in requests]
    drain(model, requests)
    check_idle(model)
    return requests, [stored.tokens[row] for row in rows if row is not None]


@pytest.mark.parametrize("beyond", [None, 0, 1, 2])
def test_an_end_id_stops_its_row_on_the_device(weights, outputs, beyond: int | None) -> None:
    """All but the end token itself was fed and stored. ``beyond``: tokens from before it to
    ``min_tokens``; where that bans it, the row goes on past it."""
    params, places = [], []
    for ids in outputs:
        places.append(next(i for i in range(7, 30) if ids[i] not in ids[:i]))
        least = 0 if beyond is None else places[-1] + beyond
        params.append(replace(GREEDY, stop_token_ids=[299, ids[places[-1]]], min_tokens=least))
    params[3] = GREEDY  # goes on beside them
    with compiled(weights, dms="off") as model:
        requests, stored = run(model, params)
    with compiled(weights, dms="off") as model:
        settled = [one(model(prompt, each)) for prompt, each in zip(PROMPTS, params, strict=True)]
    for request, done, held in zip(requests, settled, stored, strict=True):
        assert (request.output_ids, request.finish_reason) == (done.token_ids, done.finish_reason)
        assert request.usage is not None
        assert request.usage.num_tokens == held == done.kv.tokens == len(request.prompt_ids) + len(done.token_ids) - 1
    for request, ids, place in zip(requests[:3], outputs, places, strict=False):
        if beyond in (None, 0):
            assert (request.output_ids, request.finish_reason) == (ids[: place + 1], "stop")
        else:
            assert len(request.output_ids) > place + 1


def test_the_models_own_end(weights, outputs) -> None:
    """And none of it where the request ignores it."""
    end = next(i for i in range(5, 30) if outputs[0][i] not in outputs[0][:i])
    weights.config.eos_token_id = outputs[0][end]
    try:
        with compiled(weights, dms="off") as model:
            requests, stored = run(model, [replace(GREEDY, ignore_eos=False), *[GREEDY] * 3])
    finally:
        weights.config.eos_token_id = 2
    assert requests[0].output_ids == outputs[0][: end + 1]
    assert [request.output_ids for request in requests[1:]] == outputs[1:]
    assert stored == [len(ids) + n - 1 for ids, n in zip(PROMPTS, (end + 1, 30, 30, 30), strict=True)]


def test_length_stops_a_row_on_the_device(weights) -> None:
    """At its last position it gives its last token, and is padding from then on."""
    with compiled(weights, dms="off") as model:
        engine = engine_of(model)
        runner, rows = engine.runner, engine.take_rows(3)
        pieces = [PrefillPiece(row=row, token_ids=PROMPTS[row][:5], start=0) for row in rows]
        runner.prefill(pieces)
        inputs = [
            RowInput(row=row, token=9, position=5, last_position=last)
            for row, last in zip(rows, (6, 8, 99), strict=True)
        ]
        stored, positions = [], []
        for given in (inputs, *[None] * 4):
            runner.decode(given).land()
            stored.append(engine.cache.live_len[0, rows, 0].tolist())
            buffers = next(reversed(runner.graphs._buckets.values())).inputs
            positions.append(buffers.positions[:3].tolist())
        engine.return_rows(rows)
    assert stored == [[6, 6, 6], [6, 7, 7], [6, 8, 8], [6, 8, 9], [6, 8, 10]]
    assert positions == [[-1, 6, 6], [-1, 7, 7], [-1, -1, 8], [-1, -1, 9], [-1, -1, 10]]


@pytest.mark.parametrize("stop", [False, True])
def test_length_ends_rows_one_by_one(weights, monkeypatch, stop: bool) -> None:
    """Each while the step ahead has begun, and what it stored is what it was fed. ``stop``: by a stop string, in the
    very step in which its length would."""
    events: list[str] = []
    land = Flight.land
    monkeypatch.setattr(Flight, "land", lambda flight: events.append("land") or land(flight))  # type: ignore[func-returns-value]
    lengths = (3, 6, 9, 30)
    with compiled(weights, dms="off", tokenizer=byte_level()) as model:
        settled = [
            one(model(prompt, replace(GREEDY, max_tokens=n))) for prompt, n in zip(PROMPTS, lengths, strict=True)
        ]
        params = [replace(GREEDY, max_tokens=n) for n in lengths]
        if stop:
            params[2] = replace(params[2], stop=settled[2].text[-2:])
            assert one(model(PROMPTS[2], params[2])).token_ids == settled[2].token_ids
        runner = engine_of(model).runner
        decode, accept = runner.decode, Request.accept

        def started(inputs: list[RowInput] | None, first: FirstTokens | None = None) -> Flight:
            events.append("start")
            return decode(inputs, first)

        def accepted(request: Request, *args: object) -> None:
            accept(request, *args)  # type: ignore[arg-type]
            if request.finished:
                events.append("end")

        runner.decode = started  # type: ignore[method-assign,assignment]
        monkeypatch.setattr(Request, "accept", accepted)
        events.clear()
        requests, stored = run(model, params)
    for request, done, held in zip(requests, settled, stored, strict=True):
        assert request.output_ids == done.token_ids
        assert request.usage is not None
        assert request.usage.num_tokens == held == done.kv.tokens == len(request.prompt_ids) + len(done.token_ids) - 1
    reasons = ["length", "length", "stop" if stop else "length", "length"]
    assert [request.finish_reason for request in requests] == reasons
    ends = [i for i, event in enumerate(events) if event == "end"]
    assert [events[i - 2 : i] for i in ends[:3]] == [["start", "land"]] * 3
    assert events.count("start") == events.count("land") == 29, "a step was started that no row is left for"


def test_a_stop_string_is_the_hosts_to_see(weights) -> None:
    """The step ahead stores one more token, and the report says so."""
    with compiled(weights, dms="off", tokenizer=byte_level()) as model:
        text = one(model(PROMPTS[0], GREEDY)).text
        stop = replace(GREEDY, stop=text[6:9])
        settled = one(model(PROMPTS[0], stop))
        assert settled.finish_reason == "stop"
        requests, stored = run(model, [stop, *[GREEDY] * 3])
    assert requests[0].output_ids == settled.token_ids
    assert requests[0].usage is not None
    assert requests[0].usage.num_tokens == stored[0] == settled.kv.tokens + 1


def test_logits_that_are_not_finite_end_their_row(weights) -> None:
    with compiled(weights, dms="off") as model:
        engine = engine_of(model)
        engine._run_ahead = True
        stored = Stored(model)
        requests = [submit(model, prompt, GREEDY) for prompt in PROMPTS[:2]]
        for _ in range(8):
            engine.step()
        head = engine.runner.decoder.lm_head.weight
        with torch.no_grad():
            head.fill_(torch.nan)
        drain(model, requests)
        check_idle(model)
    for row, request in enumerate(requests):
        assert request.error is not None
        assert request.usage is not None
        assert request.usage.num_tokens == stored.tokens[row] == len(request.prompt_ids) + len(request.output_ids)


def test_what_a_row_kept_is_not_read_while_a_step_is_under_way(weights, monkeypatch) -> None:
    """That would wait for the step. The engine knows it once it lets the next one in."""
    read: list[bool] = []
    live_tokens = vars(RowUsage)["live_tokens"].fget
    with compiled(weights, dms="off") as model:
        engine = engine_of(model)
        engine._run_ahead, engine._live_share = True, 0.25
        seen = property(lambda usage: read.append(engine._under_way is not None) or live_tokens(usage))  # type: ignore[func-returns-value]
        monkeypatch.setattr(RowUsage, "live_tokens", seen)
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=5 * n + 5)) for n in range(3)]
        drain(model, requests[:1])
        assert engine.running == requests[1:]
        assert (engine._live_share, read) == (0.25, [])
        assert requests[0].usage is not None
        requests.append(submit(model, PROMPTS[3], GREEDY))
        engine.step()
        assert (engine._live_share, read) == (1.0, [False])
        drain(model, requests)
        assert not any(read)
        for request in requests:
            assert request.usage is not None
            assert (request.usage.live_tokens == request.usage.num_tokens).all()
        check_idle(model)
