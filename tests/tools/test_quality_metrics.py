"""The figures of ``fastdms quality`` on cases that can be computed by hand, and the texts they are taken on."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdms.tools.quality.metrics import Steps, compare, live_share_outside_window, summarise
from fastdms.tools.quality.texts import Text, encode_plain, read_texts, token_windows
from tests.tiny_tokenizers import byte_level

# fp64 sums of a few exact logarithms.
EXACT = 1e-12


def _log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def _steps(kld: list[float], match: list[bool], nll_off: list[float], nll_on: list[float]) -> Steps:
    return Steps(kld=np.array(kld), match=np.array(match), nll_off=np.array(nll_off), nll_on=np.array(nll_on))


def test_compare_is_the_definition() -> None:
    off = torch.stack([_log(0.5, 0.25, 0.25), _log(0.6, 0.3, 0.1)])
    on = torch.stack([_log(0.25, 0.5, 0.25), _log(0.6, 0.3, 0.1)]) + 3.0  # logits are logarithms up to a constant
    steps = compare(off, on, [1, 2])
    assert steps.kld.tolist() == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0], abs=EXACT)
    assert steps.match.tolist() == [False, True]
    assert steps.nll_off.tolist() == pytest.approx([math.log(4), math.log(10)], rel=EXACT)
    assert steps.nll_on.tolist() == pytest.approx([math.log(2), math.log(10)], rel=EXACT)


def test_the_divergence_is_from_off_to_on() -> None:
    off, on = _log(0.9, 0.1)[None], _log(0.5, 0.5)[None]
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert compare(off, on, [0]).kld.item() == pytest.approx(expected, rel=EXACT)


def test_compare_keeps_the_order_of_many_rows() -> None:
    """More rows than are held at once."""
    dice = torch.Generator().manual_seed(0)
    off, on = torch.randn(2, 300, 5, generator=dice)
    targets = torch.randint(5, (300,), generator=dice).tolist()
    whole = compare(off, on, targets)
    single = [compare(off[i : i + 1], on[i : i + 1], targets[i : i + 1]) for i in range(300)]
    for name in Steps._fields:
        rows = np.concatenate([getattr(steps, name) for steps in single])
        assert getattr(whole, name) == pytest.approx(rows, rel=EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    off = torch.zeros(3, 4)
    on = off.clone()
    on[1, 2] = value
    with pytest.raises(ValueError, match="logits are not finite"):
        compare(off, on, [0, 0, 0])
    with pytest.raises(ValueError, match="logits are not finite"):
        compare(on, off, [0, 0, 0])


@pytest.mark.parametrize(("rows", "targets"), [(2, 3), (3, 2)])
def test_logits_and_targets_must_belong_together(rows: int, targets: int) -> None:
    with pytest.raises(ValueError, match=r"logits .* for \d targets"):
        compare(torch.zeros(3, 4), torch.zeros(rows, 4), [0] * targets)


def test_summary_of_two_sequences() -> None:
    first = _steps([0.0, 0.2], [True, True], [1.0, 2.0], [1.0, 2.0])
    second = _steps([0.3, 0.5], [False, True], [3.0, 2.0], [4.0, 3.0])
    summary = summarise([first, second])
    assert summary.steps == 4
    assert summary.kld == pytest.approx(0.25, rel=EXACT)
    assert summary.kld_max == 0.5
    assert summary.greedy_match == 0.75
    assert summary.perplexity_off == pytest.approx(math.exp(2.0), rel=EXACT)
    assert summary.perplexity_on == pytest.approx(math.exp(2.5), rel=EXACT)
    assert summary.perplexity_change == pytest.approx(math.exp(0.5) - 1, rel=EXACT)
    # The means 0.1 and 0.4 have standard error 0.15; a divergence isn't negative.
    assert summary.kld_low == 0.0
    assert summary.kld_high == pytest.approx(0.25 + 12.706 * 0.15, rel=EXACT)


def test_the_interval_narrows_with_sequences() -> None:
    two, four = (
        summarise([_steps([0.9 + 0.2 * (i % 2)], [True], [1.0], [1.0]) for i in range(count)]) for count in (2, 4)
    )
    assert two.kld_low == 0.0
    assert four.kld_low == pytest.approx(1.0 - 3.182 * 0.1 / math.sqrt(3), rel=EXACT)
    assert two.kld == four.kld == pytest.approx(1.0, rel=EXACT)


def test_one_sequence_has_no_interval() -> None:
    summary = summarise([_steps([0.1, 0.3], [True, False], [1.0, 1.0], [1.0, 1.0])])
    assert (summary.kld_low, summary.kld_high) == (None, None)


def test_live_share_outside_the_window() -> None:
    """10 tokens, a window of 3 and the token itself: 6 could be evicted."""
    share = live_share_outside_window(np.array([[4, 10], [7, 5.5]]), 10, 3)
    assert share.tolist() == [[0.0, 1.0], [0.5, 0.25]]


def test_windows_are_spread_over_the_text_and_begin_with_a_bos() -> None:
    tokenizer = byte_level()
    text = Text(name="digits", content="".join(f"{i:03d}" for i in range(100)))
    ids = encode_plain(tokenizer, text.content)
    assert len(ids) == 300
    windows = token_windows(tokenizer, text, 51, 4)
    assert [window[0] for window in windows] == [tokenizer.bos_token_id] * 4
    assert [window[1:] for window in windows] == [ids[start : start + 50] for start in (0, 83, 166, 250)]
    without_bos = token_windows(byte_level(adds_bos=False), text, 50, 4)
    assert without_bos == [window[1:] for window in windows]


@pytest.mark.parametrize(("num_tokens", "count", "expected"), [(300, 4, 1), (150, 4, 2), (149, 4, 2), (75, 3, 3)])
def test_windows_never_overlap(num_tokens: int, count: int, expected: int) -> None:
    text = Text(name="letters", content="".join(chr(97 + i % 26) for i in range(300)))
    tokenizer = byte_level(adds_bos=False)
    windows = token_windows(tokenizer, text, num_tokens, count)
    assert len(windows) == expected
    ids = encode_plain(tokenizer, text.content)
    starts = [i * (300 - num_tokens) // max(1, expected - 1) for i in range(expected)]
    assert windows == [ids[start : start + num_tokens] for start in starts]
    assert all(after - before >= num_tokens for before, after in pairwise(starts))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the text short has 6 tokens; 7 are needed"):
        token_windows(byte_level(), Text(name="short", content="abcde"), 7, 1)
    assert len(token_windows(byte_level(), Text(name="short", content="abcde"), 6, 1)) == 1


def test_texts_are_named_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.md").write_text("zwei: ü", encoding="utf-8")
    texts = read_texts([tmp_path / "a.txt", str(tmp_path / "b.md")])
    assert texts == [Text(name="a", content="one"), Text(name="b", content="zwei: ü")]


def test_texts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.md").write_text("two")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"missing\.txt can't be read"):
        read_texts([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match=r"latin\.txt can't be read"):
        read_texts([tmp_path / "latin.txt"])
    with pytest.raises(ValueError, match="two texts are named a"):
        read_texts([tmp_path / "a.txt", tmp_path / "a.md"])
