"""Hundreds of spans at once on a GPU: no page handed out twice, and padding that never writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdms.ops import decode_append, decode_attention, prefill_append, release
from tests.ops.harness import DEVICE, GuardedCache, assert_same_state, check_pool, make_cache, split_heads
from tests.ops.rig import FLAG_HALF, FLAG_NONE

pytestmark = pytest.mark.gpu

ROWS, HEADS = 64, 8


def _append(cache: GuardedCache, positions: torch.Tensor, rows: torch.Tensor) -> None:
    k = torch.randn(rows.shape[0], HEADS, 16, device=DEVICE)
    tables = torch.ones(64, 8, device=DEVICE)
    decode_append(
        k, k, k, cache.layer(0), positions=positions, rows=rows, cos=tables, sin=tables, decision=FLAG_NONE, shift=0,
        zero_borrowed="none",
    )  # fmt: skip


def test_512_spans_pop_at_once_until_none_is_left() -> None:
    """Pages of one slot: every append of every span pops. The pool ends in the middle of a step."""
    steps, rows = 30, torch.arange(ROWS, dtype=torch.int32, device=DEVICE)
    cache = make_cache(
        DEVICE, num_rows=ROWS, num_kv_heads=HEADS, page_size=1, max_context=64, num_pages=steps * ROWS * HEADS + 100
    )
    for step in range(steps + 2):
        _append(cache, torch.full_like(rows, step), rows)
    check_pool(cache)
    assert int(cache.num_free) == 0
    lengths = cache.live_len[0].flatten().tolist()
    assert sorted(set(lengths)) == [steps, steps + 1]
    assert lengths.count(steps + 1) == 100
    whole = {row for row in range(ROWS) if set(cache.live_len[0, row].tolist()) == {steps + 1}}
    assert whole.isdisjoint(cache.starved_rows())
    cache.release(list(range(ROWS)))
    assert sorted(cache.free_pages.tolist()) == list(range(cache.config.num_pages))


@pytest.mark.parametrize(("rows", "heads", "rounds"), [(64, 8, 30), (1024, 4, 12)])
def test_chunks_of_different_lengths_pop_and_releases_push_at_once(rows: int, heads: int, rounds: int) -> None:
    """The pool has room for most of a round, so that some rows starve while others pop."""
    generator = torch.Generator().manual_seed(0)
    num_pages = rows * heads * 6
    cache = make_cache(DEVICE, num_rows=rows, num_kv_heads=heads, page_size=4, max_context=64, num_pages=num_pages)
    starved = 0
    for _ in range(rounds):
        lengths = torch.randint(0, 50, (rows,), generator=generator)
        indptr = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        k = torch.randn(positions.numel(), heads, 16, device=DEVICE)
        prefill_append(
            k, k, torch.zeros(k.shape[:2], dtype=torch.bool, device=DEVICE), cache.layer(0),
            positions=positions.int().to(DEVICE), rows=torch.arange(rows, dtype=torch.int32, device=DEVICE),
            chunk_indptr=indptr.int().to(DEVICE), shift=0,
        )  # fmt: skip
        check_pool(cache)
        taken = cache.live_len[0].cpu()
        full = set(range(rows)) - set(cache.starved_rows())
        assert all(taken[row].tolist() == [int(lengths[row])] * heads for row in full)
        starved += rows - len(full)
        release(
            torch.randperm(rows, generator=generator).int().to(DEVICE), page_table=cache.page_table,
            live_len=cache.live_len, free_pages=cache.free_pages, num_free=cache.num_free, starved=cache.starved,
            page_size=4,
        )  # fmt: skip
        cache.k_pages.fill_(torch.nan)
        cache.v_pages.fill_(torch.nan)
        assert sorted(cache.free_pages.tolist()) == list(range(num_pages))
        assert int(cache.num_free) == num_pages
    assert 0 < starved < rounds * rows


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
@pytest.mark.parametrize(("bucket", "real"), [(1, 0), (4, 3), (8, 5), (8, 7)])
def test_padding_writes_nothing_over_200_replayed_steps(bucket: int, real: int, kv_dtype: torch.dtype) -> None:
    """A captured step with padding in all places, against eager steps of the real rows alone."""
    sizes = {"num_rows": 8, "window_tokens": 7, "max_context": 256, "num_pages": 400, "kv_dtype": kv_dtype}
    padded, alone = (make_cache(DEVICE, **sizes, seed=1) for _ in range(2))
    tables = torch.rand(256, 8, device=DEVICE)
    fused = torch.zeros(bucket, 8, 16, device=DEVICE)
    positions = torch.full((bucket,), -1, dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(bucket, dtype=torch.int32, device=DEVICE)

    def step(cache: GuardedCache, fused: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        q, k, v = split_heads(fused, 2)
        batch: dict[str, Any] = {"positions": positions, "rows": rows}
        q = decode_append(
            q, k, v, cache.layer(0), **batch, cos=tables, sin=tables, decision=FLAG_HALF, shift=1, zero_borrowed="none"
        )
        return decode_attention(q, cache.layer(0), **batch, sm_scale=0.25)

    step(padded, fused, positions, rows)  # all padding: compiles, and must not touch the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(padded, fused, positions, rows)
    generator = torch.Generator().manual_seed(bucket)
    for position in range(200):
        places = torch.randperm(bucket, generator=generator)[:real].to(DEVICE)
        fused.copy_(torch.randn(fused.shape, generator=generator))
        positions.fill_(-1)
        positions[places] = position
        rows.fill_(3)  # padding entries name a real row
        rows[places] = torch.arange(real, dtype=torch.int32, device=DEVICE)
        graph.replay()
        if real:
            inputs = fused[places], positions[places], rows[places]
            torch.cuda.synchronize()  # an op may read positions and rows before it waits for the kernel ahead of it
            expected = step(alone, *inputs)
            torch.testing.assert_close(out[places], expected, rtol=1e-4, atol=1e-5)
        idle = positions < 0
        assert not out[idle].any()
    check_pool(padded)
    assert_same_state(padded, alone)
