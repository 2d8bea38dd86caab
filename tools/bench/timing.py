"""Microseconds of a launch: replays of a captured CUDA graph with a cold L2 cache, or wall clock on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["cold_sets", "time_launches"]

Launch = Callable[[], Any]
_MOST_SETS = 128
_LEAST_SETS = 2
_COLD_FACTOR = 2  # input sets together, times the L2 cache: none survives until its next turn
_LONG_BYTES = 4 << 30  # what a replay moves: a millisecond and more, beside which its own start is little
_LONG_SETS = 16
_WARM_UP_RUNS = 2


def cold_sets(set_bytes: int, device: torch.device) -> int:
    """How many input sets of ``set_bytes`` a graph has to rotate through, to find L2 cold and to take long enough."""
    if device.type != "cuda":
        return _LEAST_SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    long = min(_LONG_SETS, math.ceil(_LONG_BYTES / set_bytes))
    return min(_MOST_SETS, max(_LEAST_SETS, long, math.ceil(_COLD_FACTOR * cache / set_bytes)))


def time_launches(
    launches: Sequence[Launch],
    restore: Launch,
    device: torch.device,
    samples: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """``samples`` times the microseconds of one of ``launches``, run one after the other.

    Each launch should have inputs of its own. ``restore`` undoes what they mutate; it stays out of the time. On CUDA
    they are one captured graph, and other things are read before each replay, so that L2 is cold.
    """
    if device.type != "cuda":
        return [_wall_clock(launches, restore, clock) for _ in range(samples)]
    with torch.cuda.device(device):
        return _replays(launches, restore, device, samples)


def _wall_clock(launches: Sequence[Launch], restore: Launch, clock: Callable[[], float]) -> float:
    restore()
    begin = clock()
    for launch in launches:
        launch()
    return (clock() - begin) * 1e6 / len(launches)


def _replays(launches: Sequence[Launch], restore: Launch, device: torch.device, samples: int) -> list[float]:
    def run() -> list[Any]:
        return [launch() for launch in launches]

    flush = torch.zeros(
        _COLD_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device
    )
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            restore()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept_alive = run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples + 1)]
    for begin, end in events:
        restore()
        flush.max()  # read, not written: what is dirty would have to go back to memory within the time
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept_alive
    # The first replay uploads the graph.
    return [begin.elapsed_time(end) * 1e3 / len(launches) for begin, end in events[1:]]
