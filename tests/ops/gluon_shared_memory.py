"""Shared memory of an emulated Gluon program, and what Hopper moves and multiplies there while the program goes on.

Nothing comes before it is waited for. What hangs, races or reads garbage on a GPU, now and then or always, fails: a
wait for a phase that won't end, a tile read before it came or overwritten before all that read it have done with it, a
barrier used before all warps see it, anything still under way in the end. What nobody wrote is NaN, or the least whole
number.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.ops.gluon_partitions import Access, Partition, Partitions, Product

__all__ = ["Descriptor", "Dtype", "SharedMemory"]

_BARRIER_LAYOUT = "barriers"


class Dtype(NamedTuple):
    """Of what lies in shared memory."""

    torch: torch.dtype
    primitive_bitwidth: int


class Descriptor:
    """A host's TensorDescriptor as a kernel sees it."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.layout = host.layout
        self.block_type = types.SimpleNamespace(shape=host.block_shape)
        self.dtype = Dtype(host.base.dtype, 8 * host.base.element_size())


class _Tiles:
    """Elements in shared memory, parts of it as views; accesses: what is being done with all of it, or was last."""

    def __init__(self, memory: SharedMemory, data: torch.Tensor, layout: Any, accesses: list[Access]) -> None:
        self._memory, self.data, self.layout, self.accesses = memory, data, layout, accesses
        self.shape, self.dtype = list(data.shape), Dtype(data.dtype, 8 * data.element_size())
        self.place = range(data.storage_offset(), data.storage_offset() + data.numel())

    def _view(self, data: torch.Tensor) -> _Tiles:
        return _Tiles(self._memory, data, self.layout, self.accesses)

    def index(self, i: Any) -> _Tiles:
        assert 0 <= i < len(self.data), "no such tile"
        return self._view(self._in_order()[int(i)])

    def slice(self, start: int, length: int) -> _Tiles:
        return self._view(self._in_order().narrow(0, start, length))

    def reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> _Tiles:
        """Rows cut otherwise into tiles, of whole eights: what is swizzled alike."""
        assert (dtype, shape[-1], layout) == (self.dtype, self.shape[-1], self.layout)
        assert shape[-2] % 8 == self.shape[-2] % 8 == 0, "a tile begins within eight rows"
        return self._view(self._in_order().view(shape))

    def permute(self, order: tuple[int, ...]) -> _Tiles:
        return self._view(self.data.permute(order))

    def _in_order(self) -> torch.Tensor:
        assert self.data.is_contiguous(), "a part of what is permuted has no one place"
        return self.data

    def load(self, layout: Any) -> torch.Tensor:
        """By all warps. What another partition is about to store is NaN."""
        partition, data = self._memory.partitions.running, self._in_order().clone()
        known = partition.known.union(partition.own)
        racing = [x for x in self._met() if x.kind == "store" and x not in known]
        for access in racing:
            start = access.place.start - self.place.start
            data.view(-1)[max(start, 0) : start + len(access.place)] = _nothing(data.dtype)
        partition.own.append(self.read(known.union(racing)))
        return data

    def store(self, value: torch.Tensor) -> None:
        """By all warps. It disturbs nobody where it leaves what is there: partitions may store the same."""
        assert (value.shape, value.dtype) == (self.data.shape, self.data.dtype)
        partition = self._memory.partitions.running
        changed = (_bits(value) != _bits(self._in_order())).flatten().nonzero()
        if len(changed):
            start = self.place.start + int(changed[0])
            access = Access("store", range(start, self.place.start + int(changed[-1]) + 1))
            self.write(access, partition.known.union(partition.own))
            self.data.copy_(value)
        stored = [x for x in self._met() if x.kind == "store" and x not in partition.known]
        for access in stored:
            access.is_fenced = False
        partition.own += stored

    def read(self, known: set[Access]) -> Access:
        """By somebody who knows of these accesses."""
        for access in self._met():
            if access.kind != "read":
                assert access in known, "read before it came"
                access.is_used = True
        self.accesses.append(Access("read", self.place))
        return self.accesses[-1]

    def write(self, write: Access, known: set[Access]) -> None:
        place = write.place
        old = [x for x in self.accesses if x.meets(place)]
        assert all(x in known and x.is_used for x in old), "overwritten while it is needed"
        inside = [x for x in old if x.place.start >= place.start and x.place.stop <= place.stop]
        self.accesses[:] = [x for x in self.accesses if x not in inside] + [write]

    def _met(self) -> list[Access]:
        return [x for x in self.accesses if x.meets(self.place)]


def _nothing(dtype: torch.dtype) -> float:
    """What nobody wrote."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _bits(x: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = x.as_subclass(torch.Tensor)
    return whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


class _Barrier:
    """An mbarrier. A phase in which something comes ends when it is waited for, another when all have arrived."""

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self._made = Access("store", range(0))
        self._known: set[Access] = set()  # by whoever waits for it
        self._arriving: set[Access] = set()  # will be, when this phase has ended
        self._phase = 0
        self._count, self._arrived, self._expected = 0, 0, 0
        self._loads: list[tuple[_Tiles, torch.Tensor, Access]] = []  # what comes in this phase, and where

    def init(self, count: int) -> None:
        assert self._count == 0, "initialised twice"
        self._count = count
        self._partitions.running.own.append(self._made)

    def _check_seen(self, by_one: bool = False) -> Partition:
        """By all warps, or by the one that arrives for them."""
        partition = self._partitions.running
        is_seen = self._made in partition.known or (by_one and self._made in partition.own)
        assert is_seen, "other warps don't see this barrier yet"
        return partition

    def arrive(self, count: int = 1, pred: Any = True, num_bytes: int = 0) -> None:
        if not pred:
            return
        partition = self._check_seen(by_one=True)
        assert self._arrived + count <= self._count, "nobody waited for the phase before"
        self._arrived += count
        self._expected += int(num_bytes)
        self._arriving |= partition.known
        if not self._expected and not self._loads and self._arrived == self._count:
            self._end_phase()

    def expect(self, num_bytes: int, pred: Any = True) -> None:
        self.arrive(pred=pred, num_bytes=num_bytes)

    def load(self, target: _Tiles, data: torch.Tensor) -> None:
        known = self._check_seen().known
        access = Access("load", target.place)
        target.write(access, known)
        self._loads.append((target, data, access))

    def wait(self, phase: Any, pred: Any = True) -> None:
        if not pred:
            return
        partition = self._check_seen()
        self._partitions.wait_until(lambda: self._phase % 2 != phase or self._can_end(), self._describe)
        if self._phase % 2 == phase:
            self._end_phase()
        partition.known |= self._known

    def _num_bytes(self) -> int:
        return sum(data.nbytes for _, data, _ in self._loads)

    def _can_end(self) -> bool:
        return self._arrived == self._count and self._expected == self._num_bytes()

    def _end_phase(self) -> None:
        for tile, data, _ in self._loads:
            tile.data.copy_(data)
        self._known |= self._arriving | {access for _, _, access in self._loads}
        self._phase += 1
        self._arrived, self._expected, self._loads, self._arriving = 0, 0, [], set()

    def _describe(self) -> str:
        return f"{self._arrived} of {self._count} arrived, {self._num_bytes()} bytes of {self._expected} come"

    def finish(self) -> None:
        assert not self._arrived, "ends before all has come"
        assert not self._loads, "ends before all has come"


class _Barriers:
    def __init__(self, barriers: list[_Barrier]) -> None:
        self._barriers = barriers

    def index(self, i: Any) -> _Barrier:
        assert 0 <= i < len(self._barriers), "no such barrier"
        return self._barriers[int(i)]


class SharedMemory:
    """One program's."""

    def __init__(self) -> None:
        self.partitions = Partitions()
        self._tiles: list[_Tiles] = []
        self._barriers: list[_Barrier] = []

    def stand_ins(self) -> dict[str, Callable[..., Any] | types.SimpleNamespace]:
        """By the names that kernels import them by."""
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: _BARRIER_LAYOUT,
            init=_Barrier.init,
            arrive=_Barrier.arrive,
            expect=_Barrier.expect,
            wait=_Barrier.wait,
        )
        return {
            "mbarrier": mbarrier, "fence_async_shared": lambda: self.partitions.running.fence(),
            "barrier": lambda: self.partitions.running.meet(), "load_tile": self._load, "warpgroup_mma": self._mma,
            "reinterpret": _Tiles.reinterpret,
            "warpgroup_mma_init": lambda value: Product(value, [], is_done=True), "warpgroup_mma_wait": self._mma_wait,
        }  # fmt: skip

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> _Tiles | _Barriers | _Barrier:
        if layout == _BARRIER_LAYOUT:
            made = [_Barrier(self.partitions) for _ in range(shape[0])]
            self._barriers += made
            return _Barriers(made) if len(shape) > 1 else made[0]
        element = dtype if isinstance(dtype, torch.dtype) else dtype.torch
        data = torch.full(shape, _nothing(element), dtype=element)
        self._tiles.append(_Tiles(self, data, layout, []))
        return self._tiles[-1]

    def finish(self) -> None:
        for barrier in self._barriers:
            barrier.finish()
        self.partitions.running.check_end()
        assert all(x.is_used for tiles in self._tiles for x in tiles.accesses), "something came in vain"

    def _load(self, desc: Descriptor, at: list[Any], barrier: _Barrier, target: _Tiles, pred: Any = True) -> None:
        if not pred:
            return
        row, column = map(int, at)
        data = torch.zeros(desc.block_type.shape, dtype=desc.dtype.torch)
        assert 0 <= row < desc.tensor.shape[0], "a tile lies outside of its tensor"
        assert 0 <= column < desc.tensor.shape[1], "a tile lies outside of its tensor"
        assert column * data.element_size() % 16 == 0, "a tile begins within 16 bytes"
        assert (target.data.shape, target.data.dtype, target.layout) == (data.shape, data.dtype, desc.layout)
        inside = desc.tensor[row : row + data.shape[0], column : column + data.shape[1]]
        data[: inside.shape[0], : inside.shape[1]] = inside
        barrier.load(target, data)

    def _mma(self, a: Any, b: _Tiles, acc: torch.Tensor | Product, *, use_acc: bool = True, is_async: bool) -> Product:
        """The left operand lies in shared memory or in registers; the sums so far may be on their way."""
        assert is_async
        partition = self.partitions.running
        shared = [tiles for tiles in (a, b) if isinstance(tiles, _Tiles)]
        left = a.data if isinstance(a, _Tiles) else a
        sums = acc.value if isinstance(acc, Product) else acc
        assert left.dtype == b.data.dtype
        assert sums.dtype == torch.float32
        product = left.float() @ b.data.float()
        assert product.shape == sums.shape
        reads = [tiles.read(partition.known) for tiles in shared]
        partition.products.append(Product(sums + product if use_acc else product, reads))
        return partition.products[-1]

    def _mma_wait(self, num_outstanding: int, deps: Any) -> Any:
        """What isn't done yet stays a product; one alone comes back by itself, as on a GPU."""
        self.partitions.running.finish_products(num_outstanding)
        values = tuple(dep.value if isinstance(dep, Product) and dep.is_done else dep for dep in deps)
        return values[0] if len(values) == 1 else values
