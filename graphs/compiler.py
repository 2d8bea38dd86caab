"""The compiler around a step: a backend that counts, and code objects that are not shared."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

from fastdms.graphs.buffers import StepBuffers
from fastdms.graphs.pieces import compile_pieces

__all__ = ["CountingBackend", "Step", "StepOutput", "compile_step"]

StepOutput = tuple[torch.Tensor, torch.Tensor]  # sampled tokens [B] int64, logits [B, V] fp32
Step = Callable[[StepBuffers], StepOutput]

_names = itertools.count()


class CountingBackend:
    """A compiler backend by name that counts each time it is entered, so also when a guard fails while serving."""

    def __init__(self, name: str) -> None:
        self.compiles = 0
        self._compile = torch._inductor.compile if name == "inductor" else torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiles += 1
        return compile_pieces(graph, inputs, self._compile)


def compile_step(step: Step, backend: CountingBackend) -> Step:
    """``step`` as one graph, for the shapes that it is first called with; equal layers in it are compiled once."""
    compiled: Step = torch.compile(_own_code(step), backend=backend, fullgraph=True, dynamic=False)
    return compiled


def _own_code(step: Step) -> Step:
    """``step`` with a code object of its own: the compiler's cache and its limit hang on the code object, so that
    buckets and models that share one would evict each other and outlive their owners."""

    def decode_step(inputs: StepBuffers) -> StepOutput:
        return step(inputs)

    code = decode_step.__code__.replace(co_name=f"decode_step_{next(_names)}")
    return types.FunctionType(code, decode_step.__globals__, code.co_name, None, decode_step.__closure__)
