"""FastDMS: language models with a learned-sparse KV cache, compiled: ``fastdms.compile(model)``, then call it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdms.bundled_model import default_model
    from fastdms.completion import Completion, StreamPiece
    from fastdms.config import DMSConfig
    from fastdms.kv_report import KVReport
    from fastdms.llm import LLM
    from fastdms.runtime import CompiledModel, IncompleteError, compile
    from fastdms.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompiledModel",
    "Completion",
    "DMSConfig",
    "IncompleteError",
    "KVReport",
    "SamplingParams",
    "StreamPiece",
    "compile",
    "default_model",
]
__version__ = "0.1.0"

# Names are imported when first used, so that `fastdms --help` answers before torch is loaded.
_HOMES = {
    "LLM": "llm",
    "CompiledModel": "runtime",
    "Completion": "completion",
    "DMSConfig": "config",
    "IncompleteError": "runtime",
    "KVReport": "kv_report",
    "SamplingParams": "sampling_params",
    "StreamPiece": "completion",
    "compile": "runtime",
    "default_model": "bundled_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdms' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastdms.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
