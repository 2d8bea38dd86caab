"""int4 weights as compressed-tensors packs them ("pack-quantized"): eight in an int32, each group with a scale.

Word ``w`` of a row holds the weights ``8 w`` to ``8 w + 7``, the first in its lowest bits, each as ``q + 8``. A weight
is ``q * scale``, with ``q`` from -8 to 7 and the scale of its group: so many weights of a row, one after another.
"""

from __future__ import annotations

import torch

from fastdms.ops.span_cache import check

__all__ = ["GROUPS", "INT4", "PER_WORD", "check_int4_scale", "dequantise_int4", "pack_int4", "quantise_int4"]

INT4 = torch.int32  # the dtype of what is packed, which also stands for int4 where a dtype says how weights are stored
GROUPS = (128, 64, 32)
PER_WORD = 8
_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = -8.0


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """int32 ``[N, K / 8]`` of whole numbers ``[N, K]`` from -8 to 7, of any dtype."""
    nibbles = (q + 8).to(torch.int32).unflatten(-1, (-1, PER_WORD))
    shifts = torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=q.device)
    packed: torch.Tensor = (nibbles << shifts).sum(-1, dtype=torch.int32)  # they share no bit
    return packed


def dequantise_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[N, K]`` of packed ``[N, K / 8]`` and scale ``[N, K / group]``, multiplied in fp32 and rounded once."""
    pairs = packed.view(torch.uint8)
    q = torch.stack((pairs & 15, pairs >> 4), -1).view(torch.int8) - 8  # [N, K / 2, 2]
    groups = q.view(*scale.shape, -1).to(torch.promote_types(dtype, scale.dtype))
    weight: torch.Tensor = (groups * scale[..., None]).to(dtype).flatten(1)
    return weight


def check_int4_scale(scale: torch.Tensor, rows: int, columns: int) -> None:
    """Raise ValueError unless ``scale`` goes with as many int4 weights."""
    shapes = [(rows, columns // group) for group in GROUPS if columns % group == 0]
    check(bool(shapes), f"int4 weights come in groups of 128, 64 or 32 of a row, and a row has {columns}")
    check(
        scale.dtype in _SCALES and scale.shape in shapes and scale.is_contiguous(),
        f"scale of int4 weights must be contiguous fp32, fp16 or bf16 of one of the shapes {shapes} (groups of "
        f"128, 64 or 32), got {scale.dtype} {tuple(scale.shape)}",
    )


def quantise_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed ``[N, K / 8]`` and scale ``[N, K / group]`` bf16 of a finite weight ``[N, K]``, rounded to nearest.

    A group's scale is its largest weight / -8, with its sign (as in llama.cpp's Q4_0), so that this weight is nearly
    exact and all others are within range; it is negative where that weight is positive. Zeros stay zeros.
    """
    exact = weight.float().unflatten(-1, (-1, group))
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    # A tensor to divide by, since CUDA multiplies by the inverse of a number: the same weights on every device.
    scale = (largest / largest.new_tensor(_LARGEST)).to(torch.bfloat16)
    q = torch.where(scale == 0, 0.0, exact / scale.float()).round_().clamp_(-8, 7)
    return pack_int4(q.flatten(-2)), scale.squeeze(-1)
