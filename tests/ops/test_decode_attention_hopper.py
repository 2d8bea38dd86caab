"""decode_attention's kernel for Hopper, whose keys and values pass shared memory by: what it takes, and its edges.

Without a GPU it is emulated: all but layouts.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastdms.ops.decode_attention import hopper_kernel, hopper_split_kernel
from fastdms.ops.gluon_common import registers
from fastdms.ops.triton_common import WAIT_KNOWING, on_hopper
from tests.ops import gluon_emulator
from tests.ops.gluon_emulator import emulate
from tests.ops.harness import CPU, DEVICE, GuardedCache, fill_spans, make_cache
from tests.ops.test_decode_attention import compare, compare_far_from_one

_FP8 = torch.float8_e4m3fn
# The merge runs in the interpreter, which rounds bf16 wrongly.
_DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


def _places(words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What ``_FP8_TO_FP16`` does for each pair of words."""
    numbers = words.contiguous().view(_FP8).to(torch.float16)
    return tuple(numbers[..., i::4] for i in range(4))


def _ask_l2(pointer: Any, num_bytes: int) -> None:
    """L2 is asked for what lies in the tensor's storage."""
    pointer.load()
    (pointer + (num_bytes // 4 - 1)).load()


@pytest.fixture(scope="module")
def hopper() -> Iterator[dict[str, Callable[..., Any]]]:
    """That kernel and no other, on a Hopper card or emulated; then what its assembly does."""
    if DEVICE != CPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper card")
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    assembly: dict[str, Callable[..., Any]] = {
        "lg2.approx.ftz.f32 $0, $1;": torch.log2, hopper_kernel._FP8_TO_FP16.value: _places,
        hopper_split_kernel.ASK_L2.value: _ask_l2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "tiles", None)  # the other kernel's, which is not to be asked
        if DEVICE == CPU:
            patch.setattr(kernel, "on_hopper", lambda _: True)
            emulate(patch, hopper_kernel, "_decode_hopper_kernel", assembly, hopper_split_kernel)
        yield assembly


def _use(patch: pytest.MonkeyPatch, processors: int, programs: int, **cut: int) -> None:
    """Cut the work for so many multiprocessors, and so many programs on each."""
    patch.setattr(
        importlib.import_module("fastdms.ops.decode_attention.kernel"), "_num_processors", lambda _: processors
    )
    for head_dim, tiles in hopper_kernel.TILES.items():
        patch.setitem(hopper_kernel.TILES, head_dim, tiles._replace(programs=programs, **cut))


def _cache(
    lengths: list[list[int]], page_size: int = 64, kv_dtype: torch.dtype = _FP8, *, head_dim: int = 64
) -> GuardedCache:
    longest = max(max(heads) for heads in lengths)
    cache = make_cache(
        num_rows=len(lengths), num_kv_heads=len(lengths[0]), kv_dtype=kv_dtype, max_context=max(longest, 1),
        num_pages=400, page_size=page_size, head_dim=head_dim,
    )  # fmt: skip
    fill_spans(cache, lengths, lambda n: torch.randn(n, head_dim))
    return cache


def _queries(rows: int, heads: int, dtype: torch.dtype = torch.bfloat16, *, head_dim: int = 64) -> torch.Tensor:
    return torch.randn(rows, heads, head_dim).to(dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
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
def test_what_it_takes(
    supported: bool, heads: int, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel = importlib.import_module("fastdms.ops.decode_attention.kernel")
    layer = _cache([[70, 3]], page_size, kv_dtype, head_dim=head_dim).layer(0)
    q = _queries(1, heads, dtype, head_dim=head_dim)
    assert hopper_kernel.is_supported(q, layer.live_len, *layer[:4]) == supported
    monkeypatch.setattr(kernel, "on_hopper", lambda _: True)
    assert kernel._hopper_kernel(q, layer.live_len, *layer[:4]) is (hopper_kernel if supported else None)
    monkeypatch.setattr(kernel, "on_hopper", lambda _: False)
    assert kernel._hopper_kernel(q, layer.live_len, *layer[:4]) is None


@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
def test_other_head_dims_are_not_for_it(head_dim: int) -> None:
    layer = _cache([[70, 3]], head_dim=head_dim).layer(0)
    assert not hopper_kernel.is_supported(_queries(1, 4, head_dim=head_dim), layer.live_len, *layer[:4])


def test_pages_that_begin_within_a_word_are_not_for_it() -> None:
    layer = _cache([[70, 3]]).layer(0)
    at_three = torch.zeros(layer.k_pages.numel() + 3, dtype=_FP8)[3:].view(layer.k_pages.shape)
    assert not hopper_kernel.is_supported(_queries(1, 4), layer.live_len, at_three, *layer[1:4])


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)]
)
def test_other_cards_are_not_hopper(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert on_hopper(torch.device("cuda")) == expected
    assert not on_hopper(CPU)


@pytest.mark.parametrize(
    ("num_warps", "programs", "expected"),
    [(1, 16, 128), (1, 12, 168), (1, 10, 168), (1, 9, 168), (1, 8, 255), (4, 2, 255), (8, 1, 255), (4, 3, 168)],
)
def test_each_quarter_of_a_multiprocessor_has_registers_for_its_warps(
    num_warps: int, programs: int, expected: int
) -> None:
    assert registers(num_warps, programs) == expected
    assert 32 * -(-num_warps * programs // 4) * expected <= 65536 // 4


@pytest.mark.wide(4)
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("page_size", [32, 64, 96])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("programs", [(1, 1), (1, 2), (1, 5), (7, 16), None], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_edges_of_tiles_and_pages(
    programs: tuple[int, int] | None, group: int, page_size: int, dtype: torch.dtype, head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No token, one, around tiles of 32 and pages, a long span. Few programs, for which going on from span to span
    counts as some tiles; so many that a tile for each is less than they should have; and as many as there are."""
    if programs is not None:
        _use(monkeypatch, *programs)
    cache = _cache([[0, 1], [31, 32], [33, 63], [64, 65], [95, 97], [128, 1500]], page_size, head_dim=head_dim)
    q = _queries(7, 2 * group, dtype, head_dim=head_dim)
    compare(cache, q, [5, 0, 3, 1, 0, 4, 2], [1600, 7, 80, 90, -1, 99, 70])


@pytest.mark.usefixtures("hopper")
@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_any_lengths_over_any_programs(data: st.DataObject) -> None:
    head_dim, tokens = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([32, 16]))
    heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    length = st.integers(0, 200) | st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 600])
    lengths = data.draw(st.lists(st.lists(length, min_size=heads, max_size=heads), min_size=1, max_size=5))
    positions = data.draw(st.lists(st.sampled_from([-1, 700, 700]), min_size=len(lengths), max_size=len(lengths)))
    rows = data.draw(st.permutations(range(len(lengths))))
    torch.manual_seed(0)
    cache = _cache(lengths, data.draw(st.sampled_from([tokens, 32, 64, 96])), head_dim=head_dim)
    with pytest.MonkeyPatch.context() as patch:
        _use(patch, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 16)), tokens=tokens)
        compare(cache, _queries(len(lengths), heads * group, torch.float16, head_dim=head_dim), rows, positions)


@pytest.mark.skipif(DEVICE != CPU, reason="the emulator's wait")
@pytest.mark.parametrize(("programs", "head_dim"), [((1, 1), 64), ((1, 5), 64), ((7, 16), 64), ((1, 7), 128)], ids=str)
@pytest.mark.parametrize(
    "grown", [[True], [False], [True, False], [False, True, True, True, False], [True] * 6 + [False], None], ids=str
)
def test_lengths_change_until_the_wait(
    grown: list[bool] | None, programs: tuple[int, int], head_dim: int, hopper: dict[str, Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before it waits, each program finds some spans without their last token, others than the program before it, all
    else that ops write absurd, and lengths of any size where grown is None. Else it says which spans have the token
    early, in turn; five and seven turns are none of the twelve spans."""
    _use(monkeypatch, *programs)
    attend, language = hopper_kernel.attend, gluon_emulator._language
    has_token = itertools.cycle(grown or [])

    def attend_beside_an_append(*args: Any, **options: Any) -> None:
        queries, (table, lengths) = args[1][0], args[3][:2]
        written = [queries, table, lengths, *args[2]]
        final = [x.clone() for x in written]
        waits: list[Any] = []
        found = set()

        def begin(*program: Any) -> Any:
            queries.fill_(torch.nan)
            for stored in args[2]:
                stored.view(torch.uint8).fill_(0x7F)  # e4m3's NaN
            table.random_(-(2**31), 2**31 - 1)
            if grown is None:
                lengths.random_(0, table.shape[-1] * 64 + 1)
            else:
                has = torch.tensor([next(has_token) for _ in range(lengths.numel())]).view(lengths.shape)
                lengths.copy_(torch.where(has, final[2], (final[2] - 1).clamp(min=0)))
            found.add(tuple(lengths.flatten().tolist()))
            return language(*program)

        def wait(number: Any) -> None:
            waits.append(number)
            for x, value in zip(written, final, strict=True):
                x.copy_(value)

        def let_the_merge_come() -> None:
            assert torch.equal(lengths, final[2]), "which it reads without waiting"

        monkeypatch.setattr(gluon_emulator, "_language", begin)
        monkeypatch.setattr(hopper_kernel, "gdc_launch_dependents", let_the_merge_come)
        monkeypatch.setitem(hopper, WAIT_KNOWING.value, wait)
        attend(*args, **{**options, "DEPENDENT": True})
        assert len(waits) == args[0]
        assert len(found) > 1 or args[0] == 1 or (grown is not None and len(grown) < 3)

    monkeypatch.setattr(hopper_kernel, "attend", attend_beside_an_append)
    cache = _cache([[0, 1], [31, 32], [33, 64], [65, 129], [1, 97], [128, 641]], head_dim=head_dim)
    q = _queries(6, 8, torch.float16, head_dim=head_dim)
    compare(cache, q, [5, 0, 3, 1, 4, 2], [700, 7, 80, 90, -1, 99])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_small_and_large_values(magnitude: float, dtype: torch.dtype, head_dim: int) -> None:
    cache = make_cache(num_rows=1, max_context=400, num_pages=60, kv_dtype=_FP8, head_dim=head_dim, page_size=64)
    fill_spans(cache, [[400, 65]], lambda n: torch.randn(n, head_dim) * magnitude)
    compare(cache, _queries(1, 4, head_dim=head_dim).mul(magnitude).to(dtype), [0], [400], 1.0)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("magnitude", [1e-9, 1e9])
def test_queries_that_fp16_cannot_hold(magnitude: float, head_dim: int) -> None:
    compare_far_from_one(magnitude, head_dim)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_hundreds_of_spans(dtype: torch.dtype, head_dim: int) -> None:
    lengths = [[int(n) for n in torch.randint(1, 90, (8,))] for _ in range(40)]
    cache = make_cache(
        num_rows=40, num_kv_heads=8, max_context=96, num_pages=900, kv_dtype=_FP8, head_dim=head_dim, page_size=64
    )
    fill_spans(cache, lengths, lambda n: torch.randn(n, head_dim))
    compare(cache, _queries(40, 8, dtype, head_dim=head_dim), list(range(40)), [100] * 40)
