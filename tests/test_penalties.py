"""Presence, frequency and repetition penalties of whole requests, whoever runs beside them and however they are run."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

import fastdms
from fastdms.ops import count_tokens
from fastdms.request import Request
from fastdms.sampling_params import SamplingParams
from tests import oracle
from tests.models import VOCAB_SIZE, dms_config, tiny_tokens
from tests.running import Alone, Watch, check_idle, compiled, drain, engine_of, lone_runs, many, one, submit

MASKED = dms_config("nvidia", 7)
RULES = {"masked": MASKED}
PROMPT = tiny_tokens(40)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.8, seed=7)
KINDS = [
    GREEDY,
    replace(GREEDY, presence_penalty=2),
    replace(SEEDED, frequency_penalty=0.7, repetition_penalty=1.3),
    SEEDED,
    replace(GREEDY, presence_penalty=-1, frequency_penalty=-2),
    replace(SEEDED, repetition_penalty=0.7),
    replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.2),
]
PROMPTS = [tiny_tokens(length, seed=length) for length in (1, 64, 40, 130, 2, 63, 90)]


@pytest.fixture(scope="module")
def alone(weights: PreTrainedModel) -> Alone:
    return lone_runs(weights, RULES)


def expected_of(alone: Alone) -> list[list[int]]:
    return [alone("masked", [prompt], params)[0] for prompt, params in zip(PROMPTS, KINDS, strict=True)]


def penalised(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """The definition, in plain Python."""
    times, prompt_ids, out = Counter(output), set(prompt), []
    for token, x in enumerate(logits):
        if token in times or token in prompt_ids:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        out.append(x - params.frequency_penalty * times[token] - params.presence_penalty * (token in times))
    return out


def check_counts(model: fastdms.CompiledModel, requests: list[Request]) -> None:
    """A row whose request has penalties holds the counts of its tokens."""
    cache = engine_of(model).cache
    engine_of(model).settle()
    for request in requests:
        if request.row is not None and request.output_ids and request.penalties is not None:
            expected = count_tokens(request.prompt_ids, request.output_ids, VOCAB_SIZE)
            assert cache.counts[request.row].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.0}, {"presence_penalty": -2.0}, {"frequency_penalty": 0.4}, {"frequency_penalty": -2.0},
        {"repetition_penalty": 1.2}, {"repetition_penalty": 0.8}, {"repetition_penalty": 1e-20},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0},
        {"presence_penalty": -0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    ],
    ids=str,
)  # fmt: skip
def test_greedy_takes_the_largest_penalised_logit(weights, penalties: dict[str, Any]) -> None:
    """Of the written-out model; what is reported stays the raw logits' log-probability."""
    params = replace(GREEDY, **penalties, logprobs=0)
    with compiled(weights, dms=MASKED, max_concurrency=1) as model:
        done = one(model(PROMPT, params))
    raw = oracle.dms_logits(weights, PROMPT + done.token_ids, MASKED)[len(PROMPT) - 1 : -1]
    moved = 0
    for step, (token, logits) in enumerate(zip(done.token_ids, raw, strict=True)):
        x = penalised(logits.tolist(), PROMPT, done.token_ids[:step], params)
        assert token == x.index(max(x)), step
        moved += token != int(logits.argmax())
        assert done.logprobs is not None
        assert done.logprobs[step][token] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-3)
    assert moved > 0, "the penalties changed nothing"


def test_they_change_the_tokens(alone: Alone) -> None:
    """Else a mistake would not show below; and each in its own way."""
    assert len({tuple(alone("masked", [PROMPT], params)[0]) for params in KINDS}) == len(KINDS)
    never_twice = alone("masked", [[5]], replace(KINDS[6], repetition_penalty=2, presence_penalty=2, max_tokens=60))[0]
    assert len(set(never_twice)) > 45


@pytest.mark.parametrize("ahead", [False, True], ids=["settled", "ahead"])
@pytest.mark.parametrize("rows", [3, 8])
def test_rows_with_and_without_penalties(weights, alone, rows: int, ahead: bool) -> None:
    """Side by side in a padded batch, or as rows come free, each has the tokens of its run alone."""
    with compiled(weights, dms=MASKED, max_concurrency=rows, prefill_chunk=50) as model:
        engine = engine_of(model)
        engine._run_ahead = ahead
        assert not engine.cache.counts.any(), "warming up counted"
        requests = [submit(model, prompt, params) for prompt, params in zip(PROMPTS, KINDS, strict=True)]
        steps = 0
        while not all(request.finished for request in requests):
            engine.step()
            steps += 1
            if steps % 5 == 0:
                check_counts(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == expected_of(alone)


@pytest.mark.parametrize("ahead", [False, True], ids=["settled", "ahead"])
def test_rows_that_join_and_leave(weights, alone, ahead: bool) -> None:
    """One by one, of other lengths, each in a row that has counted another's tokens; one is cancelled."""
    expected = expected_of(alone)
    with compiled(weights, dms=MASKED, max_concurrency=3) as model:
        engine = engine_of(model)
        engine._run_ahead = ahead
        requests: list[Request] = []
        for turn in range(14):
            kind = turn * 4 % 7
            requests.append(submit(model, PROMPTS[kind], replace(KINDS[kind], max_tokens=1 + 5 * turn % 24)))
            for _ in range(turn % 4):
                engine.step()
        cancelled = next(request for request in requests if request.row is not None)
        engine.cancel(cancelled)
        drain(model, [request for request in requests if request is not cancelled])
        check_idle(model)
    for turn, request in enumerate(requests):
        if request is not cancelled:
            assert request.output_ids == expected[turn * 4 % 7][: 1 + 5 * turn % 24]


def test_only_rows_with_penalties_are_counted(weights) -> None:
    """Scoring and requests without penalties count nothing."""
    with compiled(weights, dms=MASKED) as model:
        model(PROMPTS, SEEDED)
        model.score_batch(PROMPTS[1:4], [1, 2, 3])
        assert not engine_of(model).cache.counts.any()
        request = submit(model, PROMPT, replace(GREEDY, presence_penalty=0.1))
        drain(model, [request])
        counts = engine_of(model).cache.counts
        assert counts.any(-1).tolist() == [True, False, False, False]
        assert counts[0].tolist() == count_tokens(PROMPT, request.output_ids, VOCAB_SIZE).tolist()


@pytest.mark.parametrize("ahead", [False, True], ids=["settled", "ahead"])
def test_preempted_rows_are_counted_anew(weights, alone, ahead: bool) -> None:
    """Rows that fitted when they came, and no longer do as their answers grow; their rows are others' in between."""
    params = [replace(kind, max_tokens=45) for kind in (KINDS[1], KINDS[2], KINDS[6])]
    prompts = [tiny_tokens(length, seed=length) for length in (90, 110, 100)]
    with compiled(weights, dms=MASKED, max_concurrency=4, pages=12, prefill_chunk=37) as model:
        watch, engine = Watch(model), engine_of(model)
        engine._run_ahead = ahead
        engine._pages_to_spare = lambda: int(engine.cache.num_free)  # type: ignore[method-assign]  # no reserve
        requests = [submit(model, *each) for each in zip(prompts, params, strict=True)]
        drain(model, requests)
        check_idle(model)
    assert watch.counts["starved while decoding"] > 0
    for prompt, each, request in zip(prompts, params, requests, strict=True):
        assert request.output_ids == alone("masked", [prompt], each)[0]


@pytest.mark.parametrize("ahead", [False, True], ids=["settled", "ahead"])
def test_rows_that_find_no_page_for_their_prompt_are_counted_anew(weights, alone, ahead: bool) -> None:
    """A first token was drawn and counted before that was known. Others have their rows in between."""
    prompts = [tiny_tokens(length, seed=length) for length in (300, 280, 290, 20)]
    params = [replace(kind, max_tokens=12) for kind in (KINDS[1], KINDS[2], KINDS[6], KINDS[1])]
    with compiled(weights, dms=MASKED, max_context=512, max_concurrency=3, pages=28) as model:
        watch, engine = Watch(model), engine_of(model)
        engine._run_ahead, engine._live_share = ahead, 0.1  # as if learned from what compresses well
        requests = [submit(model, *each) for each in zip(prompts, params, strict=True)]
        drain(model, requests)
        check_idle(model)
    assert watch.counts["starved"] > watch.counts["starved while decoding"]
    for prompt, each, request in zip(prompts, params, requests, strict=True):
        assert request.output_ids == alone("masked", [prompt], each)[0]


def test_a_step_broken_off_is_counted_anew(weights, alone, monkeypatch) -> None:
    """Its tokens are dropped after the step has counted them."""
    with compiled(weights, dms=MASKED) as model:
        engine = engine_of(model)
        engine._run_ahead = True
        requests = [submit(model, prompt, params) for prompt, params in zip(PROMPTS[:4], KINDS, strict=False)]
        for _ in range(6):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(Request, "accept", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == expected_of(alone)[:4]


def test_a_ban_outlasts_a_reward(weights) -> None:
    """Tokens that a penalty below zero makes likelier each time are banned all the same until ``min_tokens``."""
    params = replace(GREEDY, presence_penalty=-2, frequency_penalty=-2, max_tokens=30)
    with compiled(weights, dms=MASKED) as model:
        free = one(model(PROMPT, params)).token_ids
        favourite = Counter(free).most_common(1)[0][0]
        done = one(model(PROMPT, replace(params, stop_token_ids=[favourite], min_tokens=9)))
        assert favourite not in done.token_ids[:9]
        assert len(done.token_ids) > 9


def test_the_same_among_many(weights, alone) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=8) as model:
        done = many(model([PROMPTS[2]] * 8, KINDS[2]))
    assert [completion.token_ids for completion in done] == [expected_of(alone)[2]] * 8


@pytest.mark.parametrize("temperature", [0, 1e-8, 1, 1e300])
def test_extreme_penalties(weights, temperature: float) -> None:
    """Any legal ones give a token of finite log-probability; the smallest repetition penalty repeats."""
    with compiled(weights, dms=MASKED, dtype="bf16") as model:
        for repetition, additive in itertools.product((5e-324, 2), (-2, 2)):
            params = replace(
                SEEDED, temperature=temperature, repetition_penalty=repetition, presence_penalty=additive,
                frequency_penalty=additive, logprobs=5,
            )  # fmt: skip
            done = one(model(PROMPT, params))
            json.dumps(done.logprobs, allow_nan=False)
            assert all(0 <= token < VOCAB_SIZE for token in done.token_ids)
            if repetition < 1 and temperature <= 1:
                assert set(done.token_ids) <= set(PROMPT)
