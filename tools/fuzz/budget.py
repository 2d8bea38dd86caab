"""How far a kernel may be from fp64: twice what the plain reference makes in the same precision, plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["FP32_ROUNDING", "Budget", "WrongAnswer", "dot_dtype", "in_precision", "rounding_band"]

FP32_ROUNDING = 2.0**-24
_FACTOR = 2.0


class WrongAnswer(Exception):
    """An op that computed something else than its reference, wrote where it must not, or took bad input.

    op: its name. difference: the largest difference between numbers, in their own unit; 0 for anything else.
    """

    def __init__(self, op: str, message: str, difference: float = 0.0) -> None:
        super().__init__(message)
        self.op, self.difference = op, difference


def rounding_band(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most that rounding an element of ``x`` to ``dtype`` moves it, fp64: half the distance of its neighbours."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * x.double().abs().clamp_min(info.smallest_normal)


def dot_dtype(compute: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What kernels multiply matrices in, for queries of ``compute`` and pages of ``stored``."""
    return torch.float32 if torch.float32 in (compute, stored) else compute


class _Float(TorchFunctionMode):
    """Makes code that computes in fp32, by ``x.float()`` or ``x.to(torch.float32)``, compute in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].to(self._dtype)
        if func is torch.Tensor.to:
            args = tuple(self._dtype if a is torch.float32 else a for a in args)
        return func(*args, **(kwargs or {}))


def in_precision(
    function: Callable[..., Any], names: Sequence[str], args: Sequence[Any], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """A reference's outputs when all of its inputs and intermediate results are of ``dtype``.

    names, args: as in the op's schema. What is stored in fp8 and its scales stay what they are: they are the input.
    """

    def cast(name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x.clone() if isinstance(x, torch.Tensor) else x
        keep = name in ("k_scales", "v_scales", "scale") or x.dtype.itemsize == 1
        return x.clone() if keep else x.clone().to(dtype)

    cast_args = [cast(name, x) for name, x in zip(names, args, strict=True)]
    with _Float(dtype):
        out = function(*cast_args)
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an output may be off by: ``2 (e + r) + terms * 2**-24 * scale``.

    e: the largest error of the plain reference in the kernel's precision against fp64, r: the largest rounding of a
    result, both over the whole call. The last part is for fp32 sums of ``terms`` numbers as large as ``scale`` in
    another order (N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2); one run of the
    reference bounds them by chance only.
    """

    terms: float
    scale: float

    def check(
        self, op: str, name: str, actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, real: torch.Tensor
    ) -> None:
        """Raise WrongAnswer for the worst case that is over the budget.

        actual, plain, truth: one shape, on the CPU, truth in fp64. real: bool, which cases count; its dimensions are
        the leading ones of the others, that of heads being divided evenly among the KV heads.
        """
        if actual.shape != truth.shape:
            raise WrongAnswer(op, f"{name} has shape {tuple(actual.shape)}, the reference's {tuple(truth.shape)}")
        if not bool(real.any()):
            return
        shape = (*real.shape, -1)
        error, plain_error, band = (
            x.reshape(shape).amax(-1)[real]
            for x in (
                (actual.double() - truth).abs(),
                (plain.double() - truth).abs(),
                rounding_band(truth, actual.dtype),
            )
        )
        allowed = float(_FACTOR * (plain_error.max() + band.max()) + self.terms * FP32_ROUNDING * self.scale)
        bad = ~(error <= allowed)
        if bool(bad.any()):
            worst = int(error.nan_to_num(nan=torch.inf).argmax())
            case = real.nonzero()[worst].tolist()
            raise WrongAnswer(
                op,
                f"{int(bad.sum())} of {bad.numel()} cases: {name} is off by up to {error[worst]:.4g}, "
                f"allowed {allowed:.4g}; worst at {case} of {list(real.shape)}",
                float(error[worst]),
            )
