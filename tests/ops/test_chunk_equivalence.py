"""How a prompt is cut must not show: chunks of any size and single decode steps end in the same state and outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.harness import BACKENDS, DEVICE
from tests.ops.pair import check_results
from tests.ops.rig import FLAG_ALL, FLAG_HALF, Rig
from tests.tolerance import assert_logits_close

TOKENS, WINDOW = 37, 8


class _End:
    """What is left after ``TOKENS`` tokens of one row, cut into ``parts``; a part of 0 is one decode step."""

    def __init__(self, backend: str, parts: list[int], shift: int, window: int = WINDOW) -> None:
        rig = Rig(backend, rows=2, window=window, shift=shift, heads=(2, 2, 16), seed=11)
        rig.prefill([(1, 5)])  # a neighbour, whose pages lie in between
        outputs = []
        for part in parts:
            results = rig.prefill([(0, part)]) if part else rig.decode([0])
            check_results(results)
            outputs.append(results.out)
        rig.check()
        assert rig.length(0) == TOKENS
        self.out = torch.cat(outputs)
        self.flags = (rig.cache.ring[0, 0] & 1).tolist()
        self.stored = [sorted(history.stored_at) for history in rig.histories[0]]
        self.live = rig.cache.live_len.tolist()


def _assert_same(one: _End, other: _End) -> None:
    assert one.live == other.live
    assert one.stored == other.stored
    assert one.flags == other.flags
    assert_logits_close(one.out, other.out)


def _chunks(size: int) -> list[int]:
    return [min(size, TOKENS - start) for start in range(0, TOKENS, size)]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_chunks(backend: str, shift: int) -> None:
    whole = _End("reference", [TOKENS], shift)
    flagged = sum(TOKENS - len(positions) for positions in whole.stored)
    assert 2 * TOKENS * 0.25 < flagged < 2 * TOKENS * 0.6  # about half of what has left the window
    interpreted = backend == "kernel" and DEVICE.type == "cpu"
    for size in (7, 9, TOKENS) if interpreted else (1, 2, 7, 8, 9, 16, TOKENS):
        _assert_same(_End(backend, _chunks(size), shift), whole)
    if not interpreted:
        _assert_same(_End(backend, [0] * TOKENS, shift), whole)
    _assert_same(_End(backend, [19, 0, 0, 1, 10, 0, 4], shift), whole)


@st.composite
def _parts(draw: st.DrawFn) -> list[int]:
    parts: list[int] = []
    given_tokens = 0
    while given_tokens < TOKENS:
        part = draw(st.integers(0, TOKENS - given_tokens))
        parts.append(part)
        given_tokens += max(part, 1)
    return parts


@settings(max_examples=25)
@given(parts=_parts(), shift=st.integers(0, 1), window=st.sampled_from([0, 1, 3, WINDOW, 36, 64]))
def test_any_split(parts: list[int], shift: int, window: int) -> None:
    _assert_same(_End("reference", parts, shift, window), _End("reference", [TOKENS], shift, window))


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("prompt", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_empty_when_everything_is_flagged(backend: str, prompt: int, window: int) -> None:
    """Very short prompts whose every token is flagged, then decode steps: never an empty span, never a NaN."""
    for decision in (FLAG_ALL, FLAG_HALF):
        rig = Rig(backend, rows=1, window=window, decision=decision, shift=prompt % 2, heads=(1, 2, 16))
        check_results(rig.prefill([(0, prompt)]))
        for _ in range(20 if backend == "reference" or DEVICE.type == "cuda" else 4):
            check_results(rig.decode([0]))
            assert int(rig.cache.live_len.min()) >= 1
        rig.check()
