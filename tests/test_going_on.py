"""Decode steps that go on from what the last one left, though rows end, and what makes the host begin anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import fastdms
from fastdms.engine import Engine
from fastdms.kv_report import RowUsage
from fastdms.request import Request
from fastdms.runner import Flight, PrefillPiece
from fastdms.sampling_params import SamplingParams
from tests.calls import Calls
from tests.models import dms_config, tiny_tokens
from tests.running import Watch, check_idle, compiled, drain, engine_of, many, one, submit
from tests.tiny_tokenizers import byte_level

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [tiny_tokens(length, seed=length) for length in (40, 63, 5, 90, 1, 64, 17, 30)]
LONG = tiny_tokens(200, seed=200)


@pytest.fixture(scope="module")
def alone(weights: PreTrainedModel) -> list[fastdms.Completion]:
    with compiled(weights, dms="off", max_concurrency=1, tokenizer=byte_level()) as model:
        return [one(model(prompt, GREEDY)) for prompt in (*PROMPTS, LONG)]


@pytest.mark.parametrize("by", ["length", "id"])
def test_rows_that_end_leave_the_others_as_they_are(weights, alone, monkeypatch, by: str) -> None:
    """From 8 to 5 they stay where they are; 4 fit into a smaller bucket, and so do 2, and 1."""
    with compiled(weights, dms="off", max_concurrency=8) as model:
        watch = Watch(model)
        engine_of(model)._run_ahead = True
        params, length = [], 2
        for done in alone[:8]:
            ids, length = done.token_ids, length + 2
            while by == "id" and ids[length - 1] in ids[: length - 1]:
                length += 1
            stop = [ids[length - 1]] if by == "id" else []
            params.append(replace(GREEDY, max_tokens=GREEDY.max_tokens if by == "id" else length, stop_token_ids=stop))
        requests = [submit(model, *each) for each in zip(PROMPTS, params, strict=True)]
        calls = Calls(model, monkeypatch)
        drain(model, requests)
        check_idle(model)
    assert [count for count in calls.starts if count] == [8, 4, 2, 1]
    assert watch.counts["starved"] == 0
    for request, done in zip(requests, alone, strict=False):
        assert request.finish_reason == ("stop" if by == "id" else "length")
        assert request.output_ids == done.token_ids[: len(request.output_ids)]
        assert request.usage is not None
        assert request.usage.num_tokens == len(request.prompt_ids) + len(request.output_ids) - 1


def test_a_step_starts_before_the_last_is_read_and_rows_are_given_back_after(weights, monkeypatch) -> None:
    with compiled(weights, dms="off", max_concurrency=4) as model:
        engine_of(model)._run_ahead = True
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=n)) for n in (4, 6, 6)]
        calls = Calls(model, monkeypatch)
        drain(model, requests)
        check_idle(model)
    going_on = ["start", "land"]
    assert calls.starts == [3, 0, 0, 0, 2]
    assert calls.events == [
        "prefill", "sample", "start", *going_on, *going_on, *going_on, "release",
        "land", "start", "land", "release", "release",
    ]  # fmt: skip


def test_a_row_that_only_the_host_knows_to_have_ended_is_filled_out(weights, alone, monkeypatch) -> None:
    """By a stop string, or cancelled: it would go on writing where nothing is its own any more."""
    prompts, stop = PROMPTS[:8], alone[0].text[6:9]
    with compiled(weights, dms="off", max_concurrency=8, tokenizer=byte_level()) as model:
        watch = Watch(model)
        engine_of(model)._run_ahead = True
        requests = [
            submit(model, prompt, replace(GREEDY, stop=stop if n == 0 else None)) for n, prompt in enumerate(prompts)
        ]
        calls = Calls(model, monkeypatch)
        drain(model, requests[:1])
        assert requests[0].finish_reason == "stop"
        engine_of(model).step()
        assert [count for count in calls.starts if count] == [8, 7]
        engine_of(model).step()
        engine_of(model).cancel(requests[1])
        engine_of(model).step()
        assert [count for count in calls.starts if count] == [8, 7, 6]
        drain(model, requests[2:])
        check_idle(model)
    assert watch.counts["starved"] == 0
    for request, done in zip(requests[2:], alone[2:], strict=False):
        assert request.output_ids == done.token_ids


def test_a_row_that_has_ended_is_another_ones_at_once(weights, alone, monkeypatch) -> None:
    """Who waits for it begins in the next step, and the entry that was left behind touches nothing of it."""
    with compiled(weights, dms="off", max_concurrency=8) as model:
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        penalised = replace(GREEDY, frequency_penalty=0.5, repetition_penalty=1.2)
        expected = one(model(PROMPTS[7], penalised)).token_ids
        first = [
            submit(model, PROMPTS[n], replace(penalised if n == 0 else GREEDY, max_tokens=6 if n == 0 else 30))
            for n in range(7)
        ]
        drain(model, first[:1])
        for _ in range(3):
            engine.step()  # with a hole
        calls = Calls(model, monkeypatch)
        late = submit(model, PROMPTS[7], penalised)
        engine.step()
        assert late.row == 0
        assert calls.events == ["land", "prefill", "sample", "start"]
        drain(model, [*first, late])
        check_idle(model)
    assert late.output_ids == expected
    assert [request.output_ids for request in first[1:]] == [done.token_ids for done in alone[1:7]]


def test_steps_go_on_while_somebody_waits_for_pages(weights, alone, monkeypatch) -> None:
    """Although a row is free: nobody is looked at twice before pages may have come back."""
    with compiled(weights, dms="off", max_concurrency=3, pages=20) as model:
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        requests = [
            submit(model, PROMPTS[n], replace(GREEDY, max_tokens=most)) for n, most in ((0, 30), (3, 9), (1, 30))
        ]
        calls = Calls(model, monkeypatch)
        looks: list[int] = []
        spare = engine._pages_to_spare

        def looked() -> int:
            looks.append(len(calls.starts))
            return spare()

        monkeypatch.setattr(engine, "_pages_to_spare", looked)
        engine.step()
        assert [request.row is None for request in requests] == [False, False, True]
        drain(model, requests)
        check_idle(model)
    assert looks == [0, 0, 1, 9], "for each prompt, once more when it is known what these kept, and when one has left"
    assert calls.starts[:10] == [2, 2, *[0] * 7, 2]
    assert [request.output_ids for request in requests] == [
        alone[n].token_ids[:most] for n, most in ((0, 30), (3, 9), (1, 30))
    ]


def test_chunks_start_before_a_step_is_read_while_somebody_waits_for_pages(weights, alone, monkeypatch) -> None:
    """What a prompt is expected to keep is set aside until its end, and no chunk before that leaves more to spare."""
    with compiled(weights, dms="off", max_concurrency=3, pages=28, prefill_chunk=16) as model:
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        requests = [submit(model, PROMPTS[2], GREEDY)]
        engine.step()
        requests += [submit(model, LONG, GREEDY), submit(model, PROMPTS[0], GREEDY)]
        calls, turns = Calls(model, monkeypatch), []
        while not requests[1].output_ids:
            calls.events.clear()
            engine.step()
            turns.append(calls.events.copy())
        assert turns == [
            ["land", "prefill", "start"],
            ["prefill", "land", "start"],
            ["prefill", "land", "start"],
            ["prefill", "sample", "land", "start"],
        ]
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [alone[n].token_ids for n in (2, 8, 0)]


def test_who_waits_for_pages_gets_those_of_a_row_that_ends_though_steps_could_go_on(weights, alone) -> None:
    """Three rows stay in the bucket of four."""
    with compiled(weights, dms="off", max_concurrency=5, pages=36) as model:
        engine = engine_of(model)
        engine._run_ahead = True
        numbers = (2, 4, 6, 7, 2)
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=6 if n == 4 else 30)) for n in numbers]
        drain(model, requests[1:2])
        assert [request.row is None for request in requests] == [False, True, False, False, True]
        engine.step()
        assert requests[4].row is not None
        drain(model, requests)
        check_idle(model)
    for request, n in zip(requests, numbers, strict=True):
        assert request.output_ids == alone[n].token_ids[: len(request.output_ids)]


def test_who_waits_for_pages_gets_those_of_rows_that_are_returned(weights, alone) -> None:
    with compiled(weights, dms="off", max_concurrency=3, pages=20) as model:
        engine = engine_of(model)
        engine._run_ahead = True
        (taken,) = engine.take_rows(1)
        engine.runner.prefill([PrefillPiece(row=taken, token_ids=LONG[:100], start=0)])
        requests = [submit(model, PROMPTS[n], GREEDY) for n in (0, 1)]
        for _ in range(3):
            engine.step()
        assert [request.row is None for request in requests] == [False, True]
        engine.return_rows([taken])
        engine.step()
        assert requests[1].row is not None
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [done.token_ids for done in alone[:2]]


@pytest.mark.parametrize("rule", ["off", "masked"])
def test_chunks_start_before_a_step_is_read(weights, monkeypatch, rule: str) -> None:
    """One by length ends in the second of the steps; it leaves behind the chunks, and what it kept is not read, which
    would wait for them."""
    dms = "off" if rule == "off" else dms_config("nvidia", 7)
    with compiled(weights, dms=dms, max_concurrency=3, prefill_chunk=16) as model:
        expected = [one(model(ids, GREEDY)).token_ids for ids in (PROMPTS[2], PROMPTS[4], LONG)]
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=most)) for n, most in ((2, 30), (4, 4))]
        engine.step()
        requests.append(submit(model, LONG, GREEDY))
        calls, accepted, accept = Calls(model, monkeypatch), list[Request](), Request.accept
        monkeypatch.setattr(Request, "accept", lambda *given: accepted.append(given[0]) or accept(*given))  # type: ignore[func-returns-value]
        learn = property(calls.noted(vars(RowUsage)["live_tokens"].fget, "learn"))
        monkeypatch.setattr(RowUsage, "live_tokens", learn)
        turns = []
        while not requests[2].output_ids:
            calls.events.clear()
            engine.step()
            turns.append(calls.events.copy())
        chunks = ["prefill"] * (1 if rule == "off" else 4)  # of 64 tokens, or 16
        assert turns == [
            ["land", *chunks, "start"],  # to let it in, which asks for the pages that are free
            [*chunks, "land", "start"],
            [*chunks, "land", "release", "start"],
            ["prefill", "sample", "land", "start"],
        ]
        assert accepted[-2:] == [requests[0], requests[2]], "the step was read only after the chunk had been waited for"
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [expected[0], expected[1][:4], expected[2]]


@pytest.mark.parametrize("place", ["land", "accept", "release"])
def test_reading_that_breaks_off_behind_chunks_loses_nothing(weights, monkeypatch, place: str) -> None:
    with compiled(weights, dms="off", max_concurrency=3, prefill_chunk=16) as model:
        expected = [one(model(ids, GREEDY)).token_ids for ids in (PROMPTS[2], PROMPTS[4], LONG)]
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=most)) for n, most in ((2, 30), (4, 3))]
        engine.step()
        requests.append(submit(model, LONG, GREEDY))
        engine.step()

        owner: Any = {"land": Flight, "accept": Request, "release": engine.runner}[place]
        original, calls = getattr(owner, place), Calls(model, monkeypatch)

        def interrupted(*_: Any) -> None:
            patch.setattr(owner, place, original)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert calls.events[0] == "prefill"
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [expected[0], expected[1][:3], expected[2]]


arrive = st.tuples(
    st.just("arrive"),
    st.integers(0, 8),
    st.integers(1, 14),
    st.sampled_from(["length", "id", "string", "least", "drawn"]),
)
cancel = st.tuples(st.just("cancel"), st.integers(0, 11), st.just(0), st.just(""))
step = st.tuples(st.just("step"), st.integers(1, 5), st.just(0), st.just(""))


@pytest.fixture(scope="module")
def engines(weights) -> list[tuple[fastdms.CompiledModel, Watch]]:
    """Settled and ahead; with room for all, and with pages for a few, of which more are let in."""
    models = []
    for pages in (None, 20):
        for ahead in (False, True):
            model = compiled(
                weights, dms="off", max_concurrency=6, pages=pages, prefill_chunk=32, tokenizer=byte_level()
            )
            engine_of(model)._run_ahead = ahead
            if pages is not None:
                _let_too_many_in(engine_of(model))
            models.append((model, Watch(model)))
    return models


def _let_too_many_in(engine: Engine) -> None:
    engine._live_share = 0.0
    engine._learn = lambda request: None  # type: ignore[method-assign]
    engine._pages_to_spare = lambda: int(engine.cache.num_free)  # type: ignore[method-assign]


def wanted(done: fastdms.Completion, length: int, how: str) -> SamplingParams:
    """To end after ``length`` tokens, or about there."""
    ids, text = done.token_ids, done.text
    params = replace(GREEDY, max_tokens=length)
    if how == "id":
        return replace(GREEDY, stop_token_ids=[ids[length - 1]])
    if how == "least":
        return replace(GREEDY, stop_token_ids=[ids[length // 2]], min_tokens=length // 2 + 1, max_tokens=length + 1)
    if how == "string":
        return replace(params, stop=text[length : length + 2] or "none")
    return replace(params, temperature=1, seed=length, presence_penalty=0.3) if how == "drawn" else params


def outcome(request: Request) -> tuple[Any, ...]:
    """All that comes of it, but for what the step ahead has stored of one that a stop string ended."""
    assert request.usage is not None
    assert request.text is not None
    text = "".join(piece.text for piece in request.pieces)
    kept = None if request.text.stopped else (request.usage.num_tokens, request.usage.live_tokens.tolist())
    return request.finish_reason, request.error, request.output_ids, text, kept


@settings(max_examples=25)
@given(st.lists(st.one_of(arrive, arrive, cancel, step, step), min_size=1, max_size=20))
def test_any_history_ends_as_in_an_engine_that_settles_each_step(engines, alone, history) -> None:
    outcomes = []
    for model, watch in engines:
        watch.counts.clear()
        engine, requests, cancelled = engine_of(model), list[Request](), list[Request]()
        for kind, number, length, how in history:
            if kind == "arrive":
                requests.append(submit(model, [*PROMPTS, LONG][number], wanted(alone[number], length, how)))
            elif kind == "step":
                for _ in range(number):
                    engine.step()
            elif number < len(requests):
                engine.cancel(requests[number])
                cancelled.append(requests[number])
        drain(model, [request for request in requests if request not in cancelled])
        check_idle(model)
        outcomes.append([None if request in cancelled else outcome(request) for request in requests])
    assert outcomes[1:] == outcomes[:1] * 3


def test_the_tight_pool_of_any_history_starves_rows(engines) -> None:
    for model, watch in engines[2:]:
        watch.counts.clear()
        many(model(PROMPTS, GREEDY))
        assert watch.counts["starved while decoding"] > 0
