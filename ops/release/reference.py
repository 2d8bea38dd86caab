"""The definition of release in plain PyTorch."""

from __future__ import annotations

import torch


def release(
    rows: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    starved: torch.Tensor,
    page_size: int,
) -> None:
    row = rows[rows >= 0].long()
    held = -(-live_len[:, row] // page_size)  # [L, n, Hkv]
    index = torch.arange(page_table.shape[-1], device=rows.device)
    pages = page_table[:, row][index < held[..., None]]
    free = int(num_free)
    free_pages[free : free + pages.numel()] = pages
    num_free += pages.numel()
    live_len[:, row] = 0
    starved[row] = 0
