"""sample's penalties, the counts behind them, and which tokens end a row."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.ops import NOT_FINITE, count_tokens
from tests.ops.harness import BACKENDS
from tests.ops.sampling import NEUTRAL, run_sample

MOST = 2**15 - 1
PROMPT = -(2**15)  # the bit that says that a token is in the prompt
_SLICE = 4096  # logits that one program of the kernel looks at for the largest


def ints16(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int16)


def defined(logits: list[float], counts: list[int], penalties: tuple[float, ...]) -> list[float]:
    """The definition, one logit after another, each result rounded to fp32."""
    presence, frequency, repetition = map(numpy.float32, penalties)
    out = []
    for x, count in zip(map(numpy.float32, logits), counts, strict=True):
        times, in_prompt = numpy.float32(count & MOST), count < 0
        if times or in_prompt:
            x = x / repetition if x > 0 else x * repetition
        out.append(float(x - (frequency * times + presence * (times > 0))))
    return out


def test_how_tokens_are_counted() -> None:
    counts = count_tokens([1, 1, 4], [4, 2, 4, 4], 6)
    assert counts.dtype == torch.int16
    assert counts.tolist() == [0, PROMPT, 1, 0, PROMPT + 3, 0]
    assert count_tokens([0], [], 2).tolist() == [PROMPT, 0]
    assert count_tokens([0], [0, *[1] * 40_000], 2).tolist() == [PROMPT + 1, MOST]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("penalties", "expected"),
    [
        (NEUTRAL, 0),
        ((1.5, 0.0, 1.0), 1),  # 5 - 1.5 of the output's token, and 4 of the prompt's
        ((0.0, 0.6, 1.0), 1),  # 5 - 3 * 0.6
        ((0.0, 0.0, 2.0), 2),  # 2.5, 2, and 3 of a token that occurs nowhere
        ((-2.0, -2.0, 2.0), 0),
        ((2.0, 2.0, 0.5), 1),  # 10 - 8, and 4 / 0.5
    ],
)
def test_each_penalty(backend: str, penalties: tuple[float, ...], expected: int) -> None:
    logits, counts = torch.tensor([[5.0, 4.0, 3.0, -8.0]]), ints16([[7] * 4, [3, PROMPT, 0, PROMPT + 9]])
    for temperature in (0.0, 1e-6):
        out = run_sample(backend, logits, temperature=temperature, penalties=[penalties], count_rows=[1], counts=counts)
        assert out.tokens == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_logits_move_away_from_zero(backend: str) -> None:
    logits, counts = torch.tensor([[-1.0, -1.5]]), ints16([[1, 0]])
    for repetition, expected in ((2.0, 1), (1.2, 0), (0.5, 0)):
        out = run_sample(backend, logits, temperature=0.0, penalties=[(0, 0, repetition)], count_rows=0, counts=counts)
        assert out.tokens == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_count_their_own_tokens_only(backend: str) -> None:
    """In the row of counts that they name; padding and rows without penalties touch none."""
    logits = torch.eye(5)[[4, 2, 2, 0]]
    counts = ints16([[0] * 5, [0, 0, PROMPT, 0, 0], [9] * 5, [0, 0, 0, 0, 5]])
    changes: dict[str, Any] = {"temperature": [0.0, 0.0, 1e-6, 0.0], "positions": [3, 4, 5, 0], "counts": counts}
    out = run_sample(backend, logits, count_rows=[3, 1, 0, -1], penalties=[(0.0, 0.01, 1.0)] * 4, **changes)
    assert out.tokens == [4, 2, 2, 0]
    assert out.counts.tolist() == [[0, 0, 1, 0, 0], [0, 0, PROMPT + 1, 0, 0], [9] * 5, [0, 0, 0, 0, 6]]
    neutral = run_sample(backend, logits, penalties=[(2.0, 2.0, 2.0)] * 4, **changes)
    assert neutral.tokens == out.tokens
    assert torch.equal(neutral.counts, counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_saturate(backend: str) -> None:
    counts = ints16([[MOST], [-1], [MOST - 1], [-2]])
    out = run_sample(backend, torch.zeros(4, 1), count_rows=[0, 1, 2, 3], counts=counts)
    assert out.counts.tolist() == [[MOST], [-1], [MOST], [-1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalties_of_several_slices(backend: str) -> None:
    """Row i has seen the i likeliest tokens, which lie at the edges of slices, so that the next one is chosen."""
    likeliest = [_SLICE, 2 * _SLICE + 7, _SLICE - 1, 0, 2 * _SLICE - 1, 2 * _SLICE, 5]
    rows, vocab = len(likeliest), 2 * _SLICE + 8
    logits = torch.zeros(rows, vocab)
    logits[:, likeliest] = 10 + torch.arange(rows, 0, -1.0)
    counts = torch.stack([count_tokens(likeliest[:i], [], vocab) for i in reversed(range(rows))])
    for temperature in (0.0, 1e-6):
        out = run_sample(
            backend, logits, temperature=temperature, penalties=[(0, 0, 2.0)] * rows,
            count_rows=list(reversed(range(rows))), counts=counts,
        )  # fmt: skip
        assert out.tokens == likeliest
        assert [int(out.counts[rows - 1 - i, token]) for i, token in enumerate(likeliest)] == [1] * rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ban_outlasts_any_penalty(backend: str) -> None:
    """A penalty below 0 raises what it finds, but nothing from -inf."""
    counts = ints16([[MOST, MOST, 0], [MOST, MOST, 0]])
    logits = torch.tensor([[1.0, -math.inf, 0.0]] * 2)
    out = run_sample(
        backend, logits, temperature=[0.0, 1.0], penalties=[(-2.0, -2.0, 0.01)] * 2, count_rows=[0, 1], counts=counts,
        end_ids=[[0]] * 2, positions=1, banned_until=2,
    )  # fmt: skip
    assert out.tokens == [2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_tokens_end_a_row(backend: str) -> None:
    """From the position at which one more token would not be banned; an unused place in the list is no token."""
    logits = torch.eye(4)[[0, 1, 2, 3, 3, 3]]
    end_ids = [[0, -1, -1], [-1, 2, 0], [-1, 2, 0], [1, 2, 3], [3, -1, -1], [3, 3, 3]]
    out = run_sample(backend, logits, temperature=0.0, end_ids=end_ids, positions=5, banned_until=[0, 0, 5, 0, 4, 5])
    assert out.tokens == [0, 1, 2, 3, 3, 3]
    assert out.ends == [True, False, True, True, True, True]
    # All are banned, and the first is taken all the same: it ends a row that has its least number of tokens with it.
    none_left = run_sample(
        backend, torch.zeros(3, 1), temperature=0.0, end_ids=[[0]] * 3, positions=[5, 5, -1], banned_until=[6, 7, 9]
    )
    assert (none_left.tokens, none_left.ends) == ([0, 0, 0], [True, False, False])
    without = run_sample(backend, logits, end_ids=torch.zeros(6, 0).tolist())
    assert without.ends == [False] * 6


LOGITS = st.sampled_from([0.0, -0.0, 1e-30, 0.5, 1.0, 2.5, 7.0, 1e4, -1e-30, -0.5, -1.0, -7.0, -1e4, -math.inf])
COUNTS = st.sampled_from([0, 0, 0, 1, 2, 7, MOST, PROMPT, PROMPT + 1, PROMPT + 5, -1])
PENALTY = st.sampled_from([0.0, 0.0, 2.0, -2.0, 0.1, -0.3, 1e-30, 1.3])
REPETITION = st.sampled_from([1.0, 1.0, 2.0, 1e-30, 0.5, 1.1, 0.999])


@settings(max_examples=60)
@given(st.data())
def test_any_penalties(data: st.DataObject) -> None:
    """Greedy takes the first largest of the defined logits, and the kernel what the reference takes, drawn or not.

    Where all are -inf both count the first id.
    """
    vocab, batch = data.draw(st.sampled_from([1, 2, 9, 20])), data.draw(st.integers(1, 3))
    rows = range(batch)
    logits = torch.tensor([[data.draw(LOGITS) for _ in range(vocab)] for _ in rows])
    counts = ints16([[data.draw(COUNTS) for _ in range(vocab)] for _ in range(batch + 1)])
    penalties = [(data.draw(PENALTY), data.draw(PENALTY), data.draw(REPETITION)) for _ in rows]
    changes: dict[str, Any] = {
        "temperature": [data.draw(st.sampled_from([0.0, 0.0, 1.0, 1e4])) for _ in rows],
        "top_k": [data.draw(st.sampled_from([0, 1, 3])) for _ in rows],
        "seeds": [data.draw(st.integers(0, 99)) for _ in rows],
        "count_rows": data.draw(st.permutations([-1, *range(batch)]))[:batch],
        "end_ids": [[data.draw(st.integers(-1, vocab - 1))] for _ in rows],
    }
    reference, kernel = (
        run_sample(backend, logits, penalties=penalties, counts=counts, **changes) for backend in BACKENDS
    )
    assert kernel[:2] == reference[:2]
    assert torch.equal(kernel.counts, reference.counts)
    expected = counts.clone()
    for b, count_row in enumerate(changes["count_rows"]):
        token = reference.tokens[b]
        x = logits[b].tolist()
        assert (token == NOT_FINITE) == (max(x) == -math.inf)
        token = max(token, 0)
        if count_row >= 0:
            x = defined(x, counts[count_row].tolist(), penalties[b])
            count = int(counts[count_row, token])
            expected[count_row, token] = count + (count & MOST < MOST)
        if changes["temperature"][b] == 0.0 and math.isfinite(max(x)):
            assert token == x.index(max(x))
        assert reference.ends[b] == (token in changes["end_ids"][b])
    assert torch.equal(reference.counts, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, by which the interpreter computes
@pytest.mark.parametrize("backend", BACKENDS)
def test_penalties_of_logits_that_are_not_finite(backend: str) -> None:
    """No token, but an id is counted, and the row beside it is not touched."""
    for value in (math.nan, math.inf):
        logits = torch.tensor([[0.0, value, 1.0], [0.0, 1.0, 2.0]])
        for temperature in (0.0, 1.0):
            out = run_sample(
                backend, logits, temperature=[temperature, 0.0], penalties=[(2.0, 2.0, 2.0)] * 2, count_rows=[1, 0],
                counts=ints16([[0, 0, PROMPT], [1, 1, 1]]),
            )  # fmt: skip
            assert out.tokens == [NOT_FINITE, 1]
            assert out.counts[0].tolist() == [0, 1, PROMPT]
            assert int(out.counts[1].sum()) == 4


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_penalties_make_infinite(backend: str) -> None:
    """Some id, since they were finite."""
    for temperature in (0.0, 1.0):
        out = run_sample(
            backend, torch.tensor([[0.0, 3e38, 1.0]]), temperature=temperature, penalties=[(0.0, 0.0, 0.5)],
            count_rows=0, counts=ints16([[0, 1, 0]]),
        )  # fmt: skip
        assert 0 <= out.tokens[0] < 3
        assert int(out.counts.sum()) == 2
