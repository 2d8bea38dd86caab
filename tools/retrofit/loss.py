"""What is minimised: the distance from the teacher, and a one-sided pull towards the compression asked for."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["compression_shortfall", "distillation_kl"]

# Logits of a chunk of tokens live at a time: 2,048 tokens of a 128k vocabulary take 1 GiB in fp32.
_CHUNK_TOKENS = 2048


def compression_shortfall(flagged_share: torch.Tensor, compression: float) -> torch.Tensor:
    """``max(alpha* - mean(alpha), 0)`` with ``alpha* = 1 - 1 / compression`` (arXiv 2506.05345, section 3).

    flagged_share: mean of the soft decisions over layers, heads and tokens, a scalar.
    """
    return (1.0 - 1.0 / compression - flagged_share).clamp_min(0.0)


def distillation_kl(
    student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Mean over tokens of ``KL(teacher || student)`` of the next-token distributions, nats, fp32.

    student, teacher: ``[N, hidden]``, what goes into the output heads ``[V, hidden]``. Differentiable in ``student``
    and ``student_head``. Logits are made, used and dropped a chunk of tokens at a time.
    """
    return _DistillationKL.apply(student, teacher, student_head, teacher_head)  # type: ignore[no-any-return]


class _DistillationKL(torch.autograd.Function):
    """Forward makes the gradient too: of the mean KL by the student's logits it is ``(p_student - p_teacher) / N``."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor
    ) -> torch.Tensor:
        tokens = student.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        grad = torch.empty_like(student)
        grad_head = torch.zeros_like(student_head) if ctx.needs_input_grad[2] else None
        for first in range(0, tokens, _CHUNK_TOKENS):
            part = slice(first, first + _CHUNK_TOKENS)
            target = _logits(teacher[part], teacher_head).log_softmax(-1)
            own = _logits(student[part], student_head).log_softmax(-1)
            probability = target.exp()
            total += (probability * (target - own)).sum()
            # Divided by N only after the products: in 16 bits most of these would vanish.
            by_logits = (own.exp_() - probability).to(student_head.dtype)
            grad[part] = (by_logits @ student_head).div_(tokens)
            if grad_head is not None:
                grad_head += (by_logits.T @ student[part].to(by_logits.dtype)).div_(tokens)
        ctx.save_for_backward(grad, *(() if grad_head is None else (grad_head,)))
        return total / tokens

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, *grad_head = ctx.saved_tensors
        by_head = grad_head[0] * upstream if grad_head else None
        return grad * upstream, None, by_head, None


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """fp32 logits: from bf16 operands without rounding the sums to bf16."""
    hidden = hidden.to(head.dtype)
    if head.is_cuda and head.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()
