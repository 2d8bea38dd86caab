"""CUDA backend of dense_attention: the chunk into the history, then the kernel chosen."""

from __future__ import annotations

import torch

from fastdms.ops.dense_attention.choice import FLASH_ATTN_MODULES, dense_kernel
from fastdms.ops.dense_attention.flash_kernel import flash_attention
from fastdms.ops.dense_attention.hopper import gluon
from fastdms.ops.dense_attention.libraries import cudnn, flash_attn, torch_flash


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_history: torch.Tensor,
    v_history: torch.Tensor,
    start: int,
    sm_scale: float,
) -> torch.Tensor:
    tokens, num_heads, head_dim = q.shape
    if tokens == 0:
        return q.new_empty(q.shape)
    end = start + tokens
    k_history[start:end] = k
    v_history[start:end] = v
    group = num_heads // k.shape[1]
    kernel = dense_kernel(q.dtype, head_dim, group, q.device) if q.dtype == k.dtype else "triton"
    keys, values = k_history[:end], v_history[:end]
    if kernel == "gluon":
        return gluon(q, keys, values, start, sm_scale)
    if kernel == "cudnn":
        return cudnn(q, keys, values, start, sm_scale)
    if kernel == "torch_flash":
        return torch_flash(q, keys, values, sm_scale)
    if kernel in FLASH_ATTN_MODULES:
        return flash_attn(FLASH_ATTN_MODULES[kernel], q, keys, values, sm_scale)
    return flash_attention(q, keys, values, start, sm_scale)
