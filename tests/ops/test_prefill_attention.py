"""prefill_attention: the mask as trained, over what a row holds and over the chunk itself."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastdms.ops import prefill_attention
from fastdms.ops.chunk import window_flags
from tests.ops.harness import BACKENDS, DEVICE, HEAD_SHAPES, KERNEL_DTYPES, on
from tests.ops.pair import Pair, check_results
from tests.ops.rig import FLAG_ALL, FLAG_HALF, FLAG_NONE, Rig
from tests.tolerance import assert_logits_close

_FLAGS = pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])


@pytest.mark.wide(5)
@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("shift", [0, 1])
@_FLAGS
def test_ragged_chunks(window: int, shift: int, decision: tuple[float, float]) -> None:
    """Rows of uneven history, one of them new, one without tokens; blocks that end inside and at a tile."""
    with Pair(window=window, shift=shift, decision=decision, heads=(1, 2, 16), rows=3, max_tokens=90) as pair:
        pair.prefill([(1, 3)])
        pair.prefill([(0, 1), (2, 0), (1, 33)], padding=2)
        pair.prefill([(2, 2), (1, 32)])


@pytest.mark.parametrize(("dtype", "kv_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_shapes_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    with Pair(heads=heads, dtype=dtype, kv_dtype=kv_dtype, window=3, rows=1, shift=1, zero_borrowed="pre_rope") as pair:
        for tokens in (9, 5):
            pair.prefill([(0, tokens)])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF], ids=["none", "half"])
def test_page_edges(page_size: int, offset: int, decision: tuple[float, float]) -> None:
    """History that ends around a page's end; the slots after it and all other pages are NaN."""
    rig = Rig("reference", decision=decision, page_size=page_size, max_tokens=200, window=3)
    for pages in (1, 2, 3):
        while int(rig.cache.live_len[0, 0].max()) < pages * page_size + offset and rig.length(0) < 199:
            check_results(rig.prefill([(0, 1 if decision == FLAG_HALF else page_size + (offset if pages == 1 else 0))]))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_kernel_at_page_edges(page_size: int, offset: int) -> None:
    with Pair(decision=FLAG_NONE, page_size=page_size, max_tokens=page_size + 4, heads=(1, 1, 16), rows=1) as pair:
        pair.prefill([(0, page_size + offset)])
        pair.prefill([(0, 2)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_history_and_window(dtype: torch.dtype) -> None:
    with Pair(window=256, heads=(1, 4, 64), rows=1, max_tokens=1600, page_size=64, dtype=dtype, shift=1) as pair:
        for tokens in (1100, 300):
            pair.prefill([(0, tokens)])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100, 256])
@pytest.mark.parametrize("heads", [(2, 1, 64), (1, 3, 128), (1, 4, 64), (1, 5, 64), (1, 8, 128)], ids=str)
def test_long_ragged_chunks(window: int, heads: tuple[int, int, int]) -> None:
    """Kept keys, late ones and the window, each of several tiles that Hopper's kernel takes, or of a part of one."""
    options = {"page_size": 64, "num_pages": 128, "max_tokens": 1100, "dtype": torch.bfloat16}
    with Pair(window=window, heads=heads, rows=3, **options) as pair:
        pair.prefill([(0, 257), (1, 127)])
        pair.prefill([(1, 513), (0, 300), (2, 1)], padding=5)
        pair.prefill([(2, 640), (0, 1), (1, 128)])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_neighbours_nan_stays_there(head_dim: int) -> None:
    """Another row's tokens follow a chunk's own within a tile, in the chunk and among the packed keys."""
    rig = Rig("kernel", heads=(2, 4, head_dim), rows=2, dtype=torch.bfloat16, window=30, max_tokens=400)
    rig.prefill([(0, 150), (1, 40)])
    q, k, v = (torch.randn(350, heads, head_dim, device=rig.device, dtype=rig.dtype) for heads in (8, 2, 2))
    decisions = torch.rand(350, 2, device=rig.device) < 0.5

    def attend() -> torch.Tensor:
        def ints(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=rig.device)

        with on(rig.backend):
            return prefill_attention(
                q, k, v, decisions, rig.layer, positions=ints(*range(150, 350), *range(40, 190)), rows=ints(0, 1),
                chunk_indptr=ints(0, 200, 350), shift=0, sm_scale=0.1,
            )  # fmt: skip

    finite = attend()
    k[200:], v[200:] = torch.nan, torch.nan
    assert finite.isfinite().all()
    assert torch.equal(attend()[:200], finite[:200])


def test_every_flag_is_seen_at_every_distance() -> None:
    """One flagged key at a time; each query's output tells whether it saw it."""
    window, tokens = 3, 12
    for backend in BACKENDS if DEVICE.type == "cuda" else BACKENDS[:1]:
        rig = Rig(backend, window=window, rows=1, heads=(1, 1, 16))
        k = torch.zeros(tokens, 1, 16, device=rig.device)
        v = torch.eye(tokens, 16, device=rig.device)[:, None]  # output channel j: the weight of key j
        for flagged in range(tokens):
            decisions = torch.zeros(tokens, 1, dtype=torch.bool, device=rig.device)
            decisions[flagged] = True
            for shift in (0, 1):
                out = _attend_whole(rig, k, v, decisions, shift)
                victim = flagged - shift
                for query in range(tokens):
                    seen = [key for key in range(query + 1) if key != victim or query - key <= window]
                    expected = torch.zeros(16)
                    expected[seen] = 1 / len(seen)
                    torch.testing.assert_close(out[query, 0].cpu(), expected)


def _attend_whole(rig: Rig, k: torch.Tensor, v: torch.Tensor, decisions: torch.Tensor, shift: int) -> torch.Tensor:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=rig.device)

    with on(rig.backend):
        return prefill_attention(
            k, k, v, decisions, rig.layer, positions=ints(*range(k.shape[0])), rows=ints(0),
            chunk_indptr=ints(0, k.shape[0]), shift=shift, sm_scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_starved_row_reads_nothing_outside(backend: str) -> None:
    """Its ring is older than its chunk's positions; what comes out is thrown away, but it must not fault or spread."""
    rig = Rig(backend, window=3, rows=2)
    rig.prefill([(0, 6), (1, 5)])
    rig.cache.starved[0] = 1
    rig.cache.ring[0, 0] = torch.tensor([60 << 1 | 1, 9 << 1 | 1, 63 << 1 | 1, -5], device=rig.device)
    state = rig.cache.copy_to(rig.device)
    k = torch.randn(6, 2, 16, device=rig.device)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=rig.device)

    outputs = []
    for start in (6, 40):
        with on(backend):
            outputs.append(
                prefill_attention(
                    k, k, k, torch.ones(6, 2, dtype=torch.bool, device=rig.device), rig.layer,
                    positions=ints(start, start + 1, start + 2, 5, 6, 7), rows=ints(0, 1), chunk_indptr=ints(0, 3, 6),
                    shift=0, sm_scale=1.0,
                )
            )  # fmt: skip
    assert torch.equal(outputs[0][3:], outputs[1][3:])
    assert outputs[1].isfinite().all()
    assert torch.equal(rig.cache.ring, state.ring)
    rig.cache.check_guards()


_TILES = [(16, 16, 4, 1, False), (32, 16, 4, 2, True), (16, 32, 4, 2, False)]


def _kernel_module() -> Any:
    return importlib.import_module("fastdms.ops.prefill_attention.kernel")  # the package exports the op by this name


@pytest.mark.wide(4)
@pytest.mark.parametrize("tile", _TILES, ids=str)
@pytest.mark.parametrize(("window", "shift"), [(15, 0), (16, 1), (30, 0)])
@_FLAGS
def test_any_tile(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int, int, bool], window: int, shift: int,
    decision: tuple[float, float],
) -> None:  # fmt: skip
    """Windows, chunks and kept keys that end around a tile's end; history, ring and chunk in each call."""
    kernel = _kernel_module()
    monkeypatch.setattr(kernel, "attend_tile", lambda *_: kernel.Tile(*tile))
    with Pair(window=window, shift=shift, decision=decision, heads=(1, 2, 16), rows=2, max_tokens=120) as pair:
        for pieces in ([(0, 33)], [(0, 16), (1, 47)], [(1, 17), (0, 31)]):
            pair.prefill(pieces)


@pytest.mark.parametrize(("group", "rows", "window"), [(1, 16, 5), (3, 16, 5), (7, 16, 5), (7, 128, 40)])
def test_a_group_that_leaves_rows_of_the_tile_empty(
    monkeypatch: pytest.MonkeyPatch, group: int, rows: int, window: int
) -> None:
    """In the last case 17 keys are out of some query's window, one more than a tile has."""
    kernel = _kernel_module()
    monkeypatch.setattr(kernel, "attend_tile", lambda *_: kernel.Tile(rows, 16, 4, 1))
    with Pair(window=window, heads=(2, group, 16), rows=1, max_tokens=120) as pair:
        for tokens in (100 if window > 20 else 21, 18):
            pair.prefill([(0, tokens)], padding=19)


def test_more_grouped_heads_than_a_tile_has_rows() -> None:
    with Pair(heads=(1, 130, 16), dtype=torch.float16, kv_dtype=torch.float16, window=3, rows=1) as pair:
        pair.prefill([(0, 9)])
        pair.decode([0])


def test_holes_are_filled_from_the_tail() -> None:
    """Slots of flagged tokens in the window lie among those that stay and after them."""
    with Pair(window=20, heads=(2, 1, 16), rows=2, max_tokens=140, shift=1) as pair:
        for pieces in ([(0, 50), (1, 3)], [(0, 30), (1, 20)], [(0, 9), (1, 40)], [(0, 17), (1, 2)]):
            rig, holes, last = pair.reference, 0, 0
            for row, _ in pieces if rig.length(0) else []:
                for head in range(2):
                    live, ring = int(rig.cache.live_len[0, row, head]), rig.cache.ring[0, row, head]
                    flags = window_flags(ring, torch.zeros(1, dtype=torch.bool), rig.length(row), 0)
                    late = flags[1][flags[2]]
                    holes += int((late < live - late.numel()).sum())
                    last += int((late >= live - late.numel()).sum())
            assert rig.length(0) < 60 or (holes > 5 and last > 5)
            pair.prefill(pieces)


@pytest.mark.parametrize("name", ["_WORKSPACE_BYTES", "_PACK_PROGRAMS", "_TILE", "_RING_TILE"])
def test_work_in_many_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rows in turns, several tiles for each packing program, several tiles of a chunk and of a ring."""
    monkeypatch.setattr(_kernel_module(), name, {"_TILE": 4, "_RING_TILE": 4}.get(name, 1))
    with Pair(window=11, heads=(2, 2, 16), rows=3, max_tokens=120) as pair:
        pair.prefill([(2, 40), (1, 75)], padding=3)
        pair.prefill([(0, 20), (1, 9), (2, 33)], padding=1)
        pair.prefill([(2, 1), (0, 0), (1, 12)])


def test_full_spans_fill_the_workspace() -> None:
    """Nothing flagged, every slot of every page taken: the packed part is as long as it can be."""
    with Pair(decision=FLAG_NONE, heads=(2, 1, 16), rows=2, max_tokens=32, num_pages=8, window=2) as pair:
        pair.prefill([(0, 31), (1, 16)])
        pair.prefill([(1, 16), (0, 1)])


def test_any_scale() -> None:
    for scale in (-1.0, -1e-46, 0.0, 1e-46, 1e-30, 2.0):
        outputs = []
        for backend in BACKENDS:
            rig = Rig(backend, rows=1, window=3)
            rig.prefill([(0, 20)])
            rig.sm_scale = scale
            outputs.append(rig.prefill([(0, 20)]).out)
        assert_logits_close(outputs[1], outputs[0])


def test_bad_input_is_named() -> None:
    rig = Rig("reference")
    q, k = torch.zeros(3, 4, 16), torch.zeros(3, 2, 16)
    good = {
        "positions": torch.zeros(3, dtype=torch.int32), "rows": torch.zeros(1, dtype=torch.int32),
        "chunk_indptr": torch.tensor([0, 3], dtype=torch.int32), "shift": 0, "sm_scale": 1.0,
    }  # fmt: skip
    flags = torch.zeros(3, 2, dtype=torch.bool)
    for queries, keys, values, message in (
        (q[:, :3], k, k, "heads"),
        (q[..., :8], k, k, "head_dim"),
        (q[:2], k, k, "tokens"),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, k, "stride"),
        (q.int(), k, k, "floating"),
        (q, k, k[:, :1], "k and v"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_attention(queries, keys, values, flags, rig.layer, **good)  # type: ignore[arg-type]
    bad_caches = (
        (rig.layer._replace(k_pages=rig.layer.k_pages.half()), "alike"),
        (rig.layer._replace(ring=rig.layer.ring[:1]), "ring"),
        (rig.layer._replace(live_len=rig.layer.live_len.long()), "live_len"),
        (rig.layer._replace(k_scales=torch.zeros(64, 16, dtype=torch.bfloat16)), "scales"),
        (rig.layer._replace(page_table=rig.layer.page_table[..., ::2]), "page_table"),
    )
    for cache, message in bad_caches:
        with pytest.raises(ValueError, match=message):
            prefill_attention(q, k, k, flags, cache, **good)  # type: ignore[arg-type]
