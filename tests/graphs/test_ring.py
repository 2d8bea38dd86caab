"""The ring that tokens reach the host through: a step writes the next slot, and none before it was read."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fastdms
from fastdms.graphs import RING_SLOTS, GraphCache, RowInput, StepBuffers, StepOutput, send
from fastdms.runner import FirstTokens, Flight, PrefillPiece
from tests.graphs.toys import FakeRecorder, rows
from tests.models import dms_config, tiny_model, tiny_tokens
from tests.running import check_idle, compiled, engine_of

CPU = torch.device("cpu")
ROWS = 4
PHASES = [(3, 5), (1, 0), (4, 2), (2, 7), (2, 0), (1, 3), (4, 9)]  # rows, and steps more that they take by themselves
OPTIONS: dict[str, Any] = {"dms": dms_config("nvidia", 7), "max_concurrency": ROWS}


def slots_of(inputs: StepBuffers) -> StepOutput:
    """A step whose tokens are its slots; where row 0 is fed 99 it breaks off, having changed them."""
    outputs = inputs.slots.clone(), inputs.slots[:, None].float()
    inputs.slots.copy_((inputs.slots + 1) % RING_SLOTS)
    if int(inputs.tokens[0]) == 99:
        raise RuntimeError("broken off")
    return outputs


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_runs_take_the_slots_in_turn(mode: str, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever bucket, by themselves or told what to do; also where graphs are recorded anew in between."""
    monkeypatch.setattr("fastdms.graphs.cache.compile_step", lambda step, backend: step)
    graphs = GraphCache(slots_of, mode=mode, buckets=(1, 2, 4), device=CPU, memory_limit=limit,
                        recorder=FakeRecorder() if mode == "graphs" else None)  # fmt: skip
    graphs.warm_up()
    taken, runs = [], 0
    for phase, (count, more) in enumerate(PHASES):
        if phase in (2, 4):
            with pytest.raises(RuntimeError, match="broken off"):
                graphs.run(rows(count, token=99))
        for given in (rows(count), *[None] * more):
            slot = graphs.slot
            tokens, _ = graphs.run_on() if given is None else graphs.run(given)
            assert tokens.tolist() == [slot] * count
            taken.append(slot)
            runs += 1
    assert taken == [n % RING_SLOTS for n in range(runs)]


def test_what_is_sent_from_another_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may be on any: the event stands behind the copy, in the stream of the numbers' own device."""
    told: list[Any] = []
    on_host = types.SimpleNamespace(copy_=lambda x, **how: told.append(("copy", x, how)), tolist=lambda: [3])
    event = types.SimpleNamespace(
        record=lambda stream=None: told.append(("record", stream)), synchronize=lambda: told.append("wait")
    )
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: on_host)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    x: Any = types.SimpleNamespace(device=torch.device("cuda:1"))
    assert send(x).read() == [3]
    assert told == [("copy", x, {"non_blocking": True}), ("record", ("stream of", x.device)), "wait"]


def landed(model: fastdms.CompiledModel, under_way: int, *, repeats: int = 1, late: bool = False) -> list[list[int]]:
    """The tokens of each step, read when ``under_way`` more have been started; ``late``: copies wait now and then."""
    engine = engine_of(model)
    runner, taken = engine.runner, engine.take_rows(ROWS)
    stored = [20 + row for row in taken]
    for row, length in zip(taken, stored, strict=True):
        runner.prefill([PrefillPiece(row=row, token_ids=tiny_tokens(length, seed=row), start=0)])
    flights: deque[Flight] = deque()
    out: list[list[int]] = []
    for phase, (count, more) in enumerate(PHASES * repeats):
        inputs = [
            RowInput(row=row, token=5 + phase, position=length, temperature=1.0, seed=row)
            for row, length in zip(taken[:count], stored, strict=False)
        ]
        for given in (inputs, *[None] * more):
            if late and len(out) % 3 == 0:
                with torch.cuda.stream(runner._ring._stream):
                    torch.cuda._sleep(3_000_000)  # cycles: longer than a few steps
            flights.append(runner.decode(given))
            if len(flights) > under_way:
                out.append(flights.popleft().land())
        stored[:count] = [length + 1 + more for length in stored[:count]]
    out += [flight.land() for flight in flights]
    engine.return_rows(taken)
    check_idle(model)
    return out


def test_steps_leave_their_tokens_slot_by_slot() -> None:
    with compiled(tiny_model("qwen3"), **OPTIONS) as model:
        runner, slots, ran = engine_of(model).runner, [], []
        decode, run = runner.decode, runner.graphs._run
        runner.graphs._run = lambda *args: ran.append(run(*args)) or ran[-1]  # type: ignore[method-assign,func-returns-value]

        def seen(inputs: Sequence[RowInput] | None, first: FirstTokens | None = None) -> Flight:
            slots.append(runner.graphs.slot)
            flight = decode(inputs, first)
            assert ran[-1][0].tolist() == flight.land()
            return flight

        runner.decode = seen  # type: ignore[method-assign]
        tokens = landed(model, 0)
        assert slots == [n % RING_SLOTS for n in range(len(tokens))]
    assert [len(step) for step in tokens] == [count for count, more in PHASES for _ in range(1 + more)]
    assert len({token for step in tokens for token in step}) > 20, "a mistake would not show"


@pytest.mark.parametrize("under_way", [1, RING_SLOTS - 1, RING_SLOTS, 99])
def test_no_slot_is_written_before_it_was_read(under_way: int) -> None:
    """However late a step's tokens are asked for."""
    with compiled(tiny_model("qwen3"), **OPTIONS) as model:
        assert landed(model, under_way) == landed(model, 0)


def test_the_ring_hides_no_tensor_of_the_cache_from_the_debug_check() -> None:
    with compiled(tiny_model("qwen3"), **OPTIONS) as model:
        engine = engine_of(model)
        watched = {id(tensor) for tensor in engine.runner.graphs._state().values()}
        own = {name: x for name, x in vars(engine.cache).items() if isinstance(x, torch.Tensor)}
        assert {name for name, x in own.items() if id(x) not in watched} == set()
        assert len(own) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("under_way", [0, 1, RING_SLOTS - 1, RING_SLOTS, 99])
def test_replays_with_steps_under_way_give_the_tokens_of_eager(under_way: int, late: bool) -> None:
    options = OPTIONS | {"device": "cuda", "dtype": "fp32", "kv_dtype": "fp32", "max_context": 512}
    with compiled(tiny_model("qwen3"), **options, mode="eager") as eager:
        expected = landed(eager, 0, repeats=10)
    with compiled(tiny_model("qwen3"), **options, mode="graphs") as model:
        assert landed(model, under_way, repeats=10, late=late) == expected
