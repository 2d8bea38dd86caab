"""prefill_attention's kernels for Hopper, on a card or emulated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastdms.ops.prefill_attention import consumer_kernel, hopper_block_kernel, hopper_kernel, specialised_kernel
from fastdms.ops.triton_common import on_hopper
from tests.ops.gluon_emulator import emulate
from tests.ops.harness import CPU, DEVICE

__all__ = ["emulated"]


def _assembly() -> dict[str, Callable[..., Any]]:
    return {
        consumer_kernel.KEEP.value: lambda x, low, high: torch.where(low <= high, x, -torch.inf),
        consumer_kernel.CUT.value: lambda x, at, limit: torch.where(at < limit, x, torch.zeros_like(x)),
        consumer_kernel.RESCALE.value: lambda x, by: x * by, consumer_kernel.LEAVE.value: lambda: None,
    }  # fmt: skip


@contextmanager
def emulated() -> Iterator[pytest.MonkeyPatch]:
    """Those kernels on a Hopper card or emulated."""
    if DEVICE != CPU and not on_hopper(DEVICE):
        pytest.skip("needs a Hopper card")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == CPU:
            kernel = importlib.import_module("fastdms.ops.prefill_attention.kernel")
            patch.setattr(kernel, "on_hopper", lambda _: True)
            emulate(patch, hopper_kernel, "_attend_hopper_kernel", {}, hopper_block_kernel)
            helpers = (consumer_kernel, hopper_block_kernel)
            emulate(patch, specialised_kernel, "_specialised_kernel", _assembly(), *helpers)
        yield patch
