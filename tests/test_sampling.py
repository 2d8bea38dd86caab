"""What sampling settings do to whole requests: extremes, seeds, log-probabilities, and how a text ends."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fastdms
from fastdms.sampling_params import SamplingParams
from tests import oracle
from tests.models import VOCAB_SIZE, dms_config, tiny_model, tiny_tokens
from tests.running import Watch, check_idle, compiled, drain, engine_of, many, one, submit
from tests.tiny_tokenizers import byte_level
from tests.tolerance import LOGITS_RELATIVE

MASKED = dms_config("nvidia", 7)
PROMPT = tiny_tokens(40)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=7, max_tokens=32, ignore_eos=True)
UNSEEDED = replace(SEEDED, seed=None)


@pytest.fixture(scope="module")
def model(weights: PreTrainedModel) -> fastdms.CompiledModel:
    return compiled(weights, dms=MASKED, max_concurrency=8)


@pytest.fixture(scope="module")
def seeded(model: fastdms.CompiledModel) -> list[int]:
    """The tokens of ``SEEDED`` alone; they are neither greedy nor those of another seed."""
    tokens = one(model(PROMPT, SEEDED)).token_ids
    others = [one(model(PROMPT, params)).token_ids for params in (GREEDY, replace(SEEDED, seed=8), UNSEEDED, UNSEEDED)]
    assert len({tuple(ids) for ids in (tokens, *others)}) == 5
    return tokens


@pytest.fixture(scope="module")
def bf16_model(weights: PreTrainedModel) -> fastdms.CompiledModel:
    return compiled(weights, dms=MASKED, dtype="bf16")


TEMPERATURES = (0, 1e-300, 1e-8, 1e-4, 100, 1e30, 1e300)
TOP_PS = (5e-324, 1e-8, 1e-3, 1)
TOP_KS = (0, -1, 1, VOCAB_SIZE, VOCAB_SIZE + 1, 2**31, 2**63)
MIN_PS = (0, 1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_settings(bf16_model: fastdms.CompiledModel, temperature: float) -> None:
    """Any legal setting gives a token of finite log-probability, and the smallest nucleus is the likeliest token."""
    chosen = set()
    for top_p, top_k, min_p in itertools.product(TOP_PS, TOP_KS, MIN_PS):
        params = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logprobs=5, max_tokens=2, seed=top_k % 999
        )
        done = one(bf16_model(PROMPT, params))
        assert done.logprobs is not None
        json.dumps(done.logprobs, allow_nan=False)
        for token, step in zip(done.token_ids, done.logprobs, strict=True):
            assert 0 <= token < VOCAB_SIZE
            assert len(step) in (5, 6)
            if temperature <= 1e-4 or top_p <= 1e-3 or top_k == 1 or min_p == 1:
                assert step[token] == max(step.values())
            else:
                chosen.add(token)
    assert temperature <= 1e-4 or len(chosen) >= 4, "the hottest settings all chose the same token"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.inf), ("temperature", math.nan), ("temperature", -1), ("temperature", "hot"),
        ("top_p", 0), ("top_p", -1), ("top_p", math.nan), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.5),
        ("presence_penalty", 2.1), ("frequency_penalty", math.nan), ("repetition_penalty", 0),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**12), ("min_tokens", -1), ("seed", -1),
        ("logprobs", 10**9), ("logprobs", -1), ("stop", ""), ("stop", [""]), ("stop_token_ids", [-1]),
        ("stop_token_ids", [VOCAB_SIZE]), ("ignore_eos", "yes"), ("max_token", 5),
    ],
)  # fmt: skip
def test_refused_settings_name_the_field(model: fastdms.CompiledModel, field: str, value: Any) -> None:
    for call in (model, model.generate, model.stream):
        with pytest.raises(ValueError, match=rf"\b{field}\b"):
            call(PROMPT, **{field: value})
    check_idle(model)


def test_refused_ways_to_give_settings(model: fastdms.CompiledModel) -> None:
    with pytest.raises(ValueError, match="either params or fields, not both: seed"):
        model(PROMPT, GREEDY, seed=1)
    with pytest.raises(ValueError, match="params must be a SamplingParams, got dict"):
        model(PROMPT, {"seed": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown sampling fields max_token, tmp; there are temperature, "):
        model(PROMPT, seed=1, max_token=3, tmp=0)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        model(PROMPT, stop="a")
    assert one(model(PROMPT, GREEDY)).finish_reason == "length"


NEIGHBOURS = {
    "unseeded": UNSEEDED,
    "greedy": GREEDY,
    "otherwise seeded": replace(SEEDED, seed=8),
    "same seed": SEEDED,
    "penalised": replace(SEEDED, presence_penalty=2, frequency_penalty=2, repetition_penalty=0.5),
    "hot": replace(UNSEEDED, temperature=100, top_k=3, logprobs=2),
}


@pytest.mark.parametrize("place", [0, 7])
def test_a_seed_among_neighbours(model: fastdms.CompiledModel, seeded: list[int], place: int) -> None:
    kinds = list(NEIGHBOURS.values())
    requests = []
    for index in range(8):
        prompt, params = (PROMPT, SEEDED) if index == place else (tiny_tokens(5 + index), kinds[index % len(kinds)])
        requests.append(submit(model, prompt, params))
    drain(model, requests)
    assert requests[place].output_ids == seeded
    check_idle(model)


def test_a_seed_joining_late(weights, seeded: list[int]) -> None:
    """It waits for a row, and takes over the one that a neighbour leaves."""
    with compiled(weights, dms=MASKED, max_concurrency=3) as model:
        others = [submit(model, tiny_tokens(9 + i), replace(UNSEEDED, max_tokens=6 + 40 * (i > 0))) for i in range(3)]
        late = submit(model, PROMPT, SEEDED)
        engine_of(model).step()
        assert late.row is None
        drain(model, [late])
        assert not others[1].finished, "it ran on its own"
        assert late.output_ids == seeded
        drain(model, others)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40])
def test_a_seed_and_the_prefill_chunk(weights, seeded: list[int], chunk: int) -> None:
    with compiled(weights, dms=MASKED, prefill_chunk=chunk) as model:
        assert one(model(PROMPT, SEEDED)).token_ids == seeded
        assert [done.token_ids for done in many(model([PROMPT, PROMPT[:7], PROMPT], SEEDED))][::2] == [seeded, seeded]


def test_a_seed_that_is_preempted(weights, seeded: list[int]) -> None:
    """Twice in the middle of its text, an unseeded one too: what came out already stays."""
    with compiled(weights, dms=MASKED) as model:
        watch, engine = Watch(model), engine_of(model)
        requests = [submit(model, PROMPT, SEEDED), submit(model, tiny_tokens(6), UNSEEDED)]
        for at in (5, 20):
            while len(requests[0].output_ids) < at:
                engine.step()
            before = [list(request.output_ids) for request in requests]
            for request in engine.running:
                engine._starve(request, alone=False, lost_tokens=0)
            assert [request.row for request in requests] == [None, None]
            engine.step()
            assert [request.output_ids[:-1] for request in requests] == before
        drain(model, requests)
        assert watch.counts["starved while decoding"] == 4
        assert requests[0].output_ids == seeded
        check_idle(model)


def test_logprobs_are_of_the_raw_distribution(weights) -> None:
    """Neither temperature nor any filter, penalty or ban changes them; the chosen token is always among them."""
    assert MASKED is not None
    settings = [
        replace(GREEDY, logprobs=5),
        replace(SEEDED, logprobs=5, temperature=3),
        replace(SEEDED, logprobs=5, top_k=7, top_p=0.9, min_p=0.01),
        replace(SEEDED, logprobs=5, stop_token_ids=list(range(16)), min_tokens=32),
        replace(SEEDED, logprobs=0, temperature=5),
        replace(SEEDED, logprobs=5, presence_penalty=2, frequency_penalty=-2, repetition_penalty=1.5),
        replace(SEEDED, logprobs=20),
    ]
    outside = 0
    with compiled(weights, dms=MASKED) as model:
        for params in settings:
            done = one(model(PROMPT, params))
            assert done.logprobs is not None
            ids = PROMPT + done.token_ids
            expected = oracle.dms_logits(weights, ids, MASKED)[len(PROMPT) - 1 : -1].log_softmax(-1)
            for token, step, row in zip(done.token_ids, done.logprobs, expected, strict=True):
                top = row.topk(params.logprobs or 0).indices.tolist() if params.logprobs else []
                assert set(step) == {token, *top}
                outside += token not in top
                for i, logprob in step.items():
                    assert abs(logprob - float(row[i])) <= 2 * LOGITS_RELATIVE * float(row.abs().max())
                assert sum(map(math.exp, step.values())) <= 1 + 1e-5
        assert outside > 20
        assert one(model(PROMPT, SEEDED)).logprobs is None


def test_logprobs_of_a_whole_vocabulary_sum_to_one() -> None:
    with compiled(tiny_model("qwen3", vocab_size=20)) as model:
        done = one(model([3, 4, 5], replace(SEEDED, logprobs=20)))
    assert done.logprobs is not None
    for step in done.logprobs:
        assert sorted(step) == list(range(20))
        assert abs(sum(map(math.exp, step.values())) - 1) < 1e-5
        assert list(step.values()) == sorted(step.values(), reverse=True)


def test_min_tokens_bans_what_would_end_the_text(weights) -> None:
    """All that may end it: the config's id, the tokenizer's and the call's own."""
    likely = [token for token, _ in itertools.groupby(one(compiled(weights, dms="off")(PROMPT, GREEDY)).token_ids)]
    weights.config.eos_token_id, stops = likely[0], likely[1:6]
    try:
        with compiled(weights, dms="off", tokenizer=byte_level()) as model:
            eos = model._end_ids
            assert len(eos) == 2
            free = replace(GREEDY, ignore_eos=False, stop_token_ids=stops)
            assert one(model(PROMPT, free)).token_ids == likely[:1]
            for count in (1, 2, 9):
                done = one(model(PROMPT, replace(free, min_tokens=count)))
                assert not {*stops, *eos} & set(done.token_ids[:count])
                assert len(done.token_ids) >= count
            hot = replace(free, temperature=100, seed=1, max_tokens=200, stop_token_ids=list(range(250, 266)))
            for count in (0, 40):
                done = one(model(PROMPT, replace(hot, min_tokens=count)))
                ends = [i for i, token in enumerate(done.token_ids) if token in {*hot.stop_ids, *eos}]
                assert ends == [len(done.token_ids) - 1], "it ends with the first such token that is not banned"
                assert done.finish_reason == "stop"
                assert (len(done.token_ids) > 40) == (count == 40)
    finally:
        weights.config.eos_token_id = 2


def test_the_largest_min_tokens(weights) -> None:
    """Prompt and ``min_tokens`` together no longer fit the step's int32; the context ends the text all the same."""
    with compiled(weights, dms="off", max_context=len(PROMPT) + 8) as model:
        done = one(model(PROMPT, replace(GREEDY, ignore_eos=False, min_tokens=2**31, max_tokens=2**31)))
        assert (len(done.token_ids), done.finish_reason) == (8, "length")


def test_end_tokens_and_ignore_eos(weights) -> None:
    greedy = one(compiled(weights, dms=MASKED)(PROMPT, GREEDY)).token_ids
    end, stop = greedy[3], next(token for token in greedy[4:] if token not in greedy[:4])
    weights.config.eos_token_id = [end, 299]
    try:
        with compiled(weights, dms=MASKED) as model:
            ended = one(model(PROMPT, replace(GREEDY, ignore_eos=False)))
            assert (ended.token_ids, ended.finish_reason) == (greedy[: greedy.index(end) + 1], "stop")
            assert one(model(PROMPT, GREEDY)).token_ids == greedy
            stopped = one(model(PROMPT, replace(GREEDY, stop_token_ids=[stop])))
            assert (stopped.token_ids, stopped.finish_reason) == (greedy[: greedy.index(stop) + 1], "stop")
            last = one(model(PROMPT, replace(GREEDY, ignore_eos=False, max_tokens=greedy.index(end) + 1)))
            assert last.finish_reason == "stop", "an end token in the last place is a stop"
    finally:
        weights.config.eos_token_id = 2


def test_as_many_end_tokens_as_allowed_can_all_be_banned(weights) -> None:
    """16 of the model's and 16 of the call's fill the ban list; more of the model's are refused at once."""
    try:
        weights.config.eos_token_id = list(range(10, 25))  # and 2, from its generation config
        with compiled(weights, dms=MASKED) as model:
            assert len(model._end_ids) == 16
            stops = list(range(100, 116))
            params = replace(SEEDED, ignore_eos=False, stop_token_ids=stops, min_tokens=32, temperature=9)
            done = one(model(PROMPT, params))
            assert len(done.token_ids) == 32
            assert not set(done.token_ids) & {*model._end_ids, *stops}
        weights.config.eos_token_id = list(range(10, 26))
        with pytest.raises(ValueError, match="17 end-of-text ids; at most 16"):
            compiled(weights, dms=MASKED)
        # Ids that the model can't choose need no place, and must not be written to.
        weights.config.eos_token_id = [5, *range(1000, 1016)]
        with compiled(weights, dms=MASKED) as model:
            assert model._end_ids == {2, 5}
            assert len(one(model(PROMPT, replace(GREEDY, ignore_eos=False, min_tokens=32))).token_ids) == 32
    finally:
        weights.config.eos_token_id = 2


@pytest.mark.parametrize("room", [1, 5])
def test_the_context_ends_with_length(weights, room: int) -> None:
    with compiled(weights, dms=MASKED, max_context=len(PROMPT) + room) as model:
        Watch(model)
        done = one(model(PROMPT, replace(GREEDY, max_tokens=100)))
        assert (len(done.token_ids), done.finish_reason) == (room, "length")
        with pytest.raises(ValueError, match=rf"{len(PROMPT) + room} tokens; max_context {len(PROMPT) + room}"):
            model([*PROMPT, *PROMPT[:room]], GREEDY)
        assert model.score([*PROMPT, *PROMPT[:room]], 40).shape == (room + 1, VOCAB_SIZE)
        check_idle(model)


def test_no_two_unseeded_requests_are_alike(model: fastdms.CompiledModel) -> None:
    torch.manual_seed(0)
    first = many(model([PROMPT] * 4, UNSEEDED))
    torch.manual_seed(0)
    second = many(model([PROMPT] * 4, UNSEEDED))
    assert len({tuple(done.token_ids) for done in first + second}) == 8
