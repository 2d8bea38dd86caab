"""Runs a public op twice: by its kernel on guarded copies of the inputs, and by its reference in three precisions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import fastdms.ops as ops
from fastdms.ops import SpanCache
from fastdms.tools.fuzz.budget import WrongAnswer, in_precision

__all__ = ["OPS", "Call", "Evaluated", "Placed", "evaluate", "guarded", "kernels", "same_bytes", "views"]

OPS = (
    "decode_append", "decode_attention", "decode_linear", "dense_attention", "dequantise", "prefill_append",
    "prefill_attention", "prefill_rope", "release", "sample", "soft_attention",
)  # fmt: skip
GUARD = 64  # elements on either side of a buffer, which also keeps it aligned
GUARD_BYTE = 0xFF  # NaN in every floating dtype, -1 in the others: a far out index, and no padding


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(buffer, view)``: a contiguous view of ``shape`` with guard elements around it, all bytes set."""
    size = torch.Size(shape).numel()
    buffer = torch.zeros(size + 2 * GUARD, dtype=dtype, device=device)
    buffer.view(torch.uint8).fill_(GUARD_BYTE if dtype != torch.bool else 1)
    inside = buffer[GUARD : GUARD + size]
    return buffer, inside.view(shape) if size else inside.new_empty(shape)  # a view of nothing has strange strides


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one shape hold the same bits."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Placed:
    """A copy of ``x`` on ``device`` in a guarded buffer; ``gaps[i]`` unused elements follow its dimension i's end."""

    def __init__(self, x: torch.Tensor, device: torch.device, gaps: tuple[int, ...] = ()) -> None:
        gaps = gaps or (0,) * x.dim()
        padded = tuple(n + gap for n, gap in zip(x.shape, gaps, strict=True))
        self._buffer, whole = guarded(padded, x.dtype, device)
        self.view = whole[tuple(slice(n) for n in x.shape)]
        self.view.copy_(x)
        self._before = self._buffer.clone()

    @property
    def changed(self) -> bool:
        """Whether anything wrote to the buffer since."""
        return not same_bytes(self._buffer, self._before)


def views(placed: Mapping[str, Placed | None]) -> dict[str, torch.Tensor | None]:
    """The tensors to hand to an op."""
    return {name: None if x is None else x.view for name, x in placed.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a public op.

    inputs: tensors on the CPU (or None) by argument name. options: the other arguments. gaps: unused elements per
    dimension of an input, by name. mutated: inputs that the op writes to.
    """

    op: str
    inputs: Mapping[str, torch.Tensor | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    gaps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mutated: tuple[str, ...] = ()

    def place(self, device: torch.device) -> dict[str, Placed | None]:
        """Guarded copies of the inputs on ``device``."""
        return {
            name: None if x is None else Placed(x, device, self.gaps.get(name, ())) for name, x in self.inputs.items()
        }

    def run(
        self, inputs: Mapping[str, torch.Tensor | None], cache: SpanCache | None, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Call the public function; ``options`` replace those of the call."""
        state = {} if cache is None else {"cache": cache}
        out = getattr(ops, self.op)(**inputs, **state, **{**self.options, **options})
        return () if out is None else out if isinstance(out, tuple) else (out,)

    def run_kernel(
        self, device: torch.device, cache: SpanCache | None = None
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """``(outputs, mutated inputs)`` of the kernel, on the CPU; WrongAnswer if it wrote to another input."""
        placed = self.place(device)
        with kernels(device, self.op):
            out = self.run(views(placed), cache)
        for name, x in placed.items():
            if x is not None and name not in self.mutated and x.changed:
                raise WrongAnswer(self.op, f"{name} is an input, and was written to")
        mutated = {name: x.view.cpu() for name, x in placed.items() if x is not None and name in self.mutated}
        return tuple(x.cpu() for x in out), mutated


@contextmanager
def kernels(device: torch.device, op: str) -> Iterator[None]:
    """Inside, ``op`` runs by its kernel, in Triton's interpreter where there is no GPU, and torch.empty returns NaN.

    The registry looks its reference up at each call, so a kernel launcher in its place is all the interpreter needs.
    """
    swapped = []
    if device.type == "cpu":
        pairs = [("kernel", op)]
        if op == "soft_attention":
            pairs.append(("backward_kernel", "soft_attention_backward"))
        reference = importlib.import_module(f"fastdms.ops.{op}.reference")
        for module, name in pairs:
            kernel = getattr(importlib.import_module(f"fastdms.ops.{op}.{module}"), name)
            swapped.append((reference, name, getattr(reference, name)))
            setattr(reference, name, kernel)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what fills torch.empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for owner, name, original in swapped:
            setattr(owner, name, original)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """outputs: the reference's, as the CPU runs it. truth: in fp64. plain: in the precision asked for."""

    outputs: tuple[torch.Tensor, ...]
    truth: tuple[torch.Tensor, ...]
    plain: tuple[torch.Tensor, ...]


def evaluate(call: Call, cache: SpanCache | None, precision: torch.dtype = torch.float32) -> Evaluated:
    """Run the reference on the call's CPU inputs, which it may mutate, as it may ``cache``.

    precision: fp32 is what the reference computes in; a 16-bit dtype gives ``plain`` all its roundings.
    """
    module = importlib.import_module(f"fastdms.ops.{call.op}.reference")
    original = getattr(module, call.op)
    seen: list[list[Any]] = []

    def recorded(*args: Any) -> Any:
        seen.append([x.clone() if isinstance(x, torch.Tensor) else x for x in args])
        return original(*args)

    setattr(module, call.op, recorded)
    try:
        outputs = call.run(call.inputs, cache)
    finally:
        setattr(module, call.op, original)
    if not outputs:
        return Evaluated(outputs=(), truth=(), plain=())
    names = [argument.name for argument in getattr(torch.ops.fastdms, call.op).default._schema.arguments]
    truth = in_precision(original, names, seen[0], torch.float64)
    plain = outputs if precision == torch.float32 else in_precision(original, names, seen[0], precision)
    return Evaluated(outputs=outputs, truth=truth, plain=plain)
