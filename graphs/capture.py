"""Record what runs into a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["GraphRecorder", "Recorder", "Recording", "capture"]

_WARM_UP_RUNS = 2  # the first compiles and specialises, the second shows that nothing is left to do


class Recording(NamedTuple):
    """What was captured.

    replay: runs it again, into the same ``outputs``.
    kept_bytes: device memory that it holds until it is dropped; then later recordings use it.
    pool_bytes: by which capturing it made the pool that all recordings share grow; 0 where it found room.
    """

    replay: Callable[[], object]
    outputs: tuple[torch.Tensor, ...]
    kept_bytes: int
    pool_bytes: int


class Recorder(Protocol):
    """Makes recordings."""

    def warm_up(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        """Run until nothing is left to compile."""

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recording:
        """Capture what ``run`` launches, without running it."""


class GraphRecorder:
    """Records into CUDA graphs of one pool, on the current device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # A pool whose last graph is gone can't be captured into again, so one stays that takes nothing from it.
        self._anchor = capture(torch.zeros(1, device="cuda").zero_, self._pool)

    def warm_up(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        """Run on a stream of its own, as capturing will."""
        stream = _warm_up_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recording:
        """Capture ``run``, which must have been warmed up; its bytes are what the allocator says."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # else it happens inside, and hides what the pool grows by
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        graph, outputs = capture(run, self._pool)
        return Recording(
            replay=graph.replay,
            outputs=outputs,
            kept_bytes=max(0, torch.cuda.memory_allocated() - allocated),
            pool_bytes=max(0, torch.cuda.memory_reserved() - reserved),
        )


def capture(step: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``(graph, what step returned)`` after recording ``step`` into ``pool``; it must have run before.

    The outputs live in the pool, where the replay of another graph may overwrite them: read them before it.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = step()
    return graph, outputs


@functools.cache
def _warm_up_stream(device_index: int) -> torch.cuda.Stream:
    """One for all models of a device: cuBLAS keeps a workspace for each stream that it ever ran on."""
    return torch.cuda.Stream(device_index)
