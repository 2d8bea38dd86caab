"""Which kernel attends densely: other libraries' where they are faster, the project's own for all else."""

from __future__ import annotations

import functools
import importlib

import torch

from fastdms.ops.chunk import has_specialised_warps

__all__ = ["FLASH_ATTN_MODULES", "choose_kernel", "dense_kernel", "installed_kernels"]

FLASH_ATTN_MODULES = {"flash_attn_3": "flash_attn_interface", "flash_attn_2": "flash_attn"}
_LEAST_CUDNN = 91501  # what torch asks for too: older ones are wrong for some lengths


def choose_kernel(
    dtype: torch.dtype, head_dim: int, group: int, capability: tuple[int, int], installed: frozenset[str]
) -> str:
    """The fastest of ``installed`` that takes the heads, else ``"triton"``; capability: of the CUDA device.

    flash_attn_3 is Hopper's, and so is "gluon", the loop of prefill_attention, for some heads; on Hopper and Blackwell
    cudnn leads flash_attn_2 and torch_flash, which are one algorithm.
    """
    half = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0
    takes = {
        "flash_attn_3": half and head_dim <= 256 and capability[0] == 9,
        "gluon": has_specialised_warps(dtype, head_dim, group) and capability[0] == 9,
        "cudnn": half and 64 <= head_dim <= 128 and capability[0] in (9, 10),
        "flash_attn_2": half and head_dim <= 256 and capability[0] >= 8,
        "torch_flash": half and head_dim <= 256 and capability[0] >= 8,
    }
    return next((name for name, able in takes.items() if able and name in installed), "triton")


def dense_kernel(dtype: torch.dtype, head_dim: int, group: int, device: torch.device) -> str:
    """The kernel that dense_attention runs by on ``device``: a name of ``choose_kernel``, or ``"reference"``."""
    if device.type != "cuda":
        return "reference"
    return choose_kernel(dtype, head_dim, group, torch.cuda.get_device_capability(device), installed_kernels())


@functools.cache
def installed_kernels() -> frozenset[str]:
    """Kernels besides the plainest that this process can call on a CUDA device."""
    found = {"gluon"}
    if torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN:
        found.add("cudnn")
    if torch.backends.cuda.is_flash_attention_available():
        found.add("torch_flash")
    for name, module in FLASH_ATTN_MODULES.items():
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, AttributeError):  # absent, or built for another torch
            continue
        if callable(function):
            found.add(name)
    return frozenset(found)
