"""Shared memory of an emulated Gluon program, and what Hopper moves and multiplies there while the program goes on.

Nothing comes before it is waited for. What hangs, races or reads garbage on a GPU, now and then or always, fails: a
wait for a phase that won't end, a tile read before it came or overwritten before all warps have read it, a barrier used
before all warps see it, anything still under way in the end.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["Descriptor", "SharedMemory"]

# States of an element. What this warp alone has done with is READ; FREE is what all have.
_EMPTY, _COMING, _UNREAD, _READING, _READ, _FREE = range(6)
_BARRIER_LAYOUT = "barriers"


class Descriptor:
    """A host's TensorDescriptor as a kernel sees it."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.layout = host.layout
        self.block_type = types.SimpleNamespace(shape=host.block_shape)
        self.dtype = types.SimpleNamespace(torch=host.base.dtype, primitive_bitwidth=8 * host.base.element_size())


class _Tiles:
    """Elements in shared memory with their states; parts of it are views."""

    def __init__(self, data: torch.Tensor, state: torch.Tensor, layout: Any) -> None:
        self.data, self.state, self.layout = data, state, layout

    def _view(self, view: Callable[[torch.Tensor], torch.Tensor]) -> _Tiles:
        return _Tiles(view(self.data), view(self.state), self.layout)

    def index(self, i: Any) -> _Tiles:
        assert 0 <= i < len(self.data), "no such tile"
        return self._view(lambda x: x[int(i)])

    def slice(self, start: int, length: int) -> _Tiles:
        return self._view(lambda x: x.narrow(0, start, length))

    def permute(self, order: tuple[int, ...]) -> _Tiles:
        return self._view(lambda x: x.permute(order))


class _Barrier:
    """An mbarrier; its phase ends when it is waited for."""

    def __init__(self) -> None:
        self.count, self.is_fenced, self.is_ready = 0, False, False
        self.phase = 0
        self.arrived, self.expected = 0, 0
        self.loads: list[tuple[_Tiles, torch.Tensor]] = []  # what comes in this phase, and where

    def expect(self, num_bytes: int, pred: Any = True) -> None:
        if pred:
            assert self.is_ready, "other warps don't see this barrier yet"
            assert self.arrived < self.count, "nobody waited for the phase before"
            self.arrived += 1
            self.expected += int(num_bytes)

    def wait(self, phase: Any) -> None:
        assert self.is_ready, "other warps don't see this barrier yet"
        if self.phase % 2 != phase:
            return  # that one has ended
        num_bytes = sum(data.nbytes for _, data in self.loads)
        assert self.arrived == self.count, "waits for ever: not all have arrived"
        assert self.expected == num_bytes, f"waits for ever: {self.expected} bytes expected, {num_bytes} come"
        for tile, data in self.loads:
            tile.data.copy_(data)
            tile.state.fill_(_UNREAD)
        self.phase += 1
        self.arrived, self.expected, self.loads = 0, 0, []


class _Barriers:
    def __init__(self, barriers: list[_Barrier]) -> None:
        self._barriers = barriers

    def index(self, i: Any) -> _Barrier:
        assert 0 <= i < len(self._barriers), "no such barrier"
        return self._barriers[int(i)]


class _Product:
    """What the matrix units work on; nobody may look at it before ``warpgroup_mma_wait``."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class SharedMemory:
    """One program's."""

    def __init__(self) -> None:
        self._tiles: list[_Tiles] = []
        self._barriers: list[_Barrier] = []
        self._reading: list[torch.Tensor] = []  # states of what the matrix units read
        self._read: list[torch.Tensor] = []

    def stand_ins(self) -> dict[str, Any]:
        """By the names that kernels import them by."""
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: _BARRIER_LAYOUT,
            init=self._init_barrier,
            expect=lambda barrier, num_bytes, pred=True: barrier.expect(num_bytes, pred),
            wait=lambda barrier, phase: barrier.wait(phase),
        )
        return {
            "mbarrier": mbarrier, "fence_async_shared": self._fence, "barrier": self._sync, "load_tile": self._load,
            "warpgroup_mma": self._mma, "warpgroup_mma_wait": self._mma_wait,
        }  # fmt: skip

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> _Tiles | _Barriers | _Barrier:
        if layout == _BARRIER_LAYOUT:
            made = [_Barrier() for _ in range(shape[0])]
            self._barriers += made
            return _Barriers(made) if len(shape) > 1 else made[0]
        data = torch.zeros(shape, dtype=dtype.torch)
        self._tiles.append(_Tiles(data, torch.zeros(shape, dtype=torch.int8), layout))
        return self._tiles[-1]

    def finish(self) -> None:
        assert not any(barrier.arrived or barrier.loads for barrier in self._barriers), "ends before all has come"
        assert not self._reading, "ends before all products are there"
        assert not any(bool((tiles.state == _UNREAD).any()) for tiles in self._tiles), "something came in vain"

    def _init_barrier(self, barrier: _Barrier, count: int) -> None:
        assert barrier.count == 0, "initialised twice"
        barrier.count = count

    def _fence(self) -> None:
        for barrier in self._barriers:
            barrier.is_fenced = barrier.count > 0

    def _sync(self) -> None:
        for barrier in self._barriers:
            barrier.is_ready = barrier.is_fenced
        for state in self._read:
            state.fill_(_FREE)
        self._read = []

    def _load(self, desc: Descriptor, at: list[Any], barrier: _Barrier, target: _Tiles, pred: Any = True) -> None:
        if not pred:
            return
        row, column = map(int, at)
        data = torch.zeros(desc.block_type.shape, dtype=desc.dtype.torch)
        assert barrier.is_ready, "other warps don't see this barrier yet"
        assert 0 <= row < desc.tensor.shape[0], "a tile lies outside of its tensor"
        assert 0 <= column < desc.tensor.shape[1], "a tile lies outside of its tensor"
        assert column * data.element_size() % 16 == 0, "a tile begins within 16 bytes"
        assert (target.data.shape, target.data.dtype, target.layout) == (data.shape, data.dtype, desc.layout)
        assert bool(((target.state == _EMPTY) | (target.state == _FREE)).all()), "overwritten while it is needed"
        inside = desc.tensor[row : row + data.shape[0], column : column + data.shape[1]]
        data[: inside.shape[0], : inside.shape[1]] = inside
        target.state.fill_(_COMING)
        barrier.loads.append((target, data))

    def _operand(self, tiles: _Tiles) -> torch.Tensor:
        assert bool((tiles.state >= _UNREAD).all()), "read before it came"
        tiles.state.fill_(_READING)
        self._reading.append(tiles.state)
        return tiles.data.float()

    def _mma(self, a: _Tiles, b: _Tiles, acc: torch.Tensor, *, use_acc: bool = True, is_async: bool) -> _Product:
        assert is_async
        assert a.data.dtype == b.data.dtype
        assert acc.dtype == torch.float32
        product = self._operand(a) @ self._operand(b)
        assert product.shape == acc.shape
        return _Product(acc + product if use_acc else product)

    def _mma_wait(self, num_outstanding: int, products: tuple[_Product, ...]) -> tuple[torch.Tensor, ...]:
        assert num_outstanding == 0
        for state in self._reading:
            state.fill_(_READ)
        self._read, self._reading = self._read + self._reading, []
        return tuple(product.value for product in products)
