"""One way to register an op: schema, check, fake, reference on CPU, Triton on CUDA; imported at the first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastdms", "DEF")


def register(
    schema: str, *, fake: Callable[..., Any], reference: str, kernel: str, check: Callable[..., None] | None = None
) -> None:
    """Define ``fastdms::<name>``; all take the schema's arguments, ``reference`` and ``kernel`` are "module:function".

    check: raises ValueError for what doesn't fit, before any of the others runs. It is part of the op, so that the
    compiler, which follows every line of a Python function around one, runs it instead of tracing it.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _checked(check, _lazy(reference)), "CPU")
    LIBRARY.impl(name, _checked(check, _lazy(kernel)), "CUDA")
    torch.library.register_fake(f"fastdms::{name}", _checked(check, fake), lib=LIBRARY)


def _lazy(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


def _checked(check: Callable[..., None] | None, function: Callable[..., Any]) -> Callable[..., Any]:
    if check is None:
        return function

    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call
