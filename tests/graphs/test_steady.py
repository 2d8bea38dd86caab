"""Serving after start: rows join and leave, and nothing is compiled; nor where graphs come and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fastdms
from fastdms.graphs import GraphCache
from fastdms.runner import _state, inference
from fastdms.sampling_params import SamplingParams
from tests.graphs.toys import FakeRecorder
from tests.models import dms_config, tiny_model, tiny_tokens
from tests.running import check_idle, compiled, drain, engine_of, one, submit

STEPS = 50
OPTIONS: dict[str, Any] = {"dms": dms_config("nvidia", 7), "max_concurrency": 4}
PROMPTS = [tiny_tokens(length, seed=length) for length in (1, 63, 64, 65, 7, 30)]
LENGTHS = [5, 40, 12, 25, 3, 33]


def params(n: int) -> SamplingParams:
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": n} if n % 2 else {"temperature": 0}
    if n % 3:
        drawn |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
    return SamplingParams(**drawn, max_tokens=LENGTHS[n], ignore_eos=True)


def with_graphs(**given: Any) -> fastdms.CompiledModel:
    """A model whose decode step runs in a graph cache of these options."""
    model = compiled(tiny_model("qwen3"), **OPTIONS)
    runner = engine_of(model).runner
    step = runner.graphs._step
    assert step is not None
    runner.graphs = GraphCache(
        step, buckets=(1, 2, 4), device=torch.device("cpu"), backend="aot_eager", debug=True,
        state=lambda: _state(runner.decoder, runner.cache), **given,
    )  # fmt: skip
    with inference(runner.device):
        runner.graphs.warm_up()
    check_idle(model)
    return model


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with compiled(tiny_model("qwen3"), **OPTIONS) as model:
        return [one(model(prompt, params(n))).token_ids for n, prompt in enumerate(PROMPTS)]


def serve(model: fastdms.CompiledModel) -> list[list[int]]:
    """The requests join one by one, some steps apart, and leave as they end."""
    requests = []
    for n, prompt in enumerate(PROMPTS):
        requests.append(submit(model, prompt, params(n)))
        for _ in range(4):
            engine_of(model).step()
    drain(model, requests)
    check_idle(model)
    return [request.output_ids for request in requests]


def test_rows_that_join_and_leave_compile_nothing(alone: list[list[int]]) -> None:
    with with_graphs(mode="compile") as model:
        before, traced = model.graphs.stats(), counters["stats"]["unique_graphs"]
        assert before["compiles"] == 3
        assert serve(model) == alone
        after = model.graphs.stats()
        assert sum(after["runs"].values()) >= STEPS
        assert all(after["runs"].values())
        assert (after["compiles"], after["recompiles"], after["misses"]) == (3, 0, 0)
        assert counters["stats"]["unique_graphs"] == traced


@pytest.mark.parametrize("limit", [None, 500, 100])
def test_graphs_that_come_and_go_change_no_token(alone: list[list[int]], limit: int | None) -> None:
    """All of three are held, or two, or one."""
    recorder = FakeRecorder()
    with with_graphs(mode="graphs", recorder=recorder, memory_limit=limit) as model:
        assert serve(model) == alone
        stats = model.graphs.stats()
        assert sum(stats["runs"].values()) >= STEPS
        assert (stats["compiles"], stats["recompiles"]) == (3, 0)
        assert stats["captures"] == len(recorder.recorded) == 3 + stats["misses"]
        assert (stats["misses"] == 0) == (limit is None)
        assert len(stats["bytes"]) <= {None: 3, 500: 2, 100: 1}[limit]


def test_a_pool_that_was_moved_is_noticed() -> None:
    """A cache tensor that is replaced leaves the graphs writing into memory which belongs to somebody else."""
    with with_graphs(mode="graphs", recorder=FakeRecorder()) as model:
        cache = engine_of(model).cache
        cache.k_pages = cache.k_pages.clone()
        with pytest.raises(AssertionError, match=r"these moved: k_pages$"):
            model(PROMPTS[0], replace(params(0), max_tokens=3))
