"""Causal attention of a chunk by the loop that prefill_attention has on Hopper."""

from __future__ import annotations

import torch

from fastdms.ops.triton_common import LOG2_E


def gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, sm_scale: float) -> torch.Tensor:
    """q ``[T, Hq, 64]``, k and v ``[start + T, Hkv, 64]``, all fp16 or all bf16, contiguous but for q."""
    from fastdms.ops.prefill_attention import specialised_kernel  # Gluon only where it is used

    if abs(sm_scale) < torch.finfo(torch.float32).tiny:  # the kernel masks and takes maxima before it scales
        q, sm_scale = torch.zeros_like(q), 1.0
    elif sm_scale < 0:
        q, sm_scale = -q, -sm_scale
    if not specialised_kernel.is_supported(q, k):
        q = q.contiguous()
    out = q.new_empty(q.shape)
    specialised_kernel.attend_densely(q, k, v, start, out, sm_scale * LOG2_E)
    return out
