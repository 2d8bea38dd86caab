"""decode_attention: spans of very different lengths, cut evenly over the programs and put together again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastdms.ops import decode_attention
from fastdms.ops.decode_attention.split_kernel import Tiles
from tests.ops.definition import attend
from tests.ops.harness import (
    BACKENDS,
    HEAD_SHAPES,
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    GuardedCache,
    assert_close_to_definition,
    check_pool,
    fill_spans,
    make_cache,
    on,
    read_span,
)
from tests.tolerance import assert_within_error_budget

# The interpreter is right about fp8 that is only read, unless it is computed with in bf16.
_READ_DTYPES = [
    *KERNEL_DTYPES[:5],
    pytest.param(torch.float16, torch.float8_e4m3fn, id="fp16-fp8"),
    pytest.param(torch.float32, torch.float8_e4m3fn, id="fp32-fp8"),
]
# One row's spans each; S is 16: none, one, around a page, around the kernel's tile of 64, and one long head.
UNEVEN = [[0, 1], [15, 16], [17, 48], [63, 64], [65, 0], [330, 2]]


def _cache(lengths: list[list[int]], dtype: torch.dtype = torch.float32, **sizes: Any) -> GuardedCache:
    longest = max(max(heads) for heads in lengths)
    cache = make_cache(
        num_rows=len(lengths), num_kv_heads=len(lengths[0]), kv_dtype=dtype, max_context=max(longest, 1),
        **{"num_pages": 80, **sizes},
    )  # fmt: skip
    fill_spans(cache, lengths, lambda n: torch.randn(n, cache.config.head_dim))
    return cache


def _run(
    backend: str, cache: GuardedCache, q: torch.Tensor, rows: list[int], positions: list[int], scale: float = 0.25
) -> torch.Tensor:
    with on(backend) as device:
        here = cache.copy_to(device)
        out = decode_attention(
            q.to(device), here.layer(0), positions=torch.tensor(positions, dtype=torch.int32, device=device),
            rows=torch.tensor(rows, dtype=torch.int32, device=device), sm_scale=scale,
        )  # fmt: skip
        here.check_guards()
    return out.cpu()


def _oracle(
    cache: GuardedCache, q: torch.Tensor, rows: list[int], positions: list[int], scale: float = 0.25
) -> torch.Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    heads = cache.config.num_kv_heads
    group = q.shape[1] // heads
    for b, (row, position) in enumerate(zip(rows, positions, strict=True)):
        for head in range(heads if position >= 0 else 0):
            keys, values = read_span(cache, 0, row, head)
            own = slice(head * group, (head + 1) * group)
            out[b, own] = attend(q[b, own].double(), list(keys), list(values), scale)
    return out


def compare(cache: GuardedCache, q: torch.Tensor, rows: list[int], positions: list[int], scale: float = 0.25) -> None:
    reference, kernel = (_run(backend, cache, q, rows, positions, scale) for backend in BACKENDS)
    oracle = _oracle(cache, q, rows, positions, scale)
    assert_close_to_definition(reference, oracle)
    assert_within_error_budget(kernel, reference, oracle)
    padded = torch.tensor(positions) < 0
    assert not kernel[padded].any()
    assert not reference[padded].any()


def test_uneven_spans_and_padding() -> None:
    """Everything in one batch; the pool's other slots are NaN."""
    cache = _cache(UNEVEN)
    check_pool(cache)
    q = torch.randn(8, 4, 16)
    compare(cache, q, [5, 0, 3, 0, 1, 4, 0, 2], [400, 7, 80, -1, 20, 65, -1, 50])


@pytest.mark.parametrize("rows", [[5], [0], [4, 5], [5, 4, 3]], ids=str)
def test_any_part_of_the_batch(rows: list[int]) -> None:
    compare(_cache(UNEVEN), torch.randn(len(rows), 2, 16), rows, [400] * len(rows))


@pytest.mark.parametrize(("dtype", "kv_dtype"), _READ_DTYPES)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_shapes_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    num_kv_heads, group, head_dim = heads
    cache = _cache([[70] * num_kv_heads, [3] * num_kv_heads], kv_dtype, head_dim=head_dim)
    fused = torch.randn(2, num_kv_heads * (group + 2), head_dim).to(dtype)
    compare(cache, fused[:, : num_kv_heads * group], [1, 0], [9, 99])


@pytest.mark.parametrize(("dtype", "kv_dtype"), REFERENCE_DTYPES)
def test_reference_in_every_dtype(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    cache = _cache(UNEVEN, kv_dtype)
    q = torch.randn(3, 4, 16).to(dtype)
    rows, positions = [5, 1, 0], [400, 20, 3]
    assert_close_to_definition(_run("reference", cache, q, rows, positions), _oracle(cache, q, rows, positions))


@pytest.mark.parametrize(("dtype", "kv_dtype"), _READ_DTYPES)
@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_small_and_large_values(magnitude: float, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Many small values (weight times scale underflows in 16 bits), and scores of thousands."""
    cache = make_cache(num_rows=1, max_context=400, num_pages=60, kv_dtype=kv_dtype)
    fill_spans(cache, [[400, 65]], lambda n: torch.randn(n, 16) * magnitude)
    compare(cache, torch.randn(1, 4, 16).mul(magnitude).to(dtype), [0], [400], 1.0)


@pytest.mark.parametrize("magnitude", [1e-9, 1e9])
def test_queries_that_fp16_cannot_hold(magnitude: float) -> None:
    """Beside fp8 pages, in whose scales the keys' magnitude is. Interpreted too: only the result is rounded to bf16."""
    compare_far_from_one(magnitude, 16)


def compare_far_from_one(magnitude: float, head_dim: int) -> None:
    """Queries of this magnitude, and keys of its inverse."""
    cache = make_cache(num_rows=1, page_size=64, head_dim=head_dim, kv_dtype=torch.float8_e4m3fn)
    parts = [torch.randn(n, head_dim) * size for n in (100, 65) for size in (1 / magnitude, 1.0)]
    fill_spans(cache, [[100, 65]], lambda n: parts.pop(0))
    compare(cache, (torch.randn(1, 4, head_dim) * magnitude).to(torch.bfloat16), [0], [400])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("pages", [1, 2, 3])
def test_page_edges(page_size: int, pages: int) -> None:
    edge = pages * page_size
    cache = _cache([[edge - 1, edge, edge + 1]], page_size=page_size)
    compare(cache, torch.randn(1, 3, 16), [0], [edge])


@pytest.mark.parametrize("page_size", [1, 8, 24, 48, 128, 256])
def test_pages_that_divide_the_tile_are_divided_by_it_or_neither(page_size: int) -> None:
    cache = _cache([[300, 70, 1], [33, 0, 96]], page_size=page_size, num_pages=600)
    compare(cache, torch.randn(2, 6, 16), [1, 0], [400, 400])


def test_more_pieces_than_the_merge_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    monkeypatch.setattr(kernel, "tiles", lambda *_: Tiles(tokens=16, warps=1, stages=1, programs=1))
    monkeypatch.setattr(kernel, "_num_processors", lambda _: 60)
    assert kernel.merge_tile(60, 8, 16)[0] < 60 * 1500 // 1520
    cache = _cache([[1500, 3, 2, 1], [5, 7, 1, 1]], page_size=64)
    compare(cache, torch.randn(2, 4, 16), [0, 1], [1600, 1600])


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
@pytest.mark.parametrize("page_size", [16, 20, 64])
@pytest.mark.parametrize(("programs", "least"), [(1, 1), (2, 1), (3, 1), (3, 20), (9, 5), (60, 5)])
def test_programs_that_go_on_to_another_span(
    programs: int, least: int, page_size: int, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few: each has so many tiles that going on counts as some, which hold nothing, wherever a share begins or ends.
    Many: some are left without a tile."""
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    cut = Tiles(tokens=16, warps=1, stages=5, programs=1, restart=4, least=least)
    monkeypatch.setattr(kernel, "tiles", lambda *_: cut)
    monkeypatch.setattr(kernel, "_num_processors", lambda _: programs)
    cache = _cache([[400, 3], [0, 200], [65, 64], [97, 1]], kv_dtype, page_size=page_size, head_dim=64)
    compare(cache, torch.randn(4, 6, 64), [0, 1, 2, 3], [500] * 4)


@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_or_fall_along_a_span(rising: bool) -> None:
    """Every tile, and every piece, outweighs the one before it or adds nothing to it."""
    cache = make_cache(num_rows=1, max_context=400, num_pages=60)
    order = torch.arange(400.0) if rising else torch.arange(400.0).flip(0)
    keys = order[:, None] / 100 + torch.randn(400, 16) / 3
    parts = [keys, torch.randn(400, 16), torch.randn(9, 16), torch.randn(9, 16)]
    fill_spans(cache, [[400, 9]], lambda n: parts.pop(0))
    compare(cache, torch.ones(1, 4, 16), [0], [400], 0.2)


@pytest.mark.gpu
def test_one_long_span_among_short_ones() -> None:
    """Long enough that many programs share one span, and that a program serves several."""
    lengths = [[40_000, 3], [0, 64], [700, 16_896], [1, 1]]
    cache = _cache(lengths, page_size=64, num_pages=1000)
    compare(cache, torch.randn(4, 8, 16), [2, 0, 3, 1], [50_000, 50_000, 50_000, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_attend_to(backend: str, batch: int) -> None:
    cache = _cache([[0, 0], [0, 5]])
    for positions in ([0, 0], [-1, -1]):
        out = _run(backend, cache, torch.randn(batch, 4, 16), [0, 0][:batch], positions[:batch])
        assert out.shape == (batch, 4, 16)
        assert not out.any()


def test_slot_order_means_nothing() -> None:
    """The same tokens in reverse, over other pages, attended by another cut into pieces."""
    cache = _cache([[100, 130]])
    turned = make_cache(num_rows=1, max_context=130, num_pages=80, seed=5)
    parts = [x.flip(0).float() for head in (0, 1) for x in read_span(cache, 0, 0, head)]
    fill_spans(turned, [[100, 130]], lambda n: parts.pop(0))
    q = torch.randn(1, 4, 16)
    oracle = _oracle(cache, q, [0], [130])
    reference = _run("reference", cache, q, [0], [130])
    for backend in BACKENDS:
        assert_within_error_budget(_run(backend, turned, q, [0], [130]), reference, oracle)


def test_bad_input_is_named() -> None:
    layer, q = _cache([[3, 3]]).layer(0), torch.zeros(1, 4, 16)
    zero = torch.zeros(1, dtype=torch.int32)
    for queries, positions, rows, message in (
        (q[0], zero, zero, "q must"),
        (q[:, :3], zero, zero, "3 query heads"),
        (q[..., :8], zero, zero, "head_dim"),
        (q.int(), zero, zero, "floating"),
        (q, zero.long(), zero, "positions"),
        (q, zero, zero.repeat(2), "rows"),
        (q, zero, torch.zeros(1, 1, dtype=torch.int32), "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(queries, layer, positions=positions, rows=rows, sm_scale=1.0)


def test_scales_that_begin_at_an_odd_element() -> None:
    """They are read in pairs, of which a view from there on has none."""
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    scales = torch.zeros(9, dtype=torch.bfloat16)
    assert kernel._pairs(scales[:8]).shape == (4,)
    with pytest.raises(ValueError, match="odd element"):
        kernel._pairs(scales[1:])
