"""Makes memory that nobody has written recognisable, so that a result which was never computed can't pass a test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Far outside any index range; what a signed integer buffer holds before it is written.
POISON_INT = -1_234_567_890
POISON_BYTE = 0xFF  # NaN in every fp8 format that has NaN with all bits set (e4m3fn, e5m2, e8m0)


def poisoned_empty(patch: pytest.MonkeyPatch) -> None:
    """Replace ``torch.empty`` and its relatives by versions that fill what they return with ``poison``.

    Traced code is left alone: while compiling, and for fake and other wrapped tensors, the originals run unchanged.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        patch.setattr(owner, name, _poisoning(getattr(owner, name)))


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill in place: NaN for floating dtypes, ``POISON_INT`` for int32 and int64, set bits for bytes and bool."""
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(POISON_INT)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(POISON_BYTE)
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(torch.nan)
    return tensor


def _poisoning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.device.type == "meta":
            return tensor
        with torch.no_grad():
            return poison(tensor)

    return empty
