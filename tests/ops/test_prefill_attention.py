"""prefill_attention: the mask as trained, over what a row holds and over the chunk itself."""

from __future__ import annotations

import pytest
import torch

from fastdms.ops import prefill_attention
from tests.ops.harness import BACKENDS, DEVICE, HEAD_SHAPES, KERNEL_DTYPES, on
from tests.ops.pair import Pair, check_results
from tests.ops.rig import FLAG_ALL, FLAG_HALF, FLAG_NONE, Rig

_FLAGS = pytest.mark.parametrize("decision", [FLAG_NONE, FLAG_HALF, FLAG_ALL], ids=["none", "half", "all"])


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
