"""sample: greedy, temperature, top-k, top-p, min-p, bans, and the counter-based generator behind them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fastdms.ops import NOT_FINITE, sample
from fastdms.ops.sample.reference import exponential, keep_mask, philox
from tests.ops.harness import BACKENDS, DEVICE
from tests.ops.sampling import DEFAULTS, make_settings, run_sample

_SLICE = 4096  # logits that one program of the kernel looks at for the largest


def _sample(backend: str, logits: torch.Tensor, **changes: Any) -> list[int]:
    return run_sample(backend, logits, **changes).tokens


def test_philox_known_answers() -> None:
    """Vectors published with the Random123 library, first word."""
    ones = 0xFFFFFFFF

    def first_word(key: int, counter: int, position: int) -> int:
        return int(philox(torch.tensor(key), torch.tensor([counter]), torch.tensor(position)))

    assert first_word(0, 0, 0) == 0x6627E8D5
    assert _plain_philox((ones,) * 4, (ones,) * 2)[0] == 0x408F276D
    assert _plain_philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))[0] == 0xD16CFE09
    for key, counter, position in ((5, 3, 1), (2**62 + 12345, 128_255, 131_071), (2**63 - 1, 7, -1)):
        expected = _plain_philox((counter, position & ones, 0, 0), (key & ones, key >> 32))[0]
        assert first_word(key, counter, position) == expected


def _plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_exponential_noise_is_exact_and_never_infinite() -> None:
    bits = torch.tensor([0, 1, 12_345, 2**26 - 1, 2**26, 2**31, 2**32 - 2**12, 2**32 - 1])
    expected = [-math.log1p(-(int(b) + 0.5) * 2.0**-32) for b in bits]
    noise = exponential(bits)
    assert noise.isfinite().all()
    assert (noise > 0).all()
    torch.testing.assert_close(noise[:-2].double(), torch.tensor(expected[:-2], dtype=torch.float64), rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_candidate_is_taken_whatever_its_noise(backend: str) -> None:
    """With one token left, the draw must be that token for every word of the generator, the largest ones above all."""
    seed, token = 985_793, 52  # whose word rounds up to 2**32 in fp32
    assert int(philox(torch.tensor(seed), torch.tensor(token), torch.tensor(0))) > 2**32 - 128
    logits = torch.zeros(1, 64)
    logits[0, token] = 1.0
    assert _sample(backend, logits, top_k=1, seeds=seed) == [token]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy(backend: str) -> None:
    logits = torch.tensor([[0.0, 3, 3, -1], [-math.inf, -2, -2, -3], [5, 1, 2, 3], [0, 0, 0, 0]])
    assert _sample(backend, logits, temperature=0.0) == [1, 1, 0, 0]
    long = torch.zeros(1, 4200)  # two of the kernel's blocks
    long[0, [30, 4150]] = 1.0
    assert _sample(backend, long, temperature=0.0) == [30]
    # All else is ignored.
    assert _sample(backend, logits, temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seeds=4) == [1, 1, 0, 0]


@pytest.mark.parametrize("rest", [0.0, -math.inf])
@pytest.mark.parametrize("vocab", [_SLICE - 1, _SLICE, _SLICE + 1, 2 * _SLICE - 1, 2 * _SLICE, 2 * _SLICE + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_logit_lies_in_any_slice(backend: str, vocab: int, rest: float) -> None:
    """Alone, or equal to another in the same slice or a later one; with ``rest`` -inf, in all slices but theirs."""
    edges = sorted({0, 1, _SLICE - 2, _SLICE - 1, _SLICE, vocab - 2, vocab - 1} & set(range(vocab)))
    rows = [*itertools.combinations(edges, 1), *itertools.combinations(edges, 2)]
    logits = torch.full((len(rows), vocab), rest)
    for row, largest in zip(logits, rows, strict=True):
        row[list(largest)] = 1.0 if rest == 0.0 else -2.0
    assert _sample(backend, logits, temperature=0.0) == [largest[0] for largest in rows]
    drawn = _sample(backend, logits, min_p=1.0, seeds=list(range(len(rows))))
    assert all(token in largest for token, largest in zip(drawn, rows, strict=True))
    assert any(token != largest[0] for token, largest in zip(drawn, rows, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, by which the interpreter computes
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_finite_maximum(backend: str) -> None:
    """They give no id, wherever the value lies and whatever is banned, and leave the row between them alone."""
    vocab, token = 2 * _SLICE + 3, _SLICE + 7
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, _SLICE, vocab - 1, slice(None)):
            logits = torch.zeros(3, vocab)
            logits[::2] = -math.inf if value == -math.inf else 0.0
            logits[::2, place] = value
            logits[1, token] = 50.0
            for temperature in (0.0, 1.0):
                for changes in ({}, {"end_ids": [[0, vocab - 1]] * 3, "banned_until": 9}):
                    drawn = _sample(backend, logits, temperature=temperature, **changes)
                    assert drawn == [NOT_FINITE, token, NOT_FINITE]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_bans_leave_nothing_is_finite(backend: str) -> None:
    """What counts is the logits as they are given."""
    logits = torch.full((2, 3), -math.inf)
    logits[0, 1] = 2.0
    changes = {"end_ids": [[1]] * 2, "positions": 3, "banned_until": 4}
    for temperature in (0.0, 1.0):
        banned, lost = _sample(backend, logits, temperature=temperature, **changes)
        assert 0 <= banned < 3
        assert lost == NOT_FINITE


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_ids(backend: str) -> None:
    logits = torch.tensor([[0.0, 3, 2, 1]] * 5)
    settings = {
        "end_ids": [[1, -1], [1, 2], [-1, -1], [1, 2], [3, 3]],
        "positions": [4, 4, 4, 5, 0],
        "banned_until": [5, 5, 5, 5, 1],
    }
    for temperature in (0.0, 1e-6):
        assert _sample(backend, logits, temperature=temperature, **settings) == [2, 3, 1, 1, 1]
    everything = _sample(backend, logits, temperature=100.0, top_k=0, seeds=list(range(5)), **settings)
    assert everything[0] != 1
    assert everything[1] in (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_ids_of_several_slices(backend: str) -> None:
    """Row i bans the i likeliest tokens, which lie at the edges of slices, so that the next one is chosen."""
    likeliest = [_SLICE, 2 * _SLICE + 7, _SLICE - 1, 0, 2 * _SLICE - 1, 2 * _SLICE, 5]
    logits = torch.zeros(len(likeliest), 2 * _SLICE + 8)
    logits[:, likeliest] = torch.arange(len(likeliest), 0, -1.0)
    banned_ids = [[*likeliest[:i], *[-1] * (len(likeliest) - i)] for i in range(len(likeliest))]
    for temperature in (0.0, 1e-6):
        changes = {"temperature": temperature, "end_ids": banned_ids, "positions": 3}
        assert _sample(backend, logits, banned_until=4, **changes) == likeliest
        assert _sample(backend, logits, banned_until=3, **changes) == [likeliest[0]] * len(likeliest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_settings_leave_the_best_token(backend: str) -> None:
    """Every combination is legal; where the smallest nucleus is asked for it is the largest logit."""
    vocab = 40
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).float() * 10
    best = int(row.argmax())
    grid = list(
        itertools.product((0.0, 1e-8, 1e-4, 100.0, 1e30), (1e-8, 1e-3, 1.0), (0, 1, vocab, vocab + 1), (0.0, 1.0))
    )
    columns = dict(zip(("temperature", "top_p", "top_k", "min_p"), map(list, zip(*grid, strict=True)), strict=True))
    chosen = _sample(backend, row.repeat(len(grid), 1), seeds=list(range(len(grid))), **columns)
    for (temperature, top_p, top_k, min_p), token in zip(grid, chosen, strict=True):
        assert 0 <= token < vocab
        if temperature < 1e-3 or top_p < 1e-2 or top_k == 1 or min_p == 1.0:
            assert token == best, (temperature, top_p, top_k, min_p)
    assert any(token != best for token in chosen)


LARGEST_BELOW_ONE = 1 - 2.0**-24  # in fp32; -log of it is 5.96e-8


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [(1.0, {0, 2}), (LARGEST_BELOW_ONE, {0, 1, 2, 3, 4}), (0.9999, {0, 1, 2, 3, 4, 5, 6}), (0.0, set(range(8)))],
)
def test_min_p_near_one_where_it_is_hot(min_p: float, expected: set[int]) -> None:
    """At temperature 1000 the probabilities of all these but the last lie within two steps of fp32 of the largest."""
    logits = -torch.tensor([[0.0, 2e-5, 0.0, 4e-5, 5e-5, 7e-5, 1.1e-4, 200.0]]).repeat(128, 1)
    drawn = [_sample(b, logits, seeds=list(range(128)), temperature=1e3, min_p=min_p) for b in BACKENDS]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_stay_together(backend: str) -> None:
    """A boundary that falls among equals keeps all of them."""
    logits = torch.tensor([[2.0, 1, 1, 1, 0, 0]])
    for changes in ({"top_k": 2}, {"top_p": 0.45}, {"min_p": 0.36}):
        drawn = _sample(backend, logits.repeat(24, 1), seeds=list(range(24)), **changes)
        assert set(drawn) == {0, 1, 2, 3}, changes


def test_keep_mask_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        vocab = int(torch.randint(1, 30, (), generator=generator))
        scaled = torch.randn(vocab, generator=generator).mul(2).round(decimals=1)
        scaled -= scaled.max()
        top_k = int(torch.randint(0, vocab + 2, (), generator=generator))
        top_p = float(torch.rand((), generator=generator))
        min_p = float(torch.rand((), generator=generator)) * 0.3
        mine = keep_mask(scaled, top_k, top_p, min_p).tolist()
        values = scaled.tolist()
        kept = sorted(values, reverse=True)[top_k - 1] if 0 < top_k < vocab else -math.inf
        left = [math.exp(x) for x in values if x >= kept]
        expected = [
            x >= kept and sum(p for p in left if p > math.exp(x)) / sum(left) < top_p and math.exp(x) >= min_p
            for x in values
        ]
        assert mine == expected


def test_kernel_draws_what_the_reference_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 50, _SLICE, 8200) if DEVICE.type == "cpu" else (1, 50, 300, 5000, 128_256):
        batch = 6
        logits = torch.randn(batch, vocab, generator=generator) * 3
        changes = {
            "temperature": [0.0, 0.7, 1.0, 1.0, 1.3, 5.0],
            "top_k": [0, 0, 7, 0, 20, 0],
            "top_p": [1.0, 1.0, 1.0, 0.8, 0.95, 1.0],
            "min_p": [0.0, 0.0, 0.0, 0.0, 0.01, 0.05],
            "seeds": [1, 2, 3, 2**40 + 5, 2**63 - 1, 0],
            "positions": [5, 0, 9, 131_071, 3, 2],
            "end_ids": [[0, vocab - 1]] * batch,
            "banned_until": [0, 9, 9, 0, 9, 0] if vocab > 1 else 0,
        }
        wide = torch.empty(batch, 2 * vocab).copy_(torch.cat((logits, logits), 1))  # rows with a gap
        for view in (logits, wide[:, :vocab]):
            assert _sample("kernel", view, **changes) == _sample("reference", view, **changes), vocab
        turned = logits.T.contiguous().T
        assert _sample("kernel", turned, **changes) == _sample("reference", logits, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    """Alone, first, last, in the middle, beside rows of every kind and padding (position -1)."""
    generator = torch.Generator().manual_seed(4)
    own = torch.randn(1, 80, generator=generator)
    mine = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seeds": 7, "positions": 11}
    others = [
        {"temperature": 0.0},
        {"temperature": 100.0, "seeds": 7, "positions": 11},
        {"temperature": 0.8, "seeds": 8, "positions": -1},
        {"temperature": 1.0, "top_p": 1e-3, "banned_until": 99},
    ]
    [alone] = _sample(backend, own, **mine)
    for place in range(len(others) + 1):
        rows = [*others[:place], mine, *others[place:]]
        columns = {name: [row.get(name, default) for row in rows] for name, default in DEFAULTS.items()}
        logits = torch.randn(len(rows), 80, generator=generator)
        logits[place] = own
        assert _sample(backend, logits, end_ids=[[3, 5]] * len(rows), **columns)[place] == alone


def test_a_row_does_not_depend_on_how_many_programs_draw_it() -> None:
    """On CUDA the more rows there are, the fewer programs share one: down to a single one."""
    vocab, batches = (300, (1, 3)) if DEVICE.type == "cpu" else (128_256, (1, 12, 24, 48, 72, 144, 288))
    rows: dict[str, list[float]] = {"top_k": [0, 40, 0], "top_p": [0.9, 1.0, 1.0], "min_p": [0.0, 0.0, 0.05]}
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 3
    for kind in range(3):
        changes = {name: values[kind] for name, values in rows.items()}
        drawn = {token for n in batches for token in _sample("kernel", logits.repeat(n, 1), seeds=9, **changes)}
        assert len(drawn) == 1, changes


@pytest.mark.parametrize("what", ["seeds", "positions"])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}], ids=lambda c: "-".join(c)
)
def test_draws_follow_the_softmax(what: str, changes: dict[str, Any]) -> None:
    """Chi-square over seeds, and over positions of one seed."""
    backend = "kernel" if DEVICE.type == "cuda" else "reference"
    draws = 4000
    logits = torch.tensor([1.5, 0.0, -1.0, 1.0, 0.5, -0.5, 2.0])
    numbers = {"seeds": 99, "positions": 5, what: list(range(draws))}
    tokens = torch.tensor(_sample(backend, logits.repeat(draws, 1), **numbers, **changes))
    scaled = (logits - logits.max()) / changes.get("temperature", 1.0)
    kept = keep_mask(scaled, changes.get("top_k", 0), changes.get("top_p", 1.0), changes.get("min_p", 0.0))
    p = scaled.masked_fill(~kept, -math.inf).softmax(0).double()
    counts = torch.bincount(tokens, minlength=7).double()
    assert not counts[~kept].any()
    statistic = float(((counts - draws * p).square() / (draws * p))[kept].sum())
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 4.5 * math.sqrt(2 * degrees)  # beyond the 1 - 1e-4 quantile for these degrees


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    assert _sample(backend, torch.zeros(0, 9)) == []


def test_bad_input_is_named() -> None:
    logits, good = torch.zeros(2, 9), make_settings(2, 9)
    for bad, change, message in (
        (logits.half(), {}, "logits"),
        (logits[0], {}, "logits"),
        (logits[0, 0], {}, "logits"),
        (logits, {"temperature": good["temperature"][:1]}, "float32"),
        (logits, {"top_k": good["top_k"].long()}, "int32"),
        (logits, {"seeds": good["seeds"].int()}, "int64"),
        (logits, {"end_ids": good["end_ids"][:1]}, "end_ids"),
        (logits, {"end_ids": good["end_ids"][:, 0]}, "end_ids"),
        (logits, {"penalties": good["penalties"][:, :2]}, "penalties"),
        (logits, {"penalties": good["penalties"].double()}, "penalties"),
        (logits, {"count_rows": good["count_rows"].long()}, "int32"),
        (logits, {"counts": good["counts"].int()}, "counts"),
        (logits, {"counts": good["counts"][:, 1:]}, "counts"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(bad, **{**good, **change})
