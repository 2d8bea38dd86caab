"""A Gluon kernel as plain Python over torch tensors: all that it computes, but not where its layouts put it."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime import JITFunction

from tests.ops.gluon_shared_memory import Descriptor, Dtype, SharedMemory

__all__ = ["emulate"]

_LAYOUTS = ("BlockedLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout")
_Assembly = dict[str, Callable[..., Any]]  # text -> what it does
_POINTWISE = ("abs", "ceil", "exp", "exp2", "log2", "maximum", "minimum")


class _Block(torch.Tensor):
    """A tensor whose ``to`` also reads its bits as another type, and which nothing changes in place."""

    def to(self, dtype: torch.dtype | Dtype, bitcast: bool = False) -> _Block:  # type: ignore[override]
        wanted = _torch_dtype(dtype)
        return _block(self.view(wanted) if bitcast else super().to(wanted))

    def __iadd__(self, other: Any) -> _Block:  # type: ignore[misc]
        return _block(self + other)

    def __imul__(self, other: Any) -> _Block:  # type: ignore[misc]
        return _block(self * other)


class _Constant(int):
    """A module's constexpr, for kernels and hosts."""

    @property
    def value(self) -> int:
        return int(self)


def _torch_dtype(dtype: torch.dtype | Dtype) -> torch.dtype:
    return dtype.torch if isinstance(dtype, Dtype) else dtype


def _block(x: Any) -> _Block:
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(x, dtype={bool: torch.bool, float: torch.float32}.get(type(x), torch.int32))
    block: _Block = x.as_subclass(_Block)
    return block


class _Pointer:
    """Elements of a tensor from offsets on; outside its storage nothing may be read or written."""

    def __init__(self, memory: torch.Tensor, offset: Any) -> None:
        self._memory, self._offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def of(cls, x: torch.Tensor) -> _Pointer:
        memory = x.new_empty(0)
        memory.set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.element_size(),))  # type: ignore[call-overload]
        return cls(memory, x.storage_offset())

    def to(self, dtype: torch.dtype) -> _Block:
        return _block(self._offset).to(dtype)

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self._memory, self._offset + offset)

    def _at(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        at = _block(self._offset).as_subclass(torch.Tensor).long()
        valid = torch.ones_like(at, dtype=torch.bool) if mask is None else _block(mask).as_subclass(torch.Tensor)
        at, valid = torch.broadcast_tensors(at, valid)
        inside = (at >= 0) & (at < self._memory.numel())
        assert bool((inside | ~valid).all()), "an address lies outside of its tensor's storage"
        return at.where(valid, 0), valid

    def load(self, mask: Any = None, other: Any = None) -> _Block:
        at, valid = self._at(mask)
        found = self._memory[at].clone()  # a single element would be a view, which later stores change
        return _block(found if mask is None else found.where(valid, other))

    def store(self, value: torch.Tensor, mask: Any = None) -> None:
        at, valid = self._at(mask)
        self._memory[at[valid]] = value.as_subclass(torch.Tensor).expand(at.shape)[valid]


def _pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of tensors and numbers alike."""
    return lambda *args: function(*map(_block, args))


def _where(condition: Any, x: Any, y: Any) -> Any:
    """Of pointers one is taken as a whole."""
    if isinstance(x, _Pointer):
        return x if condition else y
    return torch.where(*map(_block, (condition, x, y)))


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _multiple_of(x: _Block, divisor: int) -> _Block:
    assert bool((x % divisor == 0).all())
    return x


def _split(x: _Block) -> tuple[torch.Tensor, ...]:
    assert x.shape[-1] == 2
    return x.unbind(-1)


def _language(
    program: tuple[int, ...], grid: tuple[int, ...], assembly: _Assembly, memory: SharedMemory
) -> types.SimpleNamespace:
    """What stands in for Gluon's language in one program."""

    def full(shape: list[int], value: Any, dtype: torch.dtype | Dtype, layout: None = None) -> _Block:
        return _block(_block(value).to(dtype).expand(shape).clone())

    def inline_asm_elementwise(asm: str, constraints: str, args: list[_Block], **options: Any) -> Any:
        return assembly[asm](*args)

    return types.SimpleNamespace(
        NVMMASharedLayout=NVMMASharedLayout,
        SwizzledSharedLayout=lambda *_: None,
        **{name: getattr(torch, name) for name in ("int32", "int64", "float16", "bfloat16", "float32")},
        **dict.fromkeys(_LAYOUTS, lambda *_, **__: None),
        **{name: _pointwise(getattr(torch, name)) for name in _POINTWISE},
        allocate_shared_memory=memory.allocate,
        arange=lambda start, end, layout: _block(torch.arange(start, end, dtype=torch.int32)),
        associative_scan=lambda x, axis, combine: x.cumsum(axis, dtype=x.dtype),
        cdiv=lambda a, b: (a + b - 1) // b,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        full=full,
        inline_asm_elementwise=inline_asm_elementwise,
        join=lambda a, b: torch.stack((a, b), -1),
        load=lambda pointer, mask=None, other=None, cache_modifier="": pointer.load(mask, other),
        max=lambda x, axis: x.amax(axis),
        multiple_of=_multiple_of,
        num_programs=lambda axis: _block(grid[axis]),
        permute=lambda x, order: x.permute(order),
        program_id=lambda axis: _block(program[axis]),
        reshape=lambda x, shape: x.reshape(shape),
        split=_split,
        static_assert=_static_assert,
        static_range=range,
        store=lambda pointer, value, mask=None: pointer.store(value, mask),
        sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
        warp_specialize=memory.partitions.specialise,
        where=_where,
        zeros=lambda shape, dtype, layout: full(shape, 0, dtype),
        zeros_like=torch.zeros_like,
    )


def _mma(a: _Block, b: _Block, acc: _Block) -> torch.Tensor:
    """The matrix units' product: 16-bit operands, fp32 sums."""
    assert a.dtype == b.dtype == torch.float16
    assert acc.dtype == torch.float32
    return a.to(torch.float32) @ b.to(torch.float32) + acc


def _given(x: Any) -> Any:
    """An argument as a kernel gets it."""
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    return _Pointer.of(x) if isinstance(x, torch.Tensor) else x


class _Kernel:
    def __init__(self, modules: tuple[types.ModuleType, ...], kernel: Callable[..., None], assembly: _Assembly) -> None:
        self._modules, self._kernel, self._assembly = modules, kernel, assembly

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, maxnreg: int | None = None, **constants: Any) -> None:
            if "num_warps" not in inspect.signature(self._kernel).parameters:
                del constants["num_warps"]
            given = [_given(x) for x in args]
            for program in itertools.product(*map(range, grid)):
                memory = SharedMemory()
                stand_ins = {"gl": _language(program, grid, self._assembly, memory), **memory.stand_ins()}
                for module in self._modules:
                    vars(module).update(stand_ins)
                self._kernel(*given, **constants)
                memory.finish()

        return launch


def emulate(
    patch: pytest.MonkeyPatch, module: types.ModuleType, kernel: str, assembly: _Assembly, *helpers: types.ModuleType
) -> None:
    """Let ``module``'s kernel of that name run on the CPU, without dependent launches.

    helpers: modules with device functions that it calls.
    """
    modules = (module, *helpers)
    for each in modules:
        for name in ("gl", *SharedMemory().stand_ins()):  # a launch replaces them
            patch.setattr(each, name, vars(each).get(name), raising=False)
        patch.setattr(each, "mma_v2", _mma, raising=False)
        for name, value in list(vars(each).items()):
            if each is module and name == kernel:
                patch.setattr(each, name, _Kernel(modules, value.fn, assembly))
            elif isinstance(value, JITFunction):
                patch.setattr(each, name, value.fn)
            elif isinstance(value, constexpr):
                constant = _Constant(value.value) if isinstance(value.value, int) else value.value
                patch.setattr(each, name, constant)
