"""Rows that join and leave, pages that run out, and steps that are broken off: the tokens stay those of a lone run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import fastdms
from fastdms.engine import Engine
from fastdms.request import Request
from fastdms.runner import ModelRunner
from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_model, tiny_tokens
from tests.running import Alone, Watch, check_idle, compiled, drain, engine_of, lone_runs, many, one, submit

MASKED = dms_config("nvidia", 7)
assert MASKED is not None
RULES: dict[str, Any] = {"masked": MASKED, "dense": replace(MASKED, prefill="dense"), "off": "off"}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=11, max_tokens=12, ignore_eos=True)

# More than there are rows, and around page edges.
LENGTHS = (1, 64, 40, 130, 2, 63, 90)
PROMPTS = [tiny_tokens(length, seed=length) for length in LENGTHS]


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["settled", "ahead"])
def run_ahead(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Everything here once as on a CPU, and once as on a GPU, where a step starts before the last one is read."""
    make = Engine.__init__

    def made(self: Engine, runner: ModelRunner, **options: Any) -> None:
        make(self, runner, **options | {"run_ahead": request.param})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", made)
        yield request.param


@pytest.fixture(scope="module")
def alone(weights: PreTrainedModel) -> Alone:
    return lone_runs(weights, RULES)


def test_the_tokens_vary(alone: Alone) -> None:
    """Else a mistake would not show in them."""
    for params in (GREEDY, SEEDED):
        masked, dense, off = (alone(rule, PROMPTS, replace(params, max_tokens=16)) for rule in RULES)
        assert all(len(set(ids)) > 8 for ids in (*masked, *dense, *off))
        assert masked != dense != off


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_gives_what_single_calls_give(weights, alone, rule: str, params: SamplingParams) -> None:
    for rows, chunk in ((1, 50), (3, 17), (16, 2048)):
        with compiled(weights, dms=RULES[rule], max_concurrency=rows, prefill_chunk=chunk) as model:
            watch = Watch(model)
            completions = many(model(PROMPTS, params))
            check_idle(model)
        assert [done.token_ids for done in completions] == alone(rule, PROMPTS, params)
        assert [done.prompt_tokens for done in completions] == list(LENGTHS)
        assert watch.most_rows == min(rows, len(PROMPTS))


def test_rows_join_and_leave_one_by_one(weights, alone) -> None:
    """Requests of other lengths, arriving at other steps, each in the row of one that has just left."""
    with compiled(weights, dms=MASKED, max_concurrency=3) as model:
        watch = Watch(model)
        requests: list[Request] = []
        for index, prompt in enumerate(PROMPTS):
            params = GREEDY if index % 2 else SEEDED
            requests.append(submit(model, prompt, replace(params, max_tokens=1 + 3 * (index % 4))))
            for _ in range(index % 3):
                engine_of(model).step()
        drain(model, requests)
        check_idle(model)
    for index, request in enumerate(requests):
        expected = alone("masked", PROMPTS, GREEDY if index % 2 else SEEDED)[index]
        assert request.output_ids == expected[: 1 + 3 * (index % 4)]
        assert request.finish_reason == "length"
    assert watch.most_rows == 3
    assert watch.admitted == requests, "not admitted in order of arrival"


def test_a_request_in_need_of_pages_is_not_overtaken(weights) -> None:
    """The long second request waits for the first to end; the short third one, which would fit, waits behind it."""
    with compiled(weights, dms="off", max_concurrency=3, pages=16) as model:
        watch = Watch(model)
        lengths = (60, 150, 3)  # at 4 spans: 4 pages, 12 and 4
        requests = [submit(model, tiny_tokens(length), GREEDY) for length in lengths]
        engine_of(model).step()
        assert engine_of(model).running == requests[:1]
        drain(model, requests)
        check_idle(model)
    assert watch.admitted == requests
    assert watch.counts["starved"] == 0, "admission let in more than there was room for"


def test_a_pool_for_every_row_serves_every_row(weights) -> None:
    """By default there are pages for all rows in full: no reserve keeps prompts of full length waiting."""
    with compiled(weights, dms="off", max_context=128, max_concurrency=3) as model:
        watch = Watch(model)
        for length, new in ((120, 8), (127, 1), (64, 64)):
            requests = [submit(model, tiny_tokens(length), replace(GREEDY, max_tokens=new)) for _ in range(3)]
            engine_of(model).step()
            assert all(request.row is not None or request.finished for request in requests)
            drain(model, requests)
            check_idle(model)
    assert watch.counts["starved"] == 0


@pytest.mark.parametrize("chunk", [100, 2048])
@pytest.mark.parametrize("rule", RULES)
def test_rows_starved_in_prefill_are_recomputed(weights, alone, rule: str, chunk: int) -> None:
    """Long prompts that were taken for short ones: the pool holds any one of them, and not two."""
    prompts = [tiny_tokens(length, seed=length) for length in (300, 280, 290, 20)]
    for params in (GREEDY, SEEDED):
        with compiled(
            weights, dms=RULES[rule], max_context=512, max_concurrency=3, pages=28, prefill_chunk=chunk
        ) as model:
            watch = Watch(model)
            engine_of(model)._live_share = 0.1  # as if learned from what compresses well
            completions = many(model(prompts, params))
            check_idle(model)
        assert [done.token_ids for done in completions] == alone(rule, prompts, params)
        assert watch.counts["starved"] > 0
        assert watch.most_rows > 1


@pytest.mark.parametrize("rule", RULES)
def test_rows_starved_while_decoding_are_recomputed(weights, alone, rule: str) -> None:
    """Rows that fitted when they came, and no longer do as their answers grow."""
    lengths = (40, 60, 50) if rule == "off" else (90, 110, 100)  # less than a page in each span, as about half is kept
    prompts = [tiny_tokens(length, seed=length) for length in lengths]
    params = replace(SEEDED if rule == "off" else GREEDY, max_tokens=45)
    pages = 16 if rule == "off" else 12
    with compiled(weights, dms=RULES[rule], max_concurrency=4, pages=pages, prefill_chunk=37) as model:
        watch = Watch(model)
        engine = engine_of(model)
        engine._pages_to_spare = lambda: int(engine.cache.num_free)  # type: ignore[method-assign]  # no reserve
        completions = many(model(prompts, replace(params, logprobs=3)))
        check_idle(model)
    assert [done.token_ids for done in completions] == alone(rule, prompts, params)
    assert watch.counts["starved while decoding"] > 0
    for done in completions:
        assert done.logprobs is not None
        assert len(done.logprobs) == len(done.token_ids) == 45
        assert all(token in step for token, step in zip(done.token_ids, done.logprobs, strict=True))


@pytest.mark.parametrize("how", ["starve", "stop", "cancel"])
def test_pages_that_come_free_a_step_too_late(weights, alone, how: str) -> None:
    """A row that finds no page while another, which leaves in that moment, still holds its own is not the only one."""
    params, prompts = replace(GREEDY, max_tokens=80), [tiny_tokens(50, seed=1), tiny_tokens(62, seed=2)]
    first, second = alone("off", prompts, params)
    with compiled(weights, dms="off", max_concurrency=2, pages=16) as model:
        watch = Watch(model)
        for k in range(65, 66 if how == "starve" else 69):  # the second row is due its third page with token 67
            if how == "stop" and first[k] in first[:k]:
                continue
            other = submit(model, prompts[0], replace(params, stop_token_ids=[first[k]] if how == "stop" else []))
            last = submit(model, prompts[1], params)
            if how == "cancel":
                for _ in range(k):
                    engine_of(model).step()
                engine_of(model).cancel(other)
            drain(model, [last] if how == "cancel" else [other, last])
            assert (last.finish_reason, last.output_ids) == ("length", second)
            check_idle(model)
        assert watch.counts["starved while decoding"] > 0


def test_a_cancelled_request_leaves_even_if_that_is_broken_off(weights, monkeypatch) -> None:
    with compiled(weights, dms="off", max_concurrency=2) as model:
        engine = engine_of(model)
        expected = one(model(PROMPTS[2], GREEDY)).token_ids
        requests = [submit(model, PROMPTS[n], GREEDY) for n in (1, 2)]
        for _ in range(4):
            engine.step()

        def interrupted(rows: list[int]) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "release", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.cancel(requests[0])
        drain(model, [requests[1]])
        assert requests[1].output_ids == expected
        check_idle(model)


def test_rows_that_starve_each_other_come_to_an_end() -> None:
    """Both prompts find no page in the same chunk, with pages left over, and each would have fitted alone."""
    weights = tiny_model("qwen3", max_position_embeddings=2048)
    prompts = [tiny_tokens(1200, seed=1), tiny_tokens(1200, seed=2)]  # 19 pages in each of 4 spans
    params = replace(GREEDY, max_tokens=4)
    options: dict[str, Any] = {"dms": "off", "max_context": 2048, "max_concurrency": 2}
    with compiled(weights, **options, pages=94, prefill_chunk=4096) as model:
        watch = Watch(model)
        engine_of(model)._live_share = 0.5  # expects 40 pages of each
        requests = [submit(model, prompt, params) for prompt in prompts]
        engine_of(model).step()
        assert watch.counts["starved"] == 2
        for _ in range(20):
            engine_of(model).step()
        assert all(request.finished for request in requests), "they starve each other again and again"
        check_idle(model)
    with compiled(weights, **options) as model:
        assert [request.output_ids for request in requests] == [
            one(model(prompt, params)).token_ids for prompt in prompts
        ]


def test_a_starved_request_comes_before_later_ones(weights) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=2) as model:
        engine = engine_of(model)
        first, second, third, fourth = (submit(model, [5 + n], GREEDY) for n in range(4))
        engine.step()
        assert engine.running == [first, second]
        for request in (second, first):
            engine._starve(request, alone=False, lost_tokens=0)
        assert engine._waiting == [first, second, third, fourth]
        engine.step()
        assert engine.running == [first, second]
        drain(model, [first, second, third, fourth])
        check_idle(model)


@pytest.mark.parametrize("rule", RULES)
def test_alone_and_without_pages(weights, alone, rule: str) -> None:
    """The text so far, and then a model that works as before."""
    prompt, params = tiny_tokens(60 if rule == "off" else 110), replace(SEEDED, max_tokens=80)
    (full,) = alone(rule, [prompt], params)
    with compiled(weights, dms=RULES[rule], max_concurrency=2, pages=7) as model:
        watch = Watch(model)
        for _ in range(2):
            done = one(model(prompt, params))
            assert done.finish_reason == "kv_full"
            assert 1 < len(done.token_ids) < len(full)
            assert done.token_ids == full[: len(done.token_ids)]
            assert done.kv.tokens == len(prompt) + len(done.token_ids), "the last one too was seen by some spans"
            assert done.kv.live_tokens.max() <= done.kv.tokens
            assert done.kv.bytes_in_use > 0
            check_idle(model)
        pieces = list(model.stream(prompt, params))
        assert [token for piece in pieces for token in piece.token_ids] == done.token_ids
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["kv_full"]
        assert one(model([5, 6, 7], GREEDY)).finish_reason == "length"
        check_idle(model)
    assert watch.counts["starved"] >= 3


@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize("rule", ["dense", "off"])
def test_a_prompt_that_does_not_fit(weights, rule: str, chunk: int) -> None:
    with compiled(weights, dms=RULES[rule], max_concurrency=2, pages=7, prefill_chunk=chunk) as model:
        Watch(model)
        short = submit(model, [5, 6, 7], GREEDY)
        with pytest.raises(ValueError, match=r"kv_memory is too small: a prompt of 200 tokens .* 7 pages"):
            model(tiny_tokens(200), GREEDY)
        assert engine_of(model).running in ([], [short]), "what ran beside it still does"
        with pytest.raises(ValueError, match="kv_memory is too small"):
            list(model.stream(tiny_tokens(200), GREEDY))
        for prompt_len in (150, 20):  # the prompt, and what comes after it
            with pytest.raises(ValueError, match=r"kv_memory is too small .* all 7 pages are taken"):
                model.score(tiny_tokens(200), prompt_len)
        drain(model, [short])
        assert short.output_ids == one(model([5, 6, 7], GREEDY)).token_ids
        check_idle(model)


PLACES = {
    "half a prefill": lambda model: (engine_of(model).runner.decoder.layers[1], "prefill"),
    "half a decode step": lambda model: (engine_of(model).runner.decoder.layers[1], "decode"),
    "sampling": lambda model: (engine_of(model).runner, "sample"),
    "release": lambda model: (engine_of(model).runner, "release"),
    "accepting": lambda model: (Request, "accept"),
    "a dense prefill's memory": lambda model: (engine_of(model).runner, "new_history"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_broken_off_leaves_nothing_held(weights, alone, monkeypatch, rule: str, place: str) -> None:
    """Ctrl-C in a call: its own requests are gone, an open stream goes on as if nothing had happened."""
    allocates = place == "a dense prefill's memory"
    if allocates and rule == "masked":
        pytest.skip("nothing is prefilled densely")
    with compiled(weights, dms=RULES[rule], max_concurrency=3, prefill_chunk=50) as model:
        Watch(model)
        long = replace(SEEDED, max_tokens=40)
        (expected,) = alone(rule, [PROMPTS[3]], long)
        stream = model.stream(PROMPTS[3], long)
        tokens = [token for _ in range(4) for token in next(stream).token_ids]
        other = submit(model, PROMPTS[1], SEEDED)
        owner, name = PLACES[place](model)
        original, calls = getattr(owner, name), 0

        def interrupted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (1 if allocates else 2):  # the first to be prefilled is ``other``
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(PROMPTS[:5], GREEDY)
        engine = engine_of(model)
        left = [*engine.running, *engine._waiting]
        assert all(request is other or request.params is long for request in left), (
            "the call's requests are still there"
        )
        assert (other in left) != other.finished
        done = many(model(PROMPTS[:5], GREEDY))
        assert [completion.token_ids for completion in done] == alone(rule, PROMPTS, GREEDY)[:5]
        tokens += [token for piece in stream for token in piece.token_ids]
        assert tokens == expected
        assert other.output_ids == alone(rule, PROMPTS, SEEDED)[1]
        check_idle(model)


HISTORY_PROMPTS = [tiny_tokens(length, seed=length) for length in (300, 250, 64, 1, 20)]


@pytest.fixture(scope="module")
def small_pool(weights, alone, run_ahead) -> tuple[fastdms.CompiledModel, Watch, dict[SamplingParams, list[list[int]]]]:
    """Three rows over a pool that holds any one of ``HISTORY_PROMPTS``, and always expects little of them."""
    expected = {params: alone("masked", HISTORY_PROMPTS, params) for params in (GREEDY, SEEDED)}
    model = compiled(weights, dms=MASKED, max_context=512, max_concurrency=3, pages=20, prefill_chunk=128)
    engine = engine_of(model)
    engine._live_share = 0.0
    engine._learn = lambda request: None  # type: ignore[method-assign]
    return model, Watch(model), expected


arrive = st.tuples(st.just("arrive"), st.integers(0, len(HISTORY_PROMPTS) - 1), st.integers(1, GREEDY.max_tokens))
cancel = st.tuples(st.just("cancel"), st.integers(0, 11), st.just(0))
step = st.tuples(st.just("step"), st.integers(1, 6), st.just(0))


@settings(max_examples=40)
@given(st.lists(st.one_of(arrive, arrive, cancel, step), min_size=1, max_size=20), st.sampled_from([GREEDY, SEEDED]))
@example([("arrive", 0, 12), ("arrive", 1, 12), ("arrive", 0, 9), ("step", 4, 0), ("cancel", 1, 0)], GREEDY)
def test_any_history(small_pool, history, params: SamplingParams) -> None:
    """Whatever arrives and is cancelled, each request that finishes has the tokens of its run alone."""
    model, watch, expected = small_pool
    engine = engine_of(model)
    watch.counts.clear()
    requests: list[tuple[Request, list[int]]] = []
    cancelled: list[Request] = []
    for kind, number, limit in history:
        if kind == "arrive":
            request = submit(model, HISTORY_PROMPTS[number], replace(params, max_tokens=limit))
            requests.append((request, expected[params][number][:limit]))
        elif kind == "step":
            for _ in range(number):
                engine.step()
        elif number < len(requests):
            engine.cancel(requests[number][0])
            cancelled.append(requests[number][0])
    drain(model, [request for request, _ in requests if request not in cancelled])
    check_idle(model)
    for request, tokens in requests:
        assert request.finished or request in cancelled
        if request.finished:
            assert request.output_ids == tokens
            assert request.finish_reason == "length"
        assert request.output_ids == tokens[: len(request.output_ids)]


def test_the_pool_of_any_history_starves_rows(small_pool) -> None:
    model, watch, expected = small_pool
    watch.counts.clear()
    completions = many(model(HISTORY_PROMPTS, GREEDY))
    assert [done.token_ids for done in completions] == expected[GREEDY]
    assert watch.counts["starved"] > 0
    assert watch.most_rows > 1
