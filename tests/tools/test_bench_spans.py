"""The spans that ``fastdms bench kernels`` builds: how long each is, and a cache that decoding goes on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdms.cache import CompactCache
from fastdms.ops import KV_DTYPES, decode_append
from fastdms.tools.bench.spans import filled_cache, span_lengths
from tests.ops.harness import read_span


@pytest.mark.parametrize("num_spans", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "one-keeps-all"])
def test_span_lengths_share_out_the_same_tokens(kind: str, num_spans: int) -> None:
    lengths = span_lengths(kind, num_spans, 1000)
    assert sum(lengths) == 1000 * num_spans
    assert len(lengths) == num_spans
    ordered = sorted(lengths, reverse=True)
    assert ordered[-1] > 0
    if kind == "uniform":
        assert ordered[0] == ordered[-1] == 1000
    if kind == "zipf" and num_spans > 1:
        assert ordered[0] / ordered[1] == pytest.approx(2, abs=0.01)
        assert ordered[0] / ordered[-1] == pytest.approx(num_spans, rel=0.01)
    if kind == "one-keeps-all" and num_spans > 1:
        assert ordered[1] - ordered[-1] <= 1
        longest = {2: 1875, 8: 7125, 64: 8000}[num_spans]
        assert abs(ordered[0] - longest) <= 1


def test_span_lengths_are_shuffled_but_the_same_each_run() -> None:
    first = span_lengths("zipf", 16, 100, seed=3)
    assert first == span_lengths("zipf", 16, 100, seed=3)
    assert first != sorted(first, reverse=True)
    assert min(span_lengths("zipf", 16, 100, least=40)) == 40


def _filled(kv_dtype: str = "bf16", **fields: Any) -> tuple[CompactCache, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([[[9, 12], [8, 8]], [[30, 8], [11, 8]]])
    arguments: dict[str, Any] = {
        "head_dim": 16, "kv_dtype": KV_DTYPES[kv_dtype], "window_tokens": 7, "page_size": 4, "flagged_share": 0.5,
        "device": torch.device("cpu"),
    }  # fmt: skip
    cache, positions = filled_cache(lengths, **(arguments | fields))
    return cache, positions, lengths


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "fp32"])
def test_a_filled_cache_holds_the_invariants(kv_dtype: str) -> None:
    cache, positions, lengths = _filled(kv_dtype)
    assert torch.equal(cache.live_len.long(), lengths)
    assert positions.tolist() == [30, 11]
    _check_pages(cache)
    assert int(cache.num_free) == lengths.numel(), "one page more for each span"
    for layer, row, head in torch.cartesian_prod(*(torch.arange(2) for _ in range(3))).tolist():
        keys, values = read_span(cache, layer, row, head)
        assert 0.5 < float(keys.std()) < 1.5
        assert not torch.equal(keys, values)
        live, seen = int(lengths[layer, row, head]), int(positions[row])
        slots = [int(cache.ring[layer, row, head, token % 8]) >> 1 for token in range(seen - 8, seen)]
        assert slots == list(range(live - 8, live)), "the last W + 1 tokens lie in the last slots"
    flagged = (cache.ring & 1).float().mean()
    assert 0.2 < float(flagged) < 0.8
    assert not (_filled(flagged_share=0.0)[0].ring & 1).any()
    assert bool((_filled(flagged_share=1.0)[0].ring & 1).all())


def _check_pages(cache: CompactCache) -> None:
    held = -(-cache.live_len // cache.config.page_size)
    pages = cache.page_table[torch.arange(cache.config.max_pages) < held[..., None]]
    free = cache.free_pages[: int(cache.num_free)]
    assert sorted(torch.cat((pages, free)).tolist()) == list(range(cache.config.num_pages))


def test_a_span_shorter_than_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least the tokens of its window, 9, got 8"):
        _filled(window_tokens=8)


@pytest.mark.parametrize(("flagged_share", "grown"), [(0.0, 1), (1.0, 0)])
def test_decoding_goes_on_from_a_filled_cache(flagged_share: float, grown: int) -> None:
    cache, positions, lengths = _filled(flagged_share=flagged_share)
    for step in range(3):
        q, k, v = (torch.randn(2, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
        for layer in range(2):
            decode_append(
                q, k, v, cache.layer(layer), positions=positions + step, rows=torch.arange(2, dtype=torch.int32),
                cos=torch.ones(40, 8), sin=torch.zeros(40, 8), decision=(1.0, float("inf")), shift=0,
                zero_borrowed="none",
            )  # fmt: skip
    assert torch.equal(cache.live_len.long(), lengths + 3 * grown)
    assert not cache.starved.any()
    _check_pages(cache)
