"""The compiler around a step: traced once for all batch sizes, compiled for each, and counted."""

from __future__ import annotations

import itertools
import time
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx.experimental import _config as symbolic_shapes

from fastdms.graphs.buffers import StepBuffers
from fastdms.graphs.pieces import Compiled, compile_pieces
from fastdms.graphs.specialise import specialise

__all__ = ["CountingBackend", "Step", "StepOutput", "compile_step", "mark_batch", "tracing"]

StepOutput = tuple[torch.Tensor, torch.Tensor]  # sampled tokens [B] int64, logits [B, V] fp32
Step = Callable[[StepBuffers], StepOutput]

_names = itertools.count()


class CountingBackend:
    """A compiler backend by name. What is traced it compiles for each batch size that comes, without any symbol.

    compiles: also those that a failed guard brings about while serving. compile_seconds: of them all. compile_began:
    when the last of them did, by ``perf_counter``; what was traced for it was traced before.
    """

    def __init__(self, name: str) -> None:
        self.compiles = 0
        self.compile_seconds = self.compile_began = 0.0
        self._compile = torch._inductor.compile if name == "inductor" else torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Compiled:
        compiled: dict[tuple[int, ...], Compiled] = {}

        def run(*arguments: Any) -> Any:
            sizes = tuple(argument for argument in arguments if isinstance(argument, int))
            if sizes not in compiled:
                self.compiles += 1
                self.compile_began = time.perf_counter()
                # Dynamo lets go of its lock before it runs what it traced, and compilers count on that lock.
                with torch._dynamo.convert_frame.compile_lock, tracing(any_size=False):
                    compiled[sizes] = compile_pieces(*specialise(graph, arguments), self._compile)
                self.compile_seconds += time.perf_counter() - self.compile_began
            return compiled[sizes](*(argument for argument in arguments if not isinstance(argument, int)))

        return run


def compile_step(step: Step, backend: CountingBackend) -> Step:
    """``step`` as one graph, for buffers that are ``mark_batch``ed; equal layers in it are compiled once for each size.

    It is traced once for all sizes, or, where its code takes one path for some and another for others, once for each.
    """
    own = _own_code(step)
    compiled: Step = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    # What the compiler keeps for a code object holds that in turn, where the garbage collector doesn't look.
    forget = weakref.finalize(compiled, torch._dynamo.reset_code, own.__code__)  # type: ignore[attr-defined]
    forget.atexit = False
    return compiled


def mark_batch(inputs: StepBuffers) -> None:
    """Have the batch size of these buffers traced as a symbol. A single row needs no mark to run what was traced."""
    if inputs.tokens.shape[0] > 1:
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)


def tracing(*, any_size: bool) -> AbstractContextManager[None]:
    """Whether what is traced inside for several rows holds for one as well."""
    patch: AbstractContextManager[None] = symbolic_shapes.patch(backed_size_oblivious=any_size)  # type: ignore[attr-defined]
    return patch


def _own_code(step: Step) -> Step:
    """``step`` with a code object of its own: the compiler's cache and its limit hang on the code object, so that
    models that share one would evict each other and outlive their owners."""

    def decode_step(inputs: StepBuffers) -> StepOutput:
        return step(inputs)

    code = decode_step.__code__.replace(co_name=f"decode_step_{next(_names)}")
    return types.FunctionType(code, decode_step.__globals__, code.co_name, None, decode_step.__closure__)
