"""The graph cache: one compiled, and on CUDA captured, decode step per bucket, all made before the first request."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdms.graphs.bucket import choose_bucket
from fastdms.graphs.buffers import RowInput, StepBuffers, make_buffers
from fastdms.graphs.capture import capture

__all__ = ["MODES", "GraphCache", "Step", "StepOutput", "check_mode"]

MODES = ("graphs", "compile", "eager")
StepOutput = tuple[torch.Tensor, torch.Tensor]  # sampled tokens [B] int64, logits [B, V] fp32
Step = Callable[[StepBuffers], StepOutput]

_WARM_UP_RUNS = 2  # the first compiles and specialises, the second shows that nothing is left to do
_names = itertools.count()


@dataclass(slots=True)
class _Entry:
    inputs: StepBuffers
    run: Callable[[], StepOutput]
    runs: int = 0
    padded_rows: int = 0


class _Inductor:
    """The compiler's backend; counts each time it is entered, so also when a guard fails while serving."""

    def __init__(self) -> None:
        self.compiles = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiles += 1
        compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs)
        return compiled


def check_mode(mode: str, device: torch.device) -> None:
    """ValueError unless ``mode`` is one of ``MODES`` that runs on ``device``."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError(f"mode 'graphs' needs a CUDA device, got {device}; use 'compile' or 'eager'")


class GraphCache:
    """Runs decode steps of any batch size up to the largest bucket.

    step: the whole decode step over static buffers; padding entries (position -1) touch no state.
    mode: ``"eager"`` calls it, ``"compile"`` compiles it with ``fullgraph=True`` for each bucket, ``"graphs"`` captures
        that into one CUDA graph per bucket, which a step then replays.
    """

    def __init__(self, step: Step, *, mode: str, buckets: Sequence[int], device: torch.device) -> None:
        check_mode(mode, device)
        self._step, self._mode, self._buckets = step, mode, tuple(buckets)
        self._buffers = make_buffers(self._buckets[-1], device)
        self._entries: dict[int, _Entry] = {}
        self._backend = _Inductor()  # the compiler never forgets it, so it holds nothing of this object
        self._captures = 0

    def warm_up(self) -> None:
        """Make every bucket's entry, largest first, so that the smaller graphs find room in its pool."""
        pool = torch.cuda.graph_pool_handle() if self._mode == "graphs" else None
        self._buffers.fill([])
        for bucket in reversed(self._buckets):
            self._entries[bucket] = self._make_entry(bucket, pool)

    def run(self, inputs: Sequence[RowInput]) -> StepOutput:
        """One step for ``inputs``: tokens ``[n]`` int64 and logits ``[n, V]`` fp32, valid until the next run."""
        entry = self._entries[choose_bucket(len(inputs), self._buckets)]
        entry.inputs.fill(inputs)
        tokens, logits = entry.run()
        entry.runs += 1
        entry.padded_rows += tokens.shape[0] - len(inputs)
        return tokens[: len(inputs)], logits[: len(inputs)]

    def stats(self) -> dict[str, Any]:
        """Counts so far: real compiles and captures in all; runs and padded rows by bucket."""
        return {
            "mode": self._mode,
            "buckets": self._buckets,
            "compiles": self._backend.compiles,
            "captures": self._captures,
            "runs": {bucket: entry.runs for bucket, entry in sorted(self._entries.items())},
            "padded_rows": {bucket: entry.padded_rows for bucket, entry in sorted(self._entries.items())},
        }

    def close(self) -> None:
        """Drop all graphs, compiled code and the step itself."""
        self._entries.clear()
        self._step = _closed

    def _make_entry(self, bucket: int, pool: Any) -> _Entry:
        inputs = self._buffers.first(bucket)
        if self._mode == "eager":
            return _Entry(inputs, lambda: self._step(inputs))
        compiled = torch.compile(_own_code(self._step), backend=self._backend, fullgraph=True, dynamic=False)
        if self._mode == "compile":
            compiled(inputs)
            return _Entry(inputs, lambda: compiled(inputs))
        stream = _warm_up_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                compiled(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph, outputs = capture(lambda: compiled(inputs), pool)
        self._captures += 1

        def replay() -> StepOutput:
            graph.replay()
            return outputs  # type: ignore[no-any-return]

        return _Entry(inputs, replay)


def _closed(inputs: StepBuffers) -> StepOutput:
    raise ValueError("this graph cache is closed")


@functools.cache
def _warm_up_stream(device_index: int) -> torch.cuda.Stream:
    """One for all models of a device: cuBLAS keeps a workspace for each stream that it ever ran on."""
    return torch.cuda.Stream(device_index)


def _own_code(step: Step) -> Step:
    """``step`` with a code object of its own: the compiler's cache and its limit hang on the code object, so that
    buckets and models that share one would evict each other and outlive their owners."""

    def decode_step(inputs: StepBuffers) -> StepOutput:
        return step(inputs)

    code = decode_step.__code__.replace(co_name=f"decode_step_{next(_names)}")
    return types.FunctionType(code, decode_step.__globals__, code.co_name, None, decode_step.__closure__)
