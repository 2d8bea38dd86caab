"""Causal attention of a chunk by the loop that prefill_attention has on Hopper."""

from __future__ import annotations

import torch

from fastdms.ops.chunk import positive_scale
from fastdms.ops.triton_common import LOG2_E


def gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, sm_scale: float) -> torch.Tensor:
    """q ``[T, Hq, 64]``, k and v ``[start + T, Hkv, 64]``, all fp16 or all bf16."""
    from fastdms.ops.prefill_attention.hopper_block_kernel import is_matrix  # Gluon only where it is used
    from fastdms.ops.prefill_attention.specialised_kernel import attend_densely

    q, sm_scale = positive_scale(q, sm_scale)
    q, k, v = (x if is_matrix(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend_densely(q, k, v, start, out, sm_scale * LOG2_E)
    return out
