"""Triton's interpreter without costs that the tests have no use for."""

from __future__ import annotations

from typing import Any

__all__ = ["make_fast"]


class _Nothing:
    def restore(self) -> None:
        pass


def make_fast() -> None:
    """Patch the language once a launch rather than once a device function, look each dtype up once, and look for no
    integer overflow.

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
