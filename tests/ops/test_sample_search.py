"""How the draw of sample finds what top-k and top-p keep: the right tokens, in few rounds over the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdms.ops.sample import draw_kernel
from fastdms.ops.sample.draw_kernel import PARTS, WAYS, _smallest_within
from tests.ops.harness import DEVICE
from tests.ops.sampling import run_sample

_INFINITY_BITS = 0x7F800000


@triton.jit
def _search_kernel(
    distance_ptr, sums_ptr, meeting_ptr, wanted_ptr, out_ptr, limit, part_size, vocab, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wanted = tl.load(wanted_ptr)
    limit = tl.program_id(0) * 0 + limit
    found, _ = _smallest_within(
        distance_ptr, sums_ptr, meeting_ptr, limit * 0, wanted, limit, 0, part_size, vocab, COUNT, 1, BLOCK
    )
    tl.store(out_ptr, found)


def _kept(distances: np.ndarray, wanted: float, *, count: bool, limit: int = _INFINITY_BITS) -> list[bool]:
    """Which are kept where those kept are to make ``wanted``."""
    placed = torch.from_numpy(distances).to(DEVICE)
    sums = torch.full((2, PARTS.value, WAYS.value), torch.nan, device=DEVICE)
    found, meeting = (torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    asked = torch.tensor([wanted], dtype=torch.float32, device=DEVICE)
    _search_kernel[(1,)](placed, sums, meeting, asked, found, limit, 16, len(distances), COUNT=count, BLOCK=16)
    kept: list[bool] = (distances.view(np.int32) <= int(found)).tolist()
    return kept


# Around the powers of two at which the first round branches, and beyond them.
_EDGES = [np.float32(2.0**e) for e in range(-12, 8)]
_EDGES += [np.nextafter(x, np.float32(to)) for x in _EDGES for to in (0, 1e9)]
_distance = st.sampled_from([*map(float, _EDGES), 0.0, 1e-30, 1e30]) | st.floats(0, 120, width=32)
_distances = st.lists(_distance, min_size=1, max_size=60).map(lambda rest: np.array([0.0, *rest], np.float32))


@settings(max_examples=60)
@given(_distances, st.data())
def test_as_many_as_are_wanted_and_their_equals(distances: np.ndarray, data: Any) -> None:
    wanted = data.draw(st.integers(1, len(distances)))
    farthest = np.sort(distances)[wanted - 1]
    assert _kept(distances, wanted, count=True) == (distances <= farthest).tolist()


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6])
def test_tokens_beyond_the_first_branches(wanted: int) -> None:
    distances = np.array([0.0, 65.0, 127.0, 200.0, 1e30, np.inf], np.float32)
    assert _kept(distances, wanted, count=True) == [i < wanted for i in range(6)]


@settings(max_examples=60)
@given(_distances, st.data())
def test_the_nearest_that_make_what_is_wanted(distances: np.ndarray, data: Any) -> None:
    """Within a limit that leaves out some; what is wanted lies between two sums, farther from both than roundings."""
    limit: float = data.draw(st.sampled_from([math.inf, *map(float, distances)]))
    inside = distances[distances <= limit]
    values = np.unique(inside)
    sums = np.cumsum([math.exp(-float(x)) * int((inside == x).sum()) for x in values])
    index = data.draw(st.integers(0, len(values) - 1))
    before = sums[index - 1] if index else 0.0
    assume(sums[index] - before > 1e-4 * sums[-1])
    kept = _kept(distances, (before + sums[index]) / 2, count=False, limit=int(np.float32(limit).view(np.int32)))
    expected = (distances <= values[index]).tolist()
    assert [k and d <= limit for k, d in zip(kept, distances, strict=True)] == expected


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's calls are counted")
@pytest.mark.parametrize(
    ("scale", "changes", "most"),
    [
        (1.0, {"top_k": 50}, 4), (3.0, {"top_k": 50}, 3), (1.0, {"top_p": 0.95}, 8), (10.0, {"top_p": 0.95}, 4),
        (1.0, {"top_k": 50, "top_p": 0.95}, 8), (3.0, {"top_k": 50, "top_p": 0.95}, 7),
    ],
)  # fmt: skip
def test_rounds_end_when_the_tokens_are_known(
    scale: float, changes: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """31 bits take eight rounds by four each, and top-p one more for the sum of all."""
    rounds = []
    sums_within = draw_kernel._sums_within

    def counted(*args: Any) -> Any:
        rounds.append(1)
        return sums_within(*args)

    monkeypatch.setattr(draw_kernel, "_sums_within", counted)
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)) * scale
    drawn = run_sample("kernel", logits, temperature=0.8, seeds=7, **changes).tokens
    assert 0 < len(rounds) <= most
    monkeypatch.undo()
    assert drawn == run_sample("reference", logits, temperature=0.8, seeds=7, **changes).tokens
