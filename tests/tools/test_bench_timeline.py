"""The timeline of ``fastdms bench profile``: which step is shown, what is idle, and whose layer a launch is."""

from __future__ import annotations

import importlib

import pytest

from fastdms.tools.bench import timeline
from fastdms.tools.bench.timeline import Launch, layers_of, median_step

APPEND, ATTEND, SAMPLE = "_decode_append_kernel", "_decode_attention_kernel", "_draw_kernel"


def _steps(*lengths: float) -> list[Launch]:
    """Steps of a copy and a sample; ``lengths``: from the end of one step to the end of the next."""
    launches, now = [], 0.0
    for length in lengths:
        launches += [Launch("copy", now + 2, now + 3), Launch(SAMPLE, now + 4, now + length)]
        now += length
    return launches


def test_the_median_of_the_whole_steps_is_shown() -> None:
    launches = _steps(99, 12, 30, 8, 16)  # the first has no step before it; of the others the lower middle is 12
    for order in (launches, launches[::-1]):
        assert median_step(order, steps=5) == [
            {"name": "copy", "begin_us": 0.0, "us": 1.0, "gap_us": 2.0, "layer": "head"},
            {"name": SAMPLE, "begin_us": 2.0, "us": 8.0, "gap_us": 1.0, "layer": "head"},
        ]


def test_what_overlaps_leaves_no_gap() -> None:
    """``b`` lies inside ``a``, and ``c`` begins after ``b`` has ended but before ``a`` has."""
    step = [("a", 1, 9), ("b", 2, 3), ("c", 5, 11), (SAMPLE, 11.5, 12)]
    launches = [Launch(name, 20 * i + begin, 20 * i + end) for i in range(3) for name, begin, end in step]
    found = median_step(launches, steps=3)
    assert found is not None
    assert [(launch["name"], launch["gap_us"]) for launch in found] == [("a", 9), ("b", 0), ("c", 0), (SAMPLE, 0.5)]


def test_copies_to_the_host_are_none_of_a_steps_launches() -> None:
    launches = _steps(9, 12, 8)
    copies = [Launch("Memcpy DtoH (Device -> Pinned)", launch.end_us - 1, launch.end_us + 1) for launch in launches]
    assert median_step([*launches, *copies], steps=3) == median_step(launches, steps=3)


@pytest.mark.parametrize(
    ("launches", "steps"),
    [
        ([], 3),
        (_steps(5), 1),
        ([Launch("a", 0, 1), Launch("a", 2, 3), Launch("triton_poi_fused_sample_4", 4, 5)], 3),
        (_steps(5, 5, 5, 5), 2),
        (_steps(5, 5, 5), 5),
    ],
    ids=["nothing", "one step", "no sample", "samples twice", "ended early"],
)
def test_steps_that_cannot_be_told_apart(launches: list[Launch], steps: int) -> None:
    assert median_step(launches, steps) is None


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_step_under_way_more_or_less_is_fine(steps: int) -> None:
    assert median_step(_steps(5, 6, 7), steps) is not None


def test_a_layer_begins_with_its_projection() -> None:
    layer = ["norm", "linear", APPEND, ATTEND, "merge", "linear", "norm", "linear", "silu", "linear"]
    names = ["copy", "embed", *layer, *layer, *layer, "norm", "linear", SAMPLE]
    assert layers_of(names) == ["head"] * 2 + [0] * 10 + [1] * 10 + [2] * 10 + ["tail"] * 3


def test_a_norm_fused_into_the_layer_before_belongs_to_it() -> None:
    layer = ["linear", APPEND, ATTEND, "linear", "add_norm", "linear", "silu", "linear", "add_norm"]
    names = ["embed_norm", *layer, *layer, "lm_head", "_best_kernel", SAMPLE]
    assert layers_of(names) == ["head"] + [0] * 9 + [1] * 9 + ["tail"] * 3


def test_a_last_layer_of_fewer_launches_does_not_take_the_output_head() -> None:
    """It needs no copy of its residual, and its projections are other kernels."""
    layer = ["qkv", APPEND, ATTEND, "o", "memcpy", "norm", "gate_up", "silu", "memcpy", "down", "norm"]
    last = ["qkv", APPEND, ATTEND, "o_", "norm_", "gate_up", "silu", "down_", "norm_end"]
    names = ["embed", *layer, *layer, *last, "lm_head", SAMPLE]
    found = layers_of(names)
    assert found[: found.index("tail")] == ["head"] + [0] * 11 + [1] * 11 + [2] * 7
    assert found[-2:] == ["tail", "tail"]


def test_the_last_layer_is_no_longer_than_the_one_before() -> None:
    """A norm after the output head is none of its launches."""
    layer = ["qkv", APPEND, ATTEND, "o", "norm"]
    names = ["embed", *layer, *layer, "qkv", APPEND, ATTEND, "o_", "lm_head", "norm", SAMPLE]
    assert layers_of(names) == ["head"] + [0] * 5 + [1] * 5 + [2] * 3 + ["tail"] * 4


def test_one_layer_and_none() -> None:
    assert layers_of(["embed", "qkv", APPEND, ATTEND, SAMPLE]) == ["head", "head", 0, 0, 0]
    assert layers_of(["a", SAMPLE]) == ["head", "head"]
    assert layers_of([]) == []


def test_what_it_looks_for_are_the_kernels_and_the_ops() -> None:
    """By name, as a recording has them."""
    for op, (kernel, operation) in {"decode_append": timeline._APPENDS, "sample": timeline._ENDS_STEP}.items():
        assert getattr(importlib.import_module(f"fastdms.ops.{op}.kernel"), kernel) is not None
        assert operation == f"fastdms::{op}"
