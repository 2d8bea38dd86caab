"""prefill_attention's kernels for Hopper: what they take, and their edges.

Without a GPU it is emulated: all but layouts and the matrix units' roundings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastdms.ops import prefill_append, prefill_attention
from fastdms.ops.prefill_attention import consumer_kernel, hopper_kernel, specialised_kernel
from tests.ops.harness import CPU, DEVICE, GuardedCache, make_cache, on
from tests.ops.prefill_emulator import emulated
from tests.tolerance import assert_within_error_budget

kernel = importlib.import_module("fastdms.ops.prefill_attention.kernel")  # the package exports the op by this name
_HISTORY = [(0, 330), (1, 45)]  # (row, tokens) that the cache holds


@pytest.fixture(scope="module")
def hopper() -> Iterator[None]:
    """Those kernels and no other: the one of specialised warps for head dim 64 and groups that divide 8."""
    with emulated() as patch:
        patch.setattr(kernel, "attend_tile", None)  # the other kernel's, which is not to be asked
        yield


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _chunk(
    pieces: list[tuple[int, int]], heads: tuple[int, int, int], flagged: float, dtype: torch.dtype, padding: int = 0
) -> dict[str, torch.Tensor]:
    """The next tokens of some rows, and padding, whose keys and values are NaN; flagged: the share of tokens."""
    num_kv_heads, group, head_dim = heads
    starts = dict(_HISTORY)
    positions = [starts.get(row, 0) + i for row, n in pieces for i in range(n)]
    tokens = len(positions) + padding
    qkv = torch.randn(tokens, num_kv_heads * (group + 2), head_dim).to(dtype)
    q, k, v = qkv.split((num_kv_heads * group, num_kv_heads, num_kv_heads), 1)
    k[len(positions) :], v[len(positions) :] = torch.nan, torch.nan
    return {
        "q": q, "k": k, "v": v, "decisions": torch.rand(tokens, num_kv_heads) < flagged,
        "positions": _ints(positions + [-1] * padding), "rows": _ints([row for row, _ in pieces]),
        "chunk_indptr": _ints([0, *(n for _, n in pieces)]).cumsum(0, dtype=torch.int32),
    }  # fmt: skip


def _cache(heads: tuple[int, int, int], window: int, flagged: float, dtype: torch.dtype) -> GuardedCache:
    cache = make_cache(
        num_kv_heads=heads[0], head_dim=heads[2], window_tokens=window, max_context=700, kv_dtype=dtype,
        page_size=64, num_pages=80,
    )  # fmt: skip
    given = _chunk(_HISTORY, heads, flagged, dtype)
    del given["q"]
    given["positions"] = torch.cat([torch.arange(n, dtype=torch.int32) for _, n in _HISTORY])
    prefill_append(cache=cache.layer(0), **given, shift=1)
    return cache


def _attend(
    backend: str, cache: GuardedCache, chunk: dict[str, torch.Tensor], sm_scale: float | None = None
) -> torch.Tensor:
    """sm_scale: 1 / sqrt(D) if None."""
    with on(backend) as device:
        placed: dict[str, Any] = {name: x.to(device) for name, x in chunk.items()}
        layer = cache.copy_to(device).layer(0)
        scale = chunk["q"].shape[2] ** -0.5 if sm_scale is None else sm_scale
        return prefill_attention(cache=layer, **placed, shift=1, sm_scale=scale).cpu()


def _check(cache: GuardedCache, chunk: dict[str, torch.Tensor], sm_scale: float | None = None) -> None:
    exact = chunk | {name: chunk[name].float() for name in "qkv"}
    assert_within_error_budget(
        _attend("kernel", cache, chunk, sm_scale), _attend("reference", cache, chunk, sm_scale),
        _attend("reference", cache, exact, sm_scale).double(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("supported", "heads", "head_dim", "dtype", "stride", "start"),
    [
        (True, (4, 2), 64, torch.float16, 256, 0),
        (True, (128, 1), 128, torch.bfloat16, 128, 8),
        (False, (129, 1), 128, torch.bfloat16, 128, 0),
        (False, (4, 2), 64, torch.float32, 256, 0),
        (False, (4, 2), 96, torch.float16, 256, 0),
        (False, (4, 2), 64, torch.float16, 260, 0),
        (False, (4, 2), 64, torch.float16, 256, 4),
    ],
)
def test_what_it_takes(
    supported: bool, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, stride: int, start: int
) -> None:
    """Rows of keys begin at multiples of 16 bytes."""
    k = torch.empty(9 * stride, dtype=dtype).as_strided((5, heads[1], head_dim), (stride, head_dim, 1), start)
    assert hopper_kernel.is_supported(torch.empty(5, heads[0], head_dim), k, k) == supported
    assert hopper_kernel.is_supported(torch.empty(5, heads[0], head_dim), k.contiguous(), k) == supported
    if heads[1] > 1:
        across = k.transpose(0, 1).contiguous().transpose(0, 1)
        assert not hopper_kernel.is_supported(torch.empty(5, heads[0], head_dim), across, k)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "window", "flagged"),
    [
        ((2, 1, 64), 100, 0.5),
        ((1, 1, 128), 256, 0.7),
        ((1, 3, 128), 10, 0.5),
        ((2, 4, 64), 256, 0.7),
        ((1, 7, 64), 30, 0.5),
        ((1, 4, 128), 0, 0.9),
        ((2, 4, 64), 100, 0.0),
        ((1, 3, 64), 64, 1.0),
        ((1, 2, 64), 64, 1.0),
        ((1, 8, 64), 30, 0.5),
    ],
    ids=str,
)
def test_windows_groups_and_shares(
    heads: tuple[int, int, int], window: int, flagged: float, dtype: torch.dtype
) -> None:
    """Windows within a tile and of several, late keys of several tiles, more packed tiles than the ring has; all kept
    and none. The interpreter copies bf16 as it is."""
    cache = _cache(heads, window, flagged, dtype)
    _check(cache, _chunk([(1, 130), (0, 75), (2, 1)], heads, flagged, dtype, padding=5))


@pytest.mark.usefixtures("hopper")
@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_any_chunks(data: st.DataObject) -> None:
    heads = (1, data.draw(st.sampled_from([1, 3, 4, 7, 8, 16]), "group"), data.draw(st.sampled_from([64, 128]), "dim"))
    flagged = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), "flagged")
    lengths = data.draw(st.lists(st.integers(0, 200) | st.sampled_from([1, 64, 128]), min_size=3, max_size=3), "tokens")
    rows = data.draw(st.permutations(range(3)), "rows")
    torch.manual_seed(0)
    chunk = _chunk(
        list(zip(rows, lengths, strict=True)), heads, flagged, torch.float16, data.draw(st.integers(0, 150), "padding")
    )
    window = data.draw(st.integers(0, 70) | st.sampled_from([127, 128, 129, 191, 192, 256]), "window")
    _check(_cache(heads, window, flagged, torch.float16), chunk)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("group", [3, 4])
@pytest.mark.parametrize("sm_scale", [-0.5, 0.0, 1e-42, 0.5, 2.0, 4.0])
def test_scores_that_outgrow_those_before_them(sm_scale: float, group: int) -> None:
    """By a little at times, so that the maximum stays behind, and by much at others."""
    heads = (1, group, 64)
    chunk = _chunk([(0, 140), (1, 60)], heads, 0.3, torch.float16)
    chunk["k"] *= torch.linspace(0.1, 4.0, 200)[:, None, None].half()
    _check(_cache(heads, 70, 0.3, torch.float16), chunk, sm_scale)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("group", [3, 4])
def test_padding_of_many_rows(group: int) -> None:
    """More rows of zeros than all programs write at once, into memory that is NaN."""
    heads = (2, group, 64)
    chunk = _chunk([(0, 3)], heads, 0.5, torch.float16, padding=150)
    out = _attend("kernel", _cache(heads, 30, 0.5, torch.float16), chunk)
    assert out[:3].isfinite().all()
    assert not out[3:].any()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("group", [3, 4])
def test_rows_in_turns(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_WORKSPACE_BYTES", 1)
    heads = (2, group, 64)
    chunk = _chunk([(1, 50), (2, 0), (0, 70)], heads, 0.5, torch.float16, padding=9)
    _check(_cache(heads, 30, 0.5, torch.float16), chunk)


@pytest.mark.skipif(DEVICE != CPU, reason="a card has as many multiprocessors as it has")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("processors", [1, 2, 5, 500])
@pytest.mark.parametrize("stages", [2, 8])
def test_few_programs_and_many(processors: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which none, some or all have blocks."""
    monkeypatch.setattr(specialised_kernel, "_num_processors", lambda _: processors)
    monkeypatch.setattr(specialised_kernel, "_RING", specialised_kernel.Ring(keys=64, stages=stages))
    heads = (2, 4, 64)
    _check(_cache(heads, 30, 0.5, torch.float16), _chunk([(0, 200), (1, 9)], heads, 0.5, torch.float16))


@pytest.mark.usefixtures("hopper")
def test_a_neighbours_nan_stays_there() -> None:
    """Another row's tokens follow a chunk's own within a tile, in the chunk and among the packed keys."""
    heads = (1, 4, 64)
    cache = _cache(heads, 30, 0.5, torch.float16)
    chunk = _chunk([(0, 100), (1, 50)], heads, 0.5, torch.float16)
    finite = _attend("kernel", cache, chunk)
    chunk["k"][100:], chunk["v"][100:] = torch.nan, torch.nan
    assert finite.isfinite().all()
    assert torch.equal(_attend("kernel", cache, chunk)[:100], finite[:100])


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("group", [3, 4])
def test_long_chunks_give_the_same_each_time(group: int) -> None:
    """Thousands of blocks, as many tiles under way as there can be."""
    heads = (8, group, 64)
    cache = _cache(heads, 256, 0.8, torch.bfloat16)
    chunk = _chunk([(0, 3000), (1, 1100)], heads, 0.8, torch.bfloat16, padding=70)
    _check(cache, chunk)
    first, *others = (_attend("kernel", cache, chunk) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def _skip_values(real: Callable[..., None]) -> Callable[..., None]:
    """Wait for keys alone."""
    seen: list[Any] = []

    def wait(tile: int, total: Any, here: Any, stages: int) -> None:
        seen[:] = seen or [here]
        if here is seen[0]:
            real(tile, total, here, stages)

    return wait


def _fetch_early(real: Callable[..., None]) -> Callable[..., None]:
    """To where products still read the tile before."""

    def fetch(tile: int, *others: Any) -> None:
        real(tile if tile < 3 else tile + 1, *others)

    return fetch


def _fetch_three(real: Callable[..., None]) -> Callable[..., None]:
    def fetch(tile: int, *others: Any) -> None:
        if tile < 3:
            real(tile, *others)

    return fetch


def _wait_for_none(real: Callable[..., None]) -> Callable[..., None]:
    return lambda tile, *others: real(tile, *others) if tile == 0 else None


def _release_early(real: Callable[..., None]) -> Callable[..., None]:
    """What products have yet to read."""
    return lambda tile, free, stages, _: real(tile + 1, free, stages, True)


def _release_one(real: Callable[..., None]) -> Callable[..., None]:
    return lambda tile, *others: real(tile, *others) if tile < 1 else None


@pytest.mark.skipif(DEVICE != CPU, reason="faults of this kind may hang a GPU")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("group", "name", "fault", "message"),
    [
        (3, "_wait", _skip_values, "read before it came"),
        (3, "_fetch", _fetch_early, "overwritten while it is needed"),
        (3, "_fetch", _fetch_three, "wait for ever: 0 of 1 arrived"),
        (4, "_wait", _wait_for_none, "read before it came"),
        (4, "_release", _release_early, "overwritten while it is needed"),
        (4, "_release", _release_one, "wait for ever"),
    ],
)
def test_faults_show_without_a_gpu(
    group: int, name: str, fault: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, module = (1, group, 64), consumer_kernel if group == 4 else hopper_kernel
    monkeypatch.setattr(specialised_kernel, "_RING", specialised_kernel.Ring(keys=64, stages=4))
    cache, chunk = _cache(heads, 30, 0.0, torch.float16), _chunk([(0, 9)], heads, 0.0, torch.float16)
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(AssertionError, match=message):
        _attend("kernel", cache, chunk)


@pytest.mark.parametrize(
    ("supported", "heads", "head_dim", "dtype", "stride"),
    [
        (True, (8, 2), 64, torch.bfloat16, 512),
        (True, (8, 1), 64, torch.float16, 768),
        (False, (6, 2), 64, torch.bfloat16, 384),
        (False, (16, 1), 64, torch.bfloat16, 1024),
        (False, (8, 2), 128, torch.bfloat16, 1024),
        (False, (8, 2), 64, torch.bfloat16, 516),
        (False, (8, 2), 64, torch.float32, 512),
    ],
)
def test_what_specialised_warps_take(
    supported: bool, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, stride: int
) -> None:
    """Queries that TMA can read, of groups whose queries come in whole rows of eight."""
    k = torch.empty(5, heads[1], head_dim, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
    q = torch.empty(5 * stride, dtype=dtype).as_strided((5, heads[0], head_dim), (stride, head_dim, 1))
    assert specialised_kernel.is_supported(q, k) == supported
    for other in (q.transpose(0, 1).contiguous().transpose(0, 1), q[:1].expand(q.shape), _moved(q)):
        assert not specialised_kernel.is_supported(other, k)


def _moved(x: torch.Tensor) -> torch.Tensor:
    """The same, but beginning within 16 bytes."""
    memory = x.new_empty(x.untyped_storage().nbytes() // x.element_size() + 1)
    return memory.as_strided(x.shape, x.stride(), 1)
