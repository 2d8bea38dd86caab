"""What is drawn: the setting that a round of histories shares, and the numbers that ops are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastdms.ops.rope_decide import ZERO_MODES

__all__ = ["Setting", "draw_setting", "numbers", "pick", "rope_tables"]

Generator = np.random.Generator

_INTERPRETED = (
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32),
    (torch.float32, torch.float16),
)  # fmt: skip
_COMPILED = (
    *_INTERPRETED,
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn), (torch.float16, torch.float8_e4m3fn),
    (torch.float32, torch.float8_e4m3fn), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
)  # fmt: skip
_FAR_ROUNDS = 0.15  # share of the rounds on CUDA whose pool has more than 2^31 elements
_STATE_ELEMENTS = 2**19  # of all spans of a layer together, so that comparing them takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What kernels are compiled for, and so stays the same for a round of histories.

    max_positions may exceed ``max_pages * page_size``: a span that outgrows its table starves. batch_sizes,
    chunk_tokens: the sizes that calls come in, padding included. gap_heads, gap_channels: unused elements between the
    tokens and between the heads of q, k and v. far_pages: the pool has more than 2^31 elements; its far end is used.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_layers: int
    num_rows: int
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    max_pages: int
    max_positions: int
    window_tokens: int
    shift: int
    zero_borrowed: str
    use_alpha: bool
    use_norms: bool
    batch_sizes: tuple[int, int]
    chunk_tokens: tuple[int, int]
    gap_heads: int
    gap_channels: int
    vocab: int
    far_pages: bool

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group

    @property
    def num_spans(self) -> int:
        """Spans of all layers."""
        return self.num_layers * self.num_rows * self.num_kv_heads


def pick(rng: Generator, *values: int) -> int:
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def _sizes(rng: Generator, *values: int) -> tuple[int, int]:
    return pick(rng, *values), pick(rng, *values)


def draw_setting(rng: Generator, device: torch.device) -> Setting:
    """Sizes that the interpreter runs in milliseconds on the CPU, and hundreds of spans a launch on CUDA."""
    cuda = device.type == "cuda"
    pairs = _COMPILED if cuda else _INTERPRETED
    dtype, kv_dtype = pairs[int(rng.integers(len(pairs)))]
    rows = pick(rng, 1, 16, 64, 128) if cuda else pick(rng, 1, 2, 3, 4)
    heads = pick(rng, 1, 2, 3, 4, 8) if cuda else pick(rng, 1, 2, 3)
    head_dim = pick(rng, 16, 64, 64, 80, 96, 128, 128) if cuda else pick(rng, 2, 6, 16, 16, 20, 32)
    far_pages = bool(cuda and rng.random() < _FAR_ROUNDS)
    page_size = pick(rng, 1, 4, 16, 16, 64, 64) if cuda else pick(rng, 1, 2, 4, 4, 16)
    page_size = 64 if far_pages else page_size  # else the free stack alone would be huge
    longest = _STATE_ELEMENTS // (rows * heads * head_dim) if cuda else 200
    positions = min(pick(rng, 24, 80, 300, 700) if cuda else pick(rng, *(12, 30, 48) * 3, 200), max(longest, page_size))
    pages = -(-positions // page_size)
    return Setting(
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_layers=pick(rng, 1, 2),
        num_rows=rows,
        num_kv_heads=heads,
        group=pick(rng, 1, 2, 3, 4, 7, 8) if cuda else pick(rng, 1, 2, 3),
        head_dim=head_dim,
        page_size=page_size,
        max_pages=pages if rng.random() < 0.7 else max(1, pages // pick(rng, 2, 4, 8)),
        max_positions=positions,
        window_tokens=pick(rng, 0, 1, 2, 7, 16, 31, 64) if cuda else pick(rng, 0, 1, 2, 5, 9),
        shift=pick(rng, 0, 1),
        zero_borrowed=ZERO_MODES[int(rng.integers(len(ZERO_MODES)))],
        use_alpha=bool(rng.random() < 0.4),
        use_norms=bool(rng.random() < 0.4),
        batch_sizes=_sizes(rng, 1, rows, rows + 3),
        chunk_tokens=_sizes(rng, 16, 64, 250, 600)
        if cuda
        else _sizes(rng, 1, 4, 9, 14, 150 if positions == 200 else 14),
        gap_heads=pick(rng, 0, 2 * heads, 5),
        gap_channels=pick(rng, 0, 0, 16, 3) if cuda else pick(rng, 0, 3),
        vocab=pick(rng, 17, 500, 5000) if cuda else pick(rng, 2, 17, 50),
        far_pages=far_pages,
    )


def numbers(rng: Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers of one size or another, some with a channel that sticks out and with vectors of zeros."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)  # NumPy's arrays of nothing have strides of 0
    x = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    style = rng.random()
    if style < 0.3:
        x[..., int(rng.integers(shape[-1]))] *= 4
    elif style < 0.5:
        x *= 0.25
    if rng.random() < 0.3 and len(shape) > 1:
        x[torch.from_numpy(rng.random(shape[:-1]) < 0.2)] = 0.0
    return x.to(dtype)


def rope_tables(rng: Generator, positions: int, head_dim: int) -> dict[str, torch.Tensor | None]:
    """cos and sin ``[positions, head_dim / 2]`` of angles drawn at random."""
    angles = torch.from_numpy(rng.random((positions, head_dim // 2)) * 2 * math.pi)
    return {"cos": angles.cos().float(), "sin": angles.sin().float()}
