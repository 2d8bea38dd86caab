"""Prefill chunks that run before it is known whether the last found its pages, as on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from fastdms import DMSConfig
from fastdms.engine import Engine
from fastdms.request import Request
from fastdms.runner import ModelRunner, PrefillPiece
from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_tokens
from tests.running import Watch, check_idle, compiled, drain, engine_of, lone_runs, one, submit

MASKED = dms_config("nvidia", 7)
assert MASKED is not None
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [tiny_tokens(length, seed=length) for length in (400, 3)]


@pytest.mark.parametrize("ahead", [False, True])
def test_several_at_a_time_beside_a_row_that_decodes(weights: PreTrainedModel, ahead: bool) -> None:
    with compiled(weights, dms=MASKED, max_concurrency=2, max_context=512, prefill_chunk=16) as model:
        engine = engine_of(model)
        engine._run_ahead = ahead
        short = submit(model, PROMPTS[1], replace(GREEDY, max_tokens=40))
        engine.step()
        long = submit(model, PROMPTS[0], GREEDY)
        engine.step()
        while long.computed + 64 < 400:
            before, tokens = long.computed, len(short.output_ids)
            engine.step()
            assert long.computed - before == (64 if ahead else 16)
            assert len(short.output_ids) == tokens + 1, "a decode step after each turn"
        drain(model, [long, short])
        check_idle(model)
    alone = lone_runs(weights, {"masked": MASKED})
    assert [long.output_ids, short.output_ids[:12]] == alone("masked", PROMPTS, GREEDY)


@pytest.mark.parametrize(("ahead", "most"), [(False, 8192), (True, 8192), (True, 40), (True, 10)])
@pytest.mark.parametrize("rule", ["off", replace(MASKED, prefill="dense")], ids=["off", "dense"])
def test_a_dense_chunk_is_what_may_run_ahead_at_once(
    weights: PreTrainedModel, rule: DMSConfig | str, ahead: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a chunk may be that large; the tokens are those of any other chunk."""
    monkeypatch.setattr("fastdms.config._MOST_DENSE", most)
    sizes: list[int] = []
    prefill = ModelRunner.prefill

    def watched(runner: ModelRunner, pieces: Sequence[PrefillPiece]) -> torch.Tensor:
        sizes.extend(len(piece.token_ids) for piece in pieces if piece.dense_tokens)
        return prefill(runner, pieces)

    monkeypatch.setattr(ModelRunner, "prefill", watched)
    with compiled(weights, dms=rule, max_concurrency=2, max_context=512, prefill_chunk=16) as model:
        engine_of(model)._run_ahead = ahead
        requests = [submit(model, prompt, GREEDY) for prompt in PROMPTS]
        drain(model, requests)
        check_idle(model)
    size = min(64, max(16, most)) if ahead else 16
    beside = [3] if rule != "off" else []  # a prompt of three fills no chunk, but has to be dense
    assert sizes == [*[size] * (400 // size), *[400 % size] * (400 % size > 0), *beside]
    assert [request.output_ids for request in requests] == lone_runs(weights, {"rule": rule})("rule", PROMPTS, GREEDY)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pages", [9, 20])
def test_pages_that_run_out_among_them(
    weights: PreTrainedModel, pages: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was prefilled after that is lost with the row, and computed again once there is room, if ever there is."""
    assert MASKED is not None
    keeps_all = replace(MASKED, alpha_offset=1e6)  # but is thought to keep little
    starve, lost = Engine._starve, []

    def watched(engine: Engine, request: Request, alone: bool, lost_tokens: int) -> None:
        lost.append(lost_tokens)
        starve(engine, request, alone, lost_tokens)

    monkeypatch.setattr(Engine, "_starve", watched)
    prompts = [tiny_tokens(length, seed=length) for length in (200, 190)]  # 16 pages each
    with compiled(weights, dms=keeps_all, max_concurrency=2, pages=pages, prefill_chunk=16) as model:
        engine = engine_of(model)
        engine._run_ahead, engine._live_share = ahead, 0.0
        requests = [submit(model, prompt, GREEDY) for prompt in prompts]
        drain(model, requests)
        check_idle(model)
    assert (max(lost) > 16) == ahead
    if pages == 9:
        assert all("did not fit into 9 pages" in str(request.error) for request in requests)
        return
    with compiled(weights, dms=keeps_all, max_concurrency=1) as model:
        assert [request.output_ids for request in requests] == [one(model(p, GREEDY)).token_ids for p in prompts]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("rule", ["off", replace(MASKED, prefill="dense", alpha_offset=1e6)], ids=["off", "dense"])
def test_dense_chunks_that_find_no_page_or_are_cancelled_halfway(
    weights: PreTrainedModel, rule: DMSConfig | str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the row goes its history; the others, of which some find no page at first, give the tokens of lone runs."""
    monkeypatch.setattr("fastdms.config._MOST_DENSE", 64)
    prompts = [tiny_tokens(length, seed=length) for length in (150, 140, 130)]  # 12 pages each
    with compiled(weights, dms=rule, max_concurrency=3, pages=20, prefill_chunk=16) as model:
        watch, engine = Watch(model), engine_of(model)
        engine._run_ahead, engine._live_share = ahead, 0.0  # so that more are let in than there is room for
        gone, *requests = (submit(model, prompt, GREEDY) for prompt in [prompts[0], *prompts])
        engine.step()
        assert gone.computed == (64 if ahead else 16)
        assert engine.runner._histories
        engine.cancel(gone)
        assert not engine.runner._histories
        engine._live_share, engine._to_learn = 0.0, None  # it has told the engine better
        drain(model, requests)
        check_idle(model)
        assert not engine.runner._histories
    assert watch.counts["starved"]
    assert [request.output_ids for request in requests] == lone_runs(weights, {"rule": rule})("rule", prompts, GREEDY)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pages", [None, 20])
def test_prompts_that_are_all_prefilled_before_any_is_decoded(
    weights: PreTrainedModel, pages: int | None, ahead: bool
) -> None:
    """Those that fit: of four in 20 pages some wait, with those that were let in and found no page."""
    prompts = [tiny_tokens(length, seed=length) for length in (200, 90, 30, 190)]
    with compiled(weights, dms=MASKED, max_concurrency=4, pages=pages, prefill_chunk=16) as model:
        engine = engine_of(model)
        engine._run_ahead, engine._live_share = ahead, 0.0
        early = submit(model, PROMPTS[1], replace(GREEDY, max_tokens=4))
        engine.step()  # one is decoded already, and its step may be under way
        requests = [submit(model, prompt, GREEDY) for prompt in prompts]
        engine.prefill()
        assert len(early.output_ids) == 2
        running = [request for request in requests if request in engine.running]
        assert [len(request.output_ids) for request in running] == [1] * len(running)
        assert all(request.prefilled for request in running)
        assert len(running) == 3 if pages is None else 0 < len(running) < 3
        drain(model, [early, *requests])
        check_idle(model)
    alone = lone_runs(weights, {"masked": MASKED})
    assert [request.output_ids for request in requests] == alone("masked", prompts, GREEDY)
