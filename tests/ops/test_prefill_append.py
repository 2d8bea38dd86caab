"""prefill_append: which tokens survive a chunk, which slots they take, rings and pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdms.ops import prefill_append
from fastdms.ops.prefill_append import kernel
from fastdms.ops.quantise import quantise
from tests.ops.harness import (
    BACKENDS,
    DEVICE,
    HEAD_SHAPES,
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    STATE,
    assert_same_state,
    check_pool,
    make_cache,
    on,
    span_pages,
    spans,
)
from tests.ops.pair import Pair, check_results
from tests.ops.rig import FLAG_ALL, FLAG_HALF, FLAG_NONE, Rig

_FLAGS = pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("shift", [0, 1])
@_FLAGS
def test_reference_keeps_what_the_definition_keeps(window: int, shift: int, decision: tuple[float, float]) -> None:
    rig = Rig("reference", window=window, shift=shift, decision=decision, max_tokens=160, rows=3)
    for lengths in ([(0, 1), (2, 30)], [(2, 1), (1, 70), (0, 8)], [(0, 9), (1, 0), (2, 40)], [(1, 75), (0, 2)]):
        check_results(rig.prefill(lengths, padding=2))
        rig.check()
    for row in range(3):
        expected = {FLAG_NONE: rig.length(row), FLAG_ALL: min(rig.length(row), window + 1)}.get(decision)
        assert expected is None or rig.cache.live_len[0, row].tolist() == [expected] * 2


@pytest.mark.parametrize(("dtype", "kv_dtype"), REFERENCE_DTYPES)
def test_reference_in_every_dtype(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    rig = Rig("reference", dtype=dtype, kv_dtype=kv_dtype, window=3, shift=1)
    for pieces in ([(0, 11), (1, 2)], [(1, 20), (2, 1)]):
        check_results(rig.prefill(pieces))
    rig.check()


@pytest.mark.wide(5)
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("shift", [0, 1])
@_FLAGS
def test_kernel_equals_reference(window: int, shift: int, decision: tuple[float, float]) -> None:
    with Pair(window=window, shift=shift, decision=decision, rows=2, page_size=4, heads=(1, 1, 16)) as pair:
        for pieces in ([(0, 1), (1, 9)], [(1, 5), (0, 3)], [(0, 12), (1, 0)]):
            pair.prefill(pieces, padding=1)


@pytest.mark.parametrize(("dtype", "kv_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_kernel_in_every_dtype_and_shape(
    heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    with Pair(heads=heads, dtype=dtype, kv_dtype=kv_dtype, window=1, rows=1, page_size=4) as pair:
        for tokens in (5, 3):
            pair.prefill([(0, tokens)])


def test_long_chunk_over_a_long_window() -> None:
    """Longer than the window, shorter than it, longer again."""
    with Pair(window=64, heads=(1, 1, 16), rows=1, max_tokens=160, shift=1) as pair:
        for tokens in (70, 3, 66):
            pair.prefill([(0, tokens)])


@pytest.mark.wide(5)
@pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])
@pytest.mark.parametrize("shift", [0, 1])
def test_ragged_chunks_of_many_tiles_and_turns(
    shift: int, decision: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel in the smallest pieces it can be cut into: two tiles a turn, two programs a tile."""
    monkeypatch.setattr(kernel, "_tiles", lambda *_: (32, 64, 1, 16, 1))
    with Pair(window=7, shift=shift, decision=decision, rows=4, page_size=4, max_tokens=170, num_pages=400) as pair:
        for pieces in ([(0, 70), (1, 0), (3, 33), (2, 1)], [(2, 64), (0, 5), (1, 32)], [(3, 129), (1, 65), (0, 31)]):
            pair.prefill(pieces, padding=1)


@pytest.mark.parametrize("tiles", [None, (32, 128, 1, 32, 1)], ids=["own", "small"])
def test_more_than_the_kernel_plans_in_one_turn(tiles: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 1,024 tokens that leave the window at a time, and of the chunk a turn."""
    if tiles:
        monkeypatch.setattr(kernel, "_tiles", lambda *_: tiles)
    tokens, window = 1040, 1030
    k, flags = torch.randn(2 * tokens, 1, 4), torch.rand(2 * tokens, 1) < 0.5
    caches = []
    for backend in BACKENDS:
        with on(backend) as device:
            cache = make_cache(
                device, num_rows=1, num_kv_heads=1, head_dim=4, page_size=64, window_tokens=window,
                max_context=2 * tokens, num_pages=40,
            )  # fmt: skip
            for start in (0, tokens):
                part = slice(start, start + tokens)
                prefill_append(
                    k[part].to(device), k[part].to(device), flags[part].to(device), cache.layer(0),
                    positions=torch.arange(start, start + tokens, dtype=torch.int32, device=device),
                    rows=torch.zeros(1, dtype=torch.int32, device=device),
                    chunk_indptr=torch.tensor([0, tokens], dtype=torch.int32, device=device), shift=1,
                )  # fmt: skip
        check_pool(cache)
        caches.append(cache)
    assert_same_state(caches[1], caches[0])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_page_edges(page_size: int, offset: int) -> None:
    with Pair(decision=FLAG_NONE, heads=(1, 1, 16), rows=1, page_size=page_size, max_tokens=2 * page_size + 2) as pair:
        pair.prefill([(0, page_size + offset)])
        pair.prefill([(0, page_size)])
        assert pair.kernel.cache.pages_in_use() == (2 if offset < 1 else 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_fills_the_slots_that_it_frees(backend: str) -> None:
    """All tokens flagged: the span stays at W + 1 tokens in the same pages, whatever the chunk."""
    rig = Rig(backend, decision=FLAG_ALL, window=3, page_size=2, rows=1, heads=(1, 1, 16))
    rig.prefill([(0, 4)])
    pages, free = span_pages(rig.cache, 0, 0, 0), int(rig.cache.num_free)
    for tokens in (1, 3, 4, 5, 11):
        rig.prefill([(0, tokens)])
        assert (span_pages(rig.cache, 0, 0, 0), int(rig.cache.num_free)) == (pages, free)
    rig.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_change_nothing(backend: str) -> None:
    rig = Rig(backend)
    rig.prefill([(0, 5), (1, 9)])
    before = rig.cache.copy_to(rig.device)
    rig.prefill([], padding=3)
    rig.prefill([(0, 0), (2, 0)], padding=3)
    rig.prefill([(0, 0), (2, 0)])
    for name in STATE:
        mine, other = getattr(rig.cache, name), getattr(before, name)
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reason", ["pool", "table"])
def test_starved_spans_stay_as_they_are(backend: str, reason: str) -> None:
    """One row too long for the pool or the table, one that fits: the first is marked and its spans stay."""
    limits: dict[str, Any] = {"num_pages": 7} if reason == "pool" else {"max_tokens": 8, "num_pages": 40}
    rig = Rig(backend, decision=FLAG_NONE, page_size=4, rows=2, heads=(2, 1, 16), **limits)
    rig.prefill([(0, 4), (1, 2)])
    before = {span: (int(rig.cache.live_len[span]), rig.cache.ring[span].tolist()) for span in spans(rig.cache)}
    free = int(rig.cache.num_free)
    for attempt in range(2):  # a starved row is left alone, also when its chunk would now fit
        _chunk(rig, [(0, 4, 8 if attempt == 0 else 1), (1, 2 + attempt, 1)])
        assert rig.cache.starved_rows() == [0]
    for span in spans(rig.cache):
        now = (int(rig.cache.live_len[span]), rig.cache.ring[span].tolist())
        if span[1] == 1:
            assert now[0] == before[span][0] + 2
        elif now != before[span]:
            assert now[0] == 12
    taken = sum(len(span_pages(rig.cache, *span)) for span in spans(rig.cache))
    assert taken + int(rig.cache.num_free) == rig.cache.config.num_pages
    assert free - int(rig.cache.num_free) == (2 if reason == "pool" else 0)
    rig.release([0])
    rig.prefill([(0, 5)])
    rig.cache.check_guards()
    assert rig.cache.starved_rows() == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spare", [0, 1, 6, 7, 40])
def test_the_last_page_is_taken(backend: str, spare: int) -> None:
    """Two chunks that need 12 pages of as many, some more, and about as many as any chunk of the length may take."""
    rig = Rig(backend, decision=FLAG_NONE, page_size=4, rows=2, heads=(2, 1, 16), num_pages=12 + spare)
    rig.prefill([(0, 4), (1, 5)])
    rig.prefill([(0, 8), (1, 6)])
    rig.check()
    assert rig.cache.starved_rows() == []
    assert int(rig.cache.num_free) == spare


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_page_goes_to_one_of_four(backend: str) -> None:
    """Chunks of one token, for which each span opens a page: no page is taken that isn't there."""
    rig = Rig(backend, decision=FLAG_NONE, page_size=4, rows=2, heads=(2, 1, 16), num_pages=5)
    rig.prefill([(0, 4), (1, 4)])
    _chunk(rig, [(0, 4, 1), (1, 4, 1)])
    assert int(rig.cache.num_free) == 0
    assert rig.cache.starved_rows() == [0, 1]
    assert sorted(rig.cache.live_len.flatten().tolist()) == [4, 4, 4, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_fp8_pages_hold_what_quantise_makes(head_dim: int, dtype: torch.dtype) -> None:
    """To the bit, for tokens of any magnitude, zeros of both signs and all-zero tokens."""
    tokens, heads = 700, 2
    generator = torch.Generator().manual_seed(head_dim)
    values = torch.randn(2, tokens, heads, head_dim, generator=generator)
    values *= 2.0 ** torch.randint(-12, 13, values.shape, generator=generator)
    if dtype != torch.float16:
        values *= 2.0 ** torch.randint(-110, 100, (2, tokens, heads, 1), generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.1] = -0.0
    values[:, 5] = 0.0
    k, v = values.to(dtype)
    cache = make_cache(
        DEVICE, num_rows=1, num_kv_heads=heads, head_dim=head_dim, page_size=64, max_context=tokens, num_pages=30,
        kv_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    prefill_append(
        k.to(DEVICE), v.to(DEVICE), torch.zeros(tokens, heads, dtype=torch.bool, device=DEVICE), cache.layer(0),
        positions=torch.arange(tokens, dtype=torch.int32, device=DEVICE),
        rows=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        chunk_indptr=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE), shift=0,
    )  # fmt: skip
    for given, pages, scales in ((k, cache.k_pages, cache.k_scales), (v, cache.v_pages, cache.v_scales)):
        for head in range(heads):
            expected, scale = quantise(given[:, head].float(), torch.float8_e4m3fn)
            held = span_pages(cache, 0, 0, head)
            stored = pages.cpu().view(torch.uint8)[held].flatten(0, 1)[:tokens]
            assert torch.equal(stored, expected.view(torch.uint8))
            assert scale is not None
            assert torch.equal(scales.cpu()[held].flatten()[:tokens], scale)


def _chunk(rig: Rig, pieces: list[tuple[int, int, int]]) -> None:
    """(row, start, tokens) of ones, without the rig's books."""
    positions = [start + i for _, start, n in pieces for i in range(n)]
    indptr = [0]
    for _, _, n in pieces:
        indptr.append(indptr[-1] + n)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=rig.device)

    k = torch.ones(len(positions), 2, 16, device=rig.device)
    with on(rig.backend):
        prefill_append(
            k, k, torch.zeros(len(positions), 2, dtype=torch.bool, device=rig.device), rig.layer,
            positions=ints(positions), rows=ints([row for row, _, _ in pieces]), chunk_indptr=ints(indptr), shift=0,
        )  # fmt: skip


def test_bad_input_is_named() -> None:
    rig = Rig("reference")
    k = torch.zeros(3, 2, 16)
    good = {
        "positions": torch.zeros(3, dtype=torch.int32), "rows": torch.zeros(1, dtype=torch.int32),
        "chunk_indptr": torch.tensor([0, 3], dtype=torch.int32), "shift": 0,
    }  # fmt: skip
    flags = torch.zeros(3, 2, dtype=torch.bool)
    for change, message in (
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions"),
        ({"rows": torch.zeros(1, dtype=torch.int64)}, "rows"),
        ({"chunk_indptr": torch.zeros(3, dtype=torch.int32)}, "chunk_indptr"),
        ({"shift": 2}, "shift"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_append(k, k, flags, rig.layer, **{**good, **change})  # type: ignore[arg-type]
    for keys, values, decisions, message in (
        (k[:, :1], k[:, :1], flags[:, :1], "k and v"),
        (k, k[:2], flags, "k and v"),
        (k, k, flags[:2], "decisions"),
        (k, k, flags.int(), "decisions"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_append(keys, values, decisions, rig.layer, **good)  # type: ignore[arg-type]
