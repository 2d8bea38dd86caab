"""``fastdms bench profile``: where launches that overlap count, and a profile of a tiny model on the CPU."""

from __future__ import annotations

import json

import pytest

from fastdms.cli import main
from fastdms.tools.bench.profile import Launch, by_kernel

TINY = ["bench", "profile", "--shape", "tiny", "--device", "cpu", "--window", "16", "--context", "64"]


def test_launches_that_overlap_count_once() -> None:
    """``a`` runs; ``b`` begins inside it and ends 3 later; ``c`` lies wholly inside; after a gap of 5, ``a`` again."""
    launches = [Launch("a", 0, 10), Launch("b", 4, 13), Launch("c", 5, 9), Launch("a", 18, 20)]
    for order in (launches, launches[::-1]):
        assert by_kernel(order, steps=2) == [
            {"name": "a", "launches": 1.0, "us": 6.0, "added_us": 6.0},
            {"name": "b", "launches": 0.5, "us": 9.0, "added_us": 1.5},
            {"name": "c", "launches": 0.5, "us": 4.0, "added_us": 0.0},
        ]


def test_a_step_of_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--concurrency", "1", "2", "--repeats", "4"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(row["rows"], row["steps"], row["context"]) for row in rows] == [(1, 4, 64), (2, 4, 64)]
    for row in rows:
        kernels = {kernel["name"]: kernel for kernel in row["kernels"]}
        assert kernels["fastdms::decode_append"]["launches"] == kernels["fastdms::decode_attention"]["launches"] == 2
        assert kernels["fastdms::sample"]["launches"] == 1
        added = sum(kernel["added_us"] for kernel in row["kernels"])
        assert added + row["idle_us"] == pytest.approx(row["step_us"], abs=0.1)
        assert row["idle_us"] >= 0
    assert "2 rows x 64: " in out
    assert "added us" in out


def test_steps_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--new-tokens", "12", "--repeats", "3"]) == 2
    assert "3 steps take 13 new tokens of a context with room for 12" in capsys.readouterr().err
