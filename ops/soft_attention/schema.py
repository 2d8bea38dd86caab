"""``fastdms::soft_attention`` and its backward: schemas, fakes and autograd. Imports torch only."""

from __future__ import annotations

from typing import Any

import torch

from fastdms.ops.registry import LIBRARY, register

SCHEMA = (
    "soft_attention(Tensor q, Tensor k, Tensor v, Tensor log_keep, int window_tokens, float sm_scale) "
    "-> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "soft_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor log_keep, Tensor out, Tensor lse, "
    "int window_tokens, float sm_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_keep)"
)


def empty_token_major(x: torch.Tensor) -> torch.Tensor:
    """Like ``x [B, H, T, D]`` in shape and dtype, laid out as ``[B, T, H, D]``."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _fake(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor, *_: object
) -> tuple[torch.Tensor, ...]:
    return (*map(empty_token_major, (q, k, v)), log_keep.new_empty(log_keep.shape))


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.soft_attention.reference:soft_attention",
    kernel="fastdms.ops.soft_attention.kernel:soft_attention",
)
register(
    BACKWARD_SCHEMA,
    fake=_fake_backward,
    reference="fastdms.ops.soft_attention.reference:soft_attention_backward",
    kernel="fastdms.ops.soft_attention.backward_kernel:soft_attention_backward",
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.window_tokens, ctx.sm_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.fastdms.soft_attention_backward.default(
        grad_out, *ctx.saved_tensors, ctx.window_tokens, ctx.sm_scale
    )
    return (*grads, None, None)


torch.library.register_autograd("fastdms::soft_attention", _backward, setup_context=_save, lib=LIBRARY)
