"""The emulator of Gluon kernels: partitions of warps that wait for each other, and the faults that it has to find."""

# mypy: disable-error-code="no-untyped-call, name-defined, attr-defined, valid-type"
from __future__ import annotations

import sys
import threading

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdms.ops.gluon_common import barrier, load_tile
from tests.ops.gluon_emulator import emulate

_N = gl.constexpr(64)
_STAGES = gl.constexpr(3)


@gluon.jit
def _produce(x_desc, tiles, ring, here, free, FAULT: gl.constexpr):
    for tile in range(tiles + 1 if FAULT == "a tile too many" else tiles):
        stage = tile % _STAGES
        mbarrier.wait(free.index(stage), (tile // _STAGES + 1) & 1, pred=tile >= _STAGES)
        gl.static_assert(FAULT != "a worker fails", "on purpose")
        if FAULT != "no tile comes":
            mbarrier.expect(here.index(stage), 2 * _N * _N)
            if FAULT == "expected twice":
                mbarrier.expect(here.index(stage), 2 * _N * _N)
            row = tile * _N + (8 if FAULT == "past the last row" else 0) * _N
            load_tile(x_desc, [0 if tile == tiles else row, 0], here.index(stage), ring.index(stage))


@gluon.jit
def _release(tile, free, pred, FAULT: gl.constexpr):
    if FAULT != "some warps still read":
        barrier()
    mbarrier.arrive(free.index(tile % _STAGES), count=1, pred=pred)


@gluon.jit
def _consume(part, y_ptr, out_ptr, rows, tiles, b_y, ring, here, free, FAULT: gl.constexpr):
    o = gl.arange(0, _N, None)
    at = (part * _N + o)[:, None] * _N + o[None, :]
    b_y.store(gl.load(y_ptr + at))
    if FAULT != "no fence":
        fence_async_shared()
    barrier()
    acc = warpgroup_mma_init(gl.zeros([_N, _N], gl.float32, None))
    for tile in range(tiles):
        b_x = ring.index(tile % _STAGES)
        if part == 0 or tile != 1 or FAULT != "one does not wait":
            mbarrier.wait(here.index(tile % _STAGES), (tile // _STAGES) & 1)
        if rows - tile * _N < _N:
            past = part if FAULT == "they store different things" else 0
            b_x.store(gl.where((tile * _N + o < rows)[:, None], b_x.load(None), past).to(gl.float16))
            fence_async_shared()
            barrier()
        acc = warpgroup_mma_wait(1, [warpgroup_mma(b_y, b_x, acc, is_async=True)])
        if FAULT == "released under a product":
            _release(tile, free, True, FAULT)
        else:
            _release(tile + _STAGES - 1, free, tile > 0 and (part == 0 or FAULT != "one never releases"), FAULT)
    if FAULT != "looked at too early":
        acc = warpgroup_mma_wait(0, [acc])
    gl.store(out_ptr + at, acc)


@gluon.jit
def _sum_kernel(x_desc, y_ptr, out_ptr, rows, tiles, FAULT: gl.constexpr, num_warps: gl.constexpr):
    """out = y times the sum of x's tiles, each half by some of the warps."""
    ring = gl.allocate_shared_memory(x_desc.dtype, [_STAGES, _N, _N], x_desc.layout)
    b_y = gl.allocate_shared_memory(x_desc.dtype, [2, _N, _N], x_desc.layout)
    here = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(here.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
        if FAULT == "initialised twice":
            mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    if FAULT != "no meeting at first":
        barrier()
    shared = (ring, here, free, FAULT)
    gl.warp_specialize(
        [
            (_consume, (0, y_ptr, out_ptr, rows, tiles, b_y.index(0), *shared)),
            (_consume, (1, y_ptr, out_ptr, rows, tiles, b_y.index(1), *shared)),
            (_produce, (x_desc, tiles, *shared)),
        ],
        [4, 1],
        [160, 24],
    )


def _run(patch: pytest.MonkeyPatch, tiles: int, rows: int, fault: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives, and what it should. After its rows x is NaN."""
    n = _N.value
    x = torch.randint(-8, 8, (tiles * n, n)).half()
    y = torch.randint(-8, 8, (2 * n, n)).half()
    expected = y.float() @ torch.cat((x[:rows], torch.zeros(tiles * n - rows, n))).view(tiles, n, n).sum(0)
    x[rows:] = torch.nan
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    described, out = TensorDescriptor(x, list(x.shape), [n, 1], [n, n], layout), torch.empty(2 * n, n)
    emulate(patch, sys.modules[__name__], "_sum_kernel", {})
    _sum_kernel[(1,)](described, y, out, rows, tiles, FAULT=fault, num_warps=4)
    return out, expected


@pytest.mark.parametrize(("tiles", "rows"), [(1, 64), (3, 150), (8, 510)])
def test_partitions_share_tiles(tiles: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out, expected = _run(monkeypatch, tiles, rows)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("one does not wait", AssertionError, "read before it came"),
        ("no fence", AssertionError, "read before it came"),
        ("looked at too early", AttributeError, "Product"),
        ("some warps still read", AssertionError, "overwritten while it is needed"),
        ("released under a product", AssertionError, "overwritten while it is needed"),
        ("they store different things", AssertionError, "overwritten while it is needed"),
        ("one never releases", AssertionError, "wait for ever: 1 of 2 arrived"),
        ("no tile comes", AssertionError, "wait for ever: 0 of 1 arrived.*; 0 of 1 arrived"),
        ("a tile too many", AssertionError, "ends before all has come"),
        ("expected twice", AssertionError, "nobody waited for the phase before"),
        ("past the last row", AssertionError, "outside of its tensor"),
        ("initialised twice", AssertionError, "initialised twice"),
        ("no meeting at first", AssertionError, "don't see this barrier yet"),
        ("a worker fails", AssertionError, "on purpose"),
    ],
)
def test_a_fault_is_found(fault: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no partition is left behind."""
    threads = threading.active_count()
    with pytest.raises(error, match=message):
        _run(monkeypatch, 8, 510, fault)
    assert threading.active_count() == threads
