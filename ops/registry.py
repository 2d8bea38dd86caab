"""One way to register an op: schema, fake, plain reference on CPU, Triton on CUDA; imported at the first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastdms", "DEF")


def register(schema: str, *, fake: Callable[..., Any], reference: str, kernel: str) -> None:
    """Define ``fastdms::<name>``; ``reference`` and ``kernel``, ``"module:function"``, take the schema's arguments."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _lazy(reference), "CPU")
    LIBRARY.impl(name, _lazy(kernel), "CUDA")
    torch.library.register_fake(f"fastdms::{name}", fake, lib=LIBRARY)


def _lazy(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call
