"""Triton's interpreter without costs that the tests have no use for."""

from __future__ import annotations

from typing import Any

__all__ = ["make_fast"]


class _Nothing:
    def restore(self) -> None:
        pass


def make_fast() -> None:
    """Patch the language once a launch rather than once a device function, look each dtype up once, make each shape
    once, and look for no integer overflow.

    Offsets past 32 bits have tests of their own, on a GPU.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = type(interpreter.interpreter_builder.options)(sanitize_overflow=False)
    patch_lang = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return _Nothing()
        outermost = not patched
        scope = patch_lang(fn)
        patched.update(languages)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

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
        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attribute
    _share_shapes()


def _share_shapes() -> None:
    """Blocks of one shape share the objects that say so; else each number of a shape is wrapped anew, again and again,
    for every operation of a program.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    block_type, tensor = core.block_type, core.tensor
    make_block_type, equal, broadcast = block_type.__init__, block_type.__eq__, TritonSemantic.broadcast_impl_value
    # Sizes -> the shape and size of a block, those of a tensor, and how the name begins.
    known: dict[tuple[int, ...], tuple[Any, int, Any, Any, str]] = {}

    def block_type_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if sizes not in known:
            make_block_type(self, element_ty, shape)
            of_tensor = core.tuple([core.constexpr(size) for size in sizes])
            known[sizes] = self.shape, self.numel, of_tensor, core.constexpr(self.numel), f"<{self.shape}, "
        self.shape, self.numel, self.tensor_shape, self.tensor_numel, name = known[sizes]
        self.element_ty, self.name = element_ty, f"{name}{element_ty}>"

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

    block_type.__init__, block_type.__eq__ = block_type_init, block_type_eq
    tensor.__init__, TritonSemantic.broadcast_impl_value = tensor_init, broadcast_impl_value
