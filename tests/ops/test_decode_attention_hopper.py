"""decode_attention's kernel for Hopper, whose keys and values pass shared memory by: what it takes, and its edges."""

from __future__ import annotations

import collections
import importlib
from typing import Any

import pytest
import torch

from fastdms.ops.decode_attention import hopper_kernel
from tests.ops.harness import GuardedCache, fill_spans, make_cache
from tests.ops.test_decode_attention import compare

_FP8 = torch.float8_e4m3fn


def _cache(lengths: list[list[int]], page_size: int = 64, kv_dtype: torch.dtype = _FP8) -> GuardedCache:
    longest = max(max(heads) for heads in lengths)
    cache = make_cache(
        num_rows=len(lengths), num_kv_heads=len(lengths[0]), kv_dtype=kv_dtype, max_context=longest, num_pages=200,
        page_size=page_size, head_dim=64,
    )  # fmt: skip
    fill_spans(cache, lengths, lambda n: torch.randn(n, 64))
    return cache


def _queries(rows: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, heads, 64).to(dtype)


@pytest.mark.parametrize(
    ("supported", "heads", "dtype", "kv_dtype", "page_size"),
    [
        (True, 16, torch.bfloat16, _FP8, 64),
        (True, 2, torch.float16, _FP8, 32),
        (False, 18, torch.bfloat16, _FP8, 64),
        (False, 16, torch.float32, _FP8, 64),
        (False, 16, torch.bfloat16, torch.bfloat16, 64),
        (False, 16, torch.bfloat16, _FP8, 16),
        (False, 16, torch.bfloat16, _FP8, 48),
    ],
)
def test_what_it_takes(supported: bool, heads: int, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int) -> None:
    layer = _cache([[70, 3]], page_size, kv_dtype).layer(0)
    q = _queries(1, heads, dtype)
    assert hopper_kernel.is_supported(q, layer.live_len, *layer[:4]) == supported


def test_pages_that_begin_within_a_word_are_not_for_it() -> None:
    layer = _cache([[70, 3]]).layer(0)
    at_three = torch.zeros(layer.k_pages.numel() + 3, dtype=_FP8)[3:].view(layer.k_pages.shape)
    assert not hopper_kernel.is_supported(_queries(1, 4), layer.live_len, at_three, *layer[1:4])


def test_it_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument once, and nothing else but options of the launch; without a GPU nothing else calls it."""
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    names = hopper_kernel._decode_hopper_kernel.arg_names
    given = []

    def launch(*args: Any, **options: Any) -> None:
        given.append([*names[: len(args)], *options])

    monkeypatch.setattr(kernel, "_hopper_kernel", lambda *_: hopper_kernel)
    monkeypatch.setattr(hopper_kernel, "_decode_hopper_kernel", {(2,): launch})
    monkeypatch.setattr(kernel, "_merge_kernel", collections.defaultdict(lambda: lambda *_, **__: None))
    monkeypatch.setattr(kernel, "_num_processors", lambda _: 1)
    monkeypatch.setattr(hopper_kernel, "TILES", hopper_kernel.TILES._replace(programs=2))
    layer = _cache([[70, 3]]).layer(0)
    here = torch.zeros(1, dtype=torch.int32)
    kernel.decode_attention(_queries(1, 4), here, here, *layer[:4], layer.page_table, layer.live_len, 1.0)
    (arguments,) = given
    assert sorted(set(arguments) - {"num_warps", "maxnreg"}) == sorted(names)
    assert len(arguments) == len(names) + 2


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [32, 64, 96])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("programs", [1, 7, None])
def test_edges_of_tiles_and_pages(
    programs: int | None, group: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token, one, around tiles of 32 and pages, a long span; few programs that go on from span to span, and many."""
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    if programs is not None:
        monkeypatch.setattr(kernel, "_num_processors", lambda _: programs)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper card")
    monkeypatch.setattr(kernel, "tiles", None)  # the other kernel's, which is not to be asked
    cache = _cache([[0, 1], [31, 32], [33, 63], [64, 65], [95, 97], [128, 1500]], page_size)
    compare(cache, _queries(7, 2 * group), [5, 0, 3, 1, 0, 4, 2], [1600, 7, 80, 90, -1, 99, 70])


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_small_and_large_values(magnitude: float) -> None:
    cache = make_cache(num_rows=1, max_context=400, num_pages=60, kv_dtype=_FP8, head_dim=64, page_size=64)
    fill_spans(cache, [[400, 65]], lambda n: torch.randn(n, 64) * magnitude)
    compare(cache, _queries(1, 4).mul(magnitude), [0], [400], 1.0)


@pytest.mark.gpu
def test_hundreds_of_spans() -> None:
    lengths = [[int(n) for n in torch.randint(1, 90, (8,))] for _ in range(40)]
    cache = make_cache(
        num_rows=40, num_kv_heads=8, max_context=96, num_pages=900, kv_dtype=_FP8, head_dim=64, page_size=64
    )
    fill_spans(cache, lengths, lambda n: torch.randn(n, 64))
    compare(cache, _queries(40, 16), list(range(40)), [100] * 40)
