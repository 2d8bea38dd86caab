"""How keys and values enter and leave pages. The Triton twins are ``quantise`` and loads times the scale."""

from __future__ import annotations

import torch

__all__ = ["FP8_MAX", "load_slots", "quantise", "store_slots"]

FP8_MAX = 448.0  # largest float8_e4m3fn
SMALLEST_SCALE = 2.0**-100  # keeps an all-zero token from dividing by zero; far above bf16's smallest normal


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store form of ``x [..., D]`` fp32: ``(x / scale)`` in ``dtype`` and ``scale [...]`` bf16 (None without scales).

    float8_e4m3fn takes one scale per token and head, max|x| / 448 rounded to bf16, so that an outlier channel costs
    precision smoothly instead of saturating. Values are clamped to +-448 first: the plain cast would make NaN of them.
    """
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype), None
    scale = (x.abs().amax(-1) / FP8_MAX).clamp_min(SMALLEST_SCALE).to(torch.bfloat16)
    scaled = (x / scale.float().unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(dtype), scale


def store_slots(
    x: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor, page: torch.Tensor, slot: torch.Tensor
) -> None:
    """Write ``x [n, D]`` fp32 to slots ``slot [n]`` of pages ``page [n]``, in place."""
    data, scale = quantise(x, pages.dtype)
    if scale is None:
        pages[page, slot] = data
    else:  # indexing does not know fp8, so move its bytes
        pages.view(torch.uint8)[page, slot] = data.view(torch.uint8)
        scales[page, slot] = scale


def load_slots(pages: torch.Tensor, scales: torch.Tensor, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """fp32 values ``[..., D]`` of the slots ``slot [...]`` of pages ``page [...]``."""
    if pages.dtype != torch.float8_e4m3fn:
        return pages[page, slot].float()
    values = pages.view(torch.uint8)[page, slot].view(torch.float8_e4m3fn).float()
    return values * scales[page, slot].float().unsqueeze(-1)
