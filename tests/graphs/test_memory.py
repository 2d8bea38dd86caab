"""Which graphs are held under a memory limit, what is counted, and that a moved tensor is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdms.graphs import GraphCache, StepBuffers, StepOutput
from fastdms.graphs.capture import Recording
from tests.graphs.toys import FakeRecorder, rows

CPU = torch.device("cpu")
BUCKETS = (1, 2, 4)


def step(inputs: StepBuffers) -> StepOutput:
    return inputs.tokens + inputs.positions, inputs.seeds[:, None].float()


def recorded(recorder: FakeRecorder, **given: Any) -> GraphCache:
    options: dict[str, Any] = {"buckets": BUCKETS, "device": CPU, "backend": "eager"} | given
    graphs = GraphCache(step, mode="graphs", recorder=recorder, **options)
    graphs.warm_up()
    return graphs


def test_without_a_limit_every_graph_is_captured_once_largest_first() -> None:
    recorder = FakeRecorder()
    graphs = recorded(recorder)
    for count in (1, 3, 4, 2, 1):
        tokens, logits = graphs.run(rows(count, token=10 * count))
        assert tokens.tolist() == [10 * count + 2 * n for n in range(count)]
        assert logits.shape == (count, 1)
    assert recorder.recorded == [4, 2, 1]
    assert recorder.warmed == 3
    stats = graphs.stats()
    assert isinstance(stats.pop("seconds"), dict)
    assert all(stats.pop(f"{part}_seconds") > 0 for part in ("trace", "compile", "capture"))
    assert stats == {
        "mode": "graphs", "buckets": BUCKETS, "compiles": 3, "recompiles": 0, "captures": 3, "hits": 5, "misses": 0,
        "evictions": 0, "pool_bytes": 1000, "artifacts": "off", "chunks": None, "runs": {1: 2, 2: 1, 4: 2},
        "padded_rows": {1: 0, 2: 0, 4: 1}, "bucket_captures": {1: 1, 2: 1, 4: 1}, "bytes": {1: 100, 2: 200, 4: 400},
    }  # fmt: skip


def test_the_least_recently_used_graph_goes_and_comes_back() -> None:
    recorder = FakeRecorder()
    graphs = recorded(recorder, memory_limit=600)
    assert graphs.stats()["bytes"] == {1: 100, 2: 200}, "4, 2, 1 were captured: the first must go for the last"
    graphs.run(rows(2))
    graphs.run(rows(1))
    assert graphs.run(rows(4, token=7))[0].tolist() == [7, 9, 11, 13]
    assert graphs.stats()["bytes"] == {1: 100, 4: 400}, "2 was used before 1"
    graphs.run(rows(1))
    graphs.run(rows(2))
    assert graphs.stats()["bytes"] == {1: 100, 2: 200}
    stats = graphs.stats()
    assert recorder.recorded == [4, 2, 1, 4, 2]
    assert (stats["hits"], stats["misses"], stats["evictions"]) == (3, 2, 3)
    assert stats["bucket_captures"] == {1: 1, 2: 2, 4: 2}
    assert stats["compiles"] == recorder.warmed == 3, "coming back is capturing, not compiling"
    assert stats["recompiles"] == 0


def test_room_is_made_before_a_graph_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is known by then, so the limit is kept even while it is captured."""
    recorder = FakeRecorder()
    graphs = recorded(recorder, memory_limit=400)
    record = recorder.record
    beside = []

    def watched(run: Callable[[], StepOutput]) -> Recording:
        beside.append(graphs.stats()["bytes"])
        return record(run)

    monkeypatch.setattr(recorder, "record", watched)
    for count in (4, 1, 2):
        graphs.run(rows(count))
    assert beside == [{}, {}, {1: 100}]


@pytest.mark.parametrize("limit", [0, 99, 399])
def test_a_graph_above_the_limit_is_held_alone(limit: int) -> None:
    graphs = recorded(FakeRecorder(), memory_limit=limit)
    for count in (4, 1, 4):
        assert graphs.run(rows(count))[0].shape == (count,)
    assert graphs.stats()["bytes"] == {4: 400}


def test_refused_limits() -> None:
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes, at least 0, got -1"):
        recorded(FakeRecorder(), memory_limit=-1)


@given(
    sizes=st.tuples(*[st.integers(0, 50)] * 3),
    limit=st.integers(0, 120),
    counts=st.lists(st.integers(1, 4), max_size=30),
)
def test_any_order_of_runs(sizes: tuple[int, ...], limit: int, counts: list[int]) -> None:
    """Against a plain list, most recently used last."""
    by_bucket = dict(zip(BUCKETS, sizes, strict=True))
    recorder = FakeRecorder(lambda bucket: by_bucket[bucket])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdms.graphs.cache.compile_step", lambda step, backend: step)
        graphs = recorded(recorder, memory_limit=limit)
    held: list[int] = []
    captured = []
    for bucket in [4, 2, 1, *(1 << (count - 1).bit_length() for count in counts)]:
        if bucket in held:
            held.remove(bucket)
        else:
            captured.append(bucket)
            while held and by_bucket[bucket] + sum(by_bucket[other] for other in held) > limit:
                held.pop(0)
        held.append(bucket)
    for count in counts:
        assert graphs.run(rows(count, token=count))[0].tolist() == [count + 2 * n for n in range(count)]
    assert recorder.recorded == captured
    stats = graphs.stats()
    assert stats["bytes"] == {bucket: by_bucket[bucket] for bucket in BUCKETS if bucket in held}
    assert stats["captures"] == len(captured) == stats["misses"] + 3
    assert stats["hits"] + stats["misses"] == len(counts)
    assert stats["evictions"] == len(captured) - len(held)


def test_a_moved_tensor_is_noticed_before_the_replay() -> None:
    state = {"k_pages": torch.zeros(3), "weight": torch.zeros(2)}
    calls = []

    def counted(inputs: StepBuffers) -> StepOutput:
        calls.append(1)
        return step(inputs)

    graphs = GraphCache(
        counted, mode="graphs", buckets=(1,), device=CPU, backend="eager", recorder=FakeRecorder(), debug=True,
        state=lambda: state,
    )  # fmt: skip
    graphs.warm_up()
    graphs.run(rows(1))
    state["k_pages"].fill_(1)
    graphs.run(rows(1))
    kept = state["k_pages"]
    state["k_pages"] = kept.clone()
    with pytest.raises(AssertionError, match=r"since bucket 1 was captured, these moved: k_pages$"):
        graphs.run(rows(1))
    del state["k_pages"]
    with pytest.raises(AssertionError, match="k_pages"):
        graphs.run(rows(1))
    state["k_pages"] = kept
    graphs.run(rows(1))


def test_a_moved_buffer_is_noticed() -> None:
    graphs = recorded(FakeRecorder(), debug=True)
    bucket = graphs._buckets[2]
    bucket.inputs = bucket.inputs._replace(top_k=bucket.inputs.top_k.clone())
    graphs.run(rows(1))
    with pytest.raises(AssertionError, match=r"since bucket 2 was captured, these moved: top_k$"):
        graphs.run(rows(2))


def test_without_debugging_nobody_asks_for_the_state() -> None:
    def never() -> dict[str, torch.Tensor]:
        raise RuntimeError("asked for")

    assert recorded(FakeRecorder(), state=never).run(rows(1))[0].tolist() == [0]


def test_the_report() -> None:
    graphs = recorded(FakeRecorder(lambda bucket: bucket * 2**20), memory_limit=6 * 2**20)
    for count in (1, 3, 3, 4, 3):
        graphs.run(rows(count))
    lines = graphs.report().splitlines()
    assert lines[0].split() == ["bucket", "captures", "replays", "padded", "rows", "MiB", "kept", "seconds"]
    assert [line.split()[:-1] for line in lines[1:4]] == [
        ["1", "1", "1", "0.0%", "1.0"],
        ["2", "1", "0", "0.0%", "-"],
        ["4", "2", "4", "18.8%", "4.0"],
    ]
    assert lines[4] == "mode graphs: 3 compiles, 0 of them after start; artifacts off"
    assert lines[5] == "4 hits, 1 misses, 2 evictions; shared pool 0.0 MiB"
    assert len({len(line) for line in lines[:4]}) == 1


def test_a_closed_cache_says_so() -> None:
    graphs = recorded(FakeRecorder())
    graphs.run(rows(1))
    graphs.close()
    with pytest.raises(ValueError, match="this graph cache is closed"):
        graphs.run(rows(1))
    assert graphs.stats()["runs"] == {1: 1, 2: 0, 4: 0}
    assert graphs.stats()["bytes"] == {}


def test_no_step_goes_on_after_its_graph_was_made_anew() -> None:
    """That has filled the buffers with padding."""
    graphs = recorded(FakeRecorder())
    graphs.run(rows(2))
    graphs._entries.clear()
    with pytest.raises(AssertionError):
        graphs.run_on()
    assert graphs.run(rows(2, token=7))[0].tolist() == [7, 9]
    assert len(graphs.run_on()[0]) == 2
