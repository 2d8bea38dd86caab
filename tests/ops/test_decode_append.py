"""decode_append: decision, zeroing, RoPE, quantised store, slot choice, ring, page pop, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastdms.ops import decision_constants, decode_append
from fastdms.ops.rope_decide import ZERO_MODES
from tests.ops.harness import HEAD_SHAPES, KERNEL_DTYPES, REFERENCE_DTYPES, STATE, make_cache, on, spans
from tests.ops.pair import Pair, check_results, random_step
from tests.ops.rig import FLAG_ALL, FLAG_HALF, FLAG_NONE, Rig


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])
def test_reference_keeps_what_the_definition_keeps(window: int, shift: int, decision: tuple[float, float]) -> None:
    rig = Rig("reference", window=window, shift=shift, decision=decision, page_size=16, max_tokens=80)
    for step in range(80):
        check_results(rig.decode([0] if step % 4 else [0, -1, 2]))
    rig.check()
    live = rig.cache.live_len[0, 0].tolist()
    expected = {FLAG_NONE: 80, FLAG_ALL: min(80, window + 1)}.get(decision)
    # With shift 1 and W = 0 the newest token's flag is open, yet it is alone in the window.
    assert expected is None or live == [expected] * 2


@pytest.mark.parametrize(("dtype", "kv_dtype"), REFERENCE_DTYPES)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_reference_in_every_dtype_and_shape(
    heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    rig = Rig("reference", heads=heads, dtype=dtype, kv_dtype=kv_dtype, window=1, zero_borrowed="pre_rope")
    for _ in range(5):
        check_results(rig.decode([2, -1, 0]))
    rig.check()


@pytest.mark.parametrize("use_norms", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("use_alpha", [False, True], ids=["borrowed", "alpha"])
@pytest.mark.parametrize("zero_borrowed", ZERO_MODES)
@pytest.mark.parametrize("shift", [0, 1])
def test_kernel_equals_reference_in_every_variant(
    shift: int, zero_borrowed: str, use_alpha: bool, use_norms: bool
) -> None:
    options = {"shift": shift, "zero_borrowed": zero_borrowed, "use_alpha": use_alpha, "use_norms": use_norms}
    with Pair(**options, heads=(1, 2, 16), rows=2, window=1, page_size=4) as pair:
        for _ in range(5):
            pair.decode([1, -1, 0])


@pytest.mark.parametrize(("dtype", "kv_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_kernel_equals_reference_in_every_dtype_and_shape(
    heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    with Pair(heads=heads, dtype=dtype, kv_dtype=kv_dtype, window=0, rows=2, page_size=2, use_norms=True) as pair:
        for _ in range(3):
            pair.decode([1, 0])


@pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
def test_kernel_equals_reference_past_the_window(window: int, shift: int, decision: tuple[float, float]) -> None:
    with Pair(window=window, shift=shift, decision=decision, heads=(1, 1, 16), rows=1, max_tokens=80) as pair:
        pair.prefill([(0, max(1, window - 1))])
        for _ in range(5):
            pair.decode([0])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF], ids=["dense", "evicting"])
def test_page_edges(page_size: int, pages: int, decision: tuple[float, float]) -> None:
    """From one slot below a full page to one above; a pool that held huge values changes nothing."""
    with Pair(decision=decision, heads=(1, 1, 16), rows=1, page_size=page_size, max_tokens=3 * page_size) as pair:
        length = pages * page_size
        while int(pair.reference.cache.live_len.min()) < length - 1 and pair.reference.length(0) < 3 * page_size - 4:
            wanted = length - 1 - int(pair.reference.cache.live_len.min())
            pair.prefill([(0, min(wanted, 3 * page_size - 4 - pair.reference.length(0)))])
        for _ in range(3):
            pair.decode([0])
        if decision == FLAG_NONE:
            assert pair.reference.cache.live_len.item() == length + 2
            assert pair.reference.cache.pages_in_use() == pages + 1


def test_random_batches_with_padding() -> None:
    generator = torch.Generator().manual_seed(1)
    with Pair(window=3, page_size=4, rows=4, heads=(2, 1, 16), shift=1) as pair:
        for _ in range(12):
            pair.decode(random_step(generator, 4))
            if torch.rand((), generator=generator) < 0.2:
                pair.release([int(torch.randint(4, (), generator=generator))])


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_padding_alone_touches_nothing(backend: str) -> None:
    rig = Rig(backend)
    rig.prefill([(0, 5), (1, 9)])
    before = rig.cache.copy_to(rig.device)
    results = rig.decode([-1, -1])
    assert not results.out.any()
    assert not results.q.any()
    for name in STATE:
        mine, other = getattr(rig.cache, name), getattr(before, name)
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_padding_of_nan_comes_out_as_zero(backend: str) -> None:
    rig = Rig(backend)
    nan = {heads: torch.full((1, heads, 16), math.nan, device=rig.device) for heads in (2, 4)}
    with on(backend):
        out = decode_append(
            nan[4], nan[2], nan[2], rig.layer, positions=torch.tensor([-1], dtype=torch.int32, device=rig.device),
            rows=torch.zeros(1, dtype=torch.int32, device=rig.device), cos=rig.cos.to(rig.device),
            sin=rig.sin.to(rig.device), decision=FLAG_ALL, shift=0, zero_borrowed="none",
        )  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))
    rig.check()


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_the_last_page_is_taken(spare: int) -> None:
    """Three rows begin a page at once, where there are as many, or more."""
    for backend in ("reference", "kernel"):
        rig = Rig(backend, decision=FLAG_NONE, page_size=4, heads=(2, 1, 16), num_pages=12 + spare)
        rig.prefill([(0, 4), (1, 4), (2, 4)])
        rig.decode([2, -1, 0, 1])
        rig.check()
        assert rig.cache.starved_rows() == []
        assert int(rig.cache.num_free) == spare


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_empty_batch(backend: str) -> None:
    rig = Rig(backend)
    none = torch.zeros(0, dtype=torch.int32, device=rig.device)
    q, k = (torch.zeros(0, heads, 16, device=rig.device) for heads in (4, 2))
    with on(backend):
        out = decode_append(
            q, k, k, rig.layer, positions=none, rows=none, cos=rig.cos.to(rig.device), sin=rig.sin.to(rig.device),
            decision=FLAG_ALL, shift=0, zero_borrowed="none",
        )  # fmt: skip
    assert out.shape == q.shape
    rig.check()


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("reason", ["pool", "table"])
def test_starved_rows_stay_as_they_are(backend: str, reason: str) -> None:
    """No page free, or a span as long as its page table: the span stays, the row is marked, others go on."""
    limits: dict[str, Any] = {"num_pages": 5} if reason == "pool" else {"max_tokens": 8, "num_pages": 40}
    rig = Rig(backend, decision=FLAG_NONE, page_size=4, rows=2, heads=(2, 1, 16), **limits)
    rig.prefill([(0, 8), (1, 3)] if reason == "table" else [(0, 4), (1, 3)])
    rig.decode([1])
    assert rig.cache.starved_rows() == []
    before = {span: (int(rig.cache.live_len[span]), rig.cache.ring[span].tolist()) for span in spans(rig.cache)}
    free = int(rig.cache.num_free)
    for attempt in range(3):
        _append_raw(rig, row=0, position=rig.length(0) + attempt)
        assert rig.cache.starved_rows() == [0]
    grown = 0
    for span in spans(rig.cache):
        now = (int(rig.cache.live_len[span]), rig.cache.ring[span].tolist())
        if now != before[span]:
            assert span[1] == 0
            assert now[0] == before[span][0] + 1
            grown += 1
    assert grown == free - int(rig.cache.num_free) == (1 if reason == "pool" else 0)
    rig.release([0])
    rig.check()
    rig.prefill([(0, 2)])
    rig.decode([0])
    assert rig.cache.starved_rows() == []


@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("entry", [-(2**31) + 1, -1, 2**31 - 1])
def test_a_starved_row_reads_nothing_outside(backend: str, entry: int) -> None:
    """Its ring is void: there may be anything in it, flagged or not."""
    rig = Rig(backend, window=3, rows=2, page_size=4, heads=(2, 1, 16))
    rig.prefill([(0, 6), (1, 5)])
    rig.cache.starved[0] = 1
    rig.cache.ring[0, 0] = entry
    state = rig.cache.copy_to(rig.device)
    _append_raw(rig, row=0, position=9)
    for name in ("ring", "live_len", "page_table", "num_free", "starved"):
        assert torch.equal(getattr(rig.cache, name), getattr(state, name)), name
    rig.cache.check_guards()


def _append_raw(rig: Rig, row: int, position: int) -> None:
    ones = {heads: torch.ones(1, heads, 16, device=rig.device) for heads in (1, 2)}
    position = min(position, rig.cos.shape[0] - 1)
    with on(rig.backend):
        decode_append(
            ones[2], ones[2], ones[2], rig.layer,
            positions=torch.tensor([position], dtype=torch.int32, device=rig.device),
            rows=torch.tensor([row], dtype=torch.int32, device=rig.device),
            cos=rig.cos.to(rig.device), sin=rig.sin.to(rig.device), decision=FLAG_NONE, shift=0, zero_borrowed="none",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "offset", "strength", "evicts"),
    [
        (100.0, 5.0, 0.050048828125, True),  # the one bf16 value on which bf16 and fp32 arithmetic disagree
        (100.0, 5.0, 0.05, False),  # equal in fp32: not above
        (100.0, 5.0, 0.0498046875, False),
        (-100.0, 5.0, -0.0625, True),
        (-100.0, 5.0, 0.0625, False),
        (0.0, -1.0, 0.0, True),
        (0.0, 1.0, 9.0, False),
        (1.0, math.inf, math.inf, False),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_decision_constants(backend: str, scale: float, offset: float, strength: float, evicts: bool) -> None:
    cache = make_cache(num_kv_heads=1, num_rows=1)
    with on(backend) as device:
        cache = cache.copy_to(device)
        q = torch.zeros(1, 1, 16, device=device)
        alpha = torch.full((1, 1), strength, device=device)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        decode_append(
            q, q, q, cache.layer(0), positions=zero, rows=zero, cos=torch.ones(1, 8, device=device),
            sin=torch.zeros(1, 8, device=device), decision=decision_constants(scale, offset), shift=0,
            zero_borrowed="none", alpha=alpha,
        )  # fmt: skip
    assert bool(cache.ring[0, 0, 0, 0] & 1) == evicts
