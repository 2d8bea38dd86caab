"""Record a step into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture"]


def capture(step: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``(graph, what step returned)`` after recording ``step`` into ``pool``; it must have run before.

    The outputs live in the pool, where the replay of another graph may overwrite them: read them before it.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = step()
    return graph, outputs
