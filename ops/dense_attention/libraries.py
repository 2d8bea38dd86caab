"""Causal attention of a chunk by other libraries' kernels: flash-attn's, and those of cuDNN and flash in torch.

q ``[T, Hq, D]``, k and v ``[N, Hkv, D]`` with N >= T, all fp16 or all bf16: query i sees the keys up to N - T + i.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from fastdms.ops.dense_attention.merge_kernel import merge

_aten = torch.ops.aten
_BLOCK = 128


def flash_attn(module: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """``flash_attn_func`` of ``module``, whose causal mask ends at the last query and key."""
    function: Any = importlib.import_module(module).flash_attn_func
    out = function(*(_aligned(x)[None] for x in (q, k, v)), softmax_scale=sm_scale, causal=True)
    out = out[0] if isinstance(out, tuple) else out  # flash-attn 3 returned the log-sum-exp too, at first
    result: torch.Tensor = out[0]
    return result


def torch_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """torch's copy of flash-attn 2; its operator, unlike SDPA, lets the mask end at the last query and key."""
    out = _aten._scaled_dot_product_flash_attention(*map(_heads_first, (q, k, v)), 0.0, True, scale=sm_scale)[0]
    return _tokens_first(out)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, sm_scale: float) -> torch.Tensor:
    """cuDNN, whose causal mask begins at the first query and key: a later chunk takes two calls, which are merged.

    cuDNN plans anew for every shape, which takes many times as long as it runs. So the chunk is padded to one of few
    lengths, and a chunk that begins anywhere goes by torch_flash: there is no end of such beginnings.
    """
    if start % _BLOCK:
        return torch_flash(q, k, v, sm_scale)
    tokens = q.shape[0]
    spare = padded_tokens(tokens) - tokens
    # A padded key comes after every query that counts.
    query, key, value = (F.pad(x, (0, 0, 0, 0, 0, spare)) if spare else x for x in (q, k[start:], v[start:]))
    out, lse = cudnn_part(query, key, value, sm_scale, causal=True, with_lse=start > 0)
    if start:
        out = merge(out, lse, *cudnn_part(query, k[:start], v[:start], sm_scale, causal=False, with_lse=True))
    return out[:tokens]


def padded_tokens(tokens: int) -> int:
    """``tokens`` rounded up: to a multiple of 128, and of an eighth of the next power of two."""
    step = max(_BLOCK, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


def cudnn_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, *, causal: bool, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[T, Hq, D]`` and, if asked for, the natural log-sum-exp of the scores, ``[Hq, T]`` fp32."""
    heads = map(_heads_first, (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*heads, None, with_lse, 0.0, causal, scale=sm_scale)
    return _tokens_first(out), lse[0, :, :, 0].contiguous() if with_lse else lse


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return _aligned(x)[None].transpose(1, 2)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)[0].contiguous()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """These kernels read 16 bytes at once."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
