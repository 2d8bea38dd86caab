"""Triton's interpreter without costs that the tests have no use for."""

from __future__ import annotations

from functools import cached_property
from typing import Any

__all__ = ["make_fast"]


class _Nothing:
    def restore(self) -> None:
        pass


def make_fast() -> None:
    """Patch the language once for good rather than at each launch and device function, look each dtype up once, make
    each shape and constant once, leave operands of one dtype as they are, and look for no integer overflow.

    Offsets past 32 bits have tests of their own, on a GPU.
    """
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = type(interpreter.interpreter_builder.options)(sanitize_overflow=False)
    patch_lang = interpreter._patch_lang
    nothing = _Nothing()
    patched: set[int] = set()  # ids of modules' globals

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patch_lang(fn)
            patched.add(id(fn.__globals__))
        return nothing

    interpreter._patch_lang = patch_once

    numpy_dtype = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def known_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    interpreter._get_np_dtype = known_dtype

    def patch_attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # the wrapper looks for the argument given here

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attribute

    def handle_init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if not dtype.is_ptr() and data.itemsize * 8 > dtype.primitive_bitwidth:
            self.__post_init__()

    interpreter.TensorHandle.__init__ = handle_init
    _share_shapes()
    _share_constants()


def _share_shapes() -> None:
    """Blocks of one shape share the objects that say so; else each number of a shape is wrapped anew, again and again,
    for every operation of a program.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    block_type, tensor = core.block_type, core.tensor
    make_block_type, equal, broadcast = block_type.__init__, block_type.__eq__, TritonSemantic.broadcast_impl_value
    join = TritonSemantic.join
    # Sizes -> the shape and size of a block, and those of a tensor.
    known: dict[tuple[int, ...], tuple[Any, int, Any, Any]] = {}
    shared: dict[int, tuple[Any, int, Any, Any]] = {}  # the same, by the id of such a shape

    def block_type_init(self: Any, element_ty: Any, shape: Any) -> None:
        if id(shape) not in shared:
            sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
            if sizes not in known:
                make_block_type(self, element_ty, shape)
                of_tensor = core.tuple([core.constexpr(size) for size in sizes])
                known[sizes] = self.shape, self.numel, of_tensor, core.constexpr(self.numel)
                shared[id(self.shape)] = shared[id(of_tensor)] = known[sizes]
            shape = known[sizes][0]
        self.element_ty = element_ty
        self.shape, self.numel, self.tensor_shape, self.tensor_numel = shared[id(shape)]

    def block_type_name(self: Any) -> str:
        return f"<{self.shape}, {self.element_ty}>"

    def block_type_eq(self: Any, other: Any) -> Any:
        if isinstance(other, block_type) and self.shape is other.shape:
            return self.element_ty == other.element_ty
        return equal(self, other)

    of_scalar = core.tuple([]), core.constexpr(1)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.tensor_shape, type.tensor_numel) if type.is_block() else of_scalar

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # of two scalars too
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def join_impl(self: Any, a: Any, b: Any) -> Any:
        if a.shape is b.shape and a.type.is_block():
            joined = block_type(a.dtype, [*a.type.shape, 2])
            return self.make_tensor(self.builder.create_join(a.handle, b.handle), joined)
        return join(self, a, b)

    block_type.__init__, block_type.__eq__ = block_type_init, block_type_eq
    block_type.name = cached_property(block_type_name)
    block_type.name.__set_name__(block_type, "name")
    TritonSemantic.join = join_impl
    tensor.__init__, TritonSemantic.broadcast_impl_value = tensor_init, broadcast_impl_value


def _share_constants() -> None:
    """Numbers of one value and dtype share a tensor, which nothing writes to; and operands of one dtype, what most
    operations have, are cast to no other: only a division might.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    tensor = core.tensor
    make_constant, check_operands = TritonSemantic.scalar_constant, TritonSemantic.binary_op_type_checking_impl
    known: dict[tuple[str, str], Any] = {}

    def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
        key = repr(value), dtype.name  # of 0.0 and -0.0 the values are equal
        if key not in known:
            known[key] = make_constant(self, value, dtype)
        return known[key]

    def binary_op_type_checking_impl(
        self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        of_one_dtype = type(lhs) is tensor and type(rhs) is tensor and lhs.dtype is rhs.dtype
        if of_one_dtype and not div_or_mod and not lhs.dtype.is_ptr():
            return self.broadcast_impl_value(lhs, rhs)
        return check_operands(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    TritonSemantic.scalar_constant = scalar_constant
    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl
