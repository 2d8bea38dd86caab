"""The distillation loss against autograd through the whole logits, and the one-sided pull."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdms.tools.retrofit import loss
from fastdms.tools.retrofit.loss import compression_shortfall, distillation_kl


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_kl_and_gradients_are_those_of_the_definition(monkeypatch, tokens, head_trains) -> None:
    monkeypatch.setattr(loss, "_CHUNK_TOKENS", 4)
    student = torch.randn(tokens, 6, requires_grad=True)
    head = torch.randn(11, 6, requires_grad=head_trains)
    teacher, teacher_head = torch.randn(tokens, 6), torch.randn(11, 6)
    own = distillation_kl(student, teacher, head, teacher_head)
    wanted = [student, head] if head_trains else [student]
    grads = torch.autograd.grad(3.0 * own, wanted)
    own_logprobs, target = (student @ head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1)
    oracle = F.kl_div(own_logprobs, target, reduction="batchmean", log_target=True)
    torch.testing.assert_close(own, oracle)
    for grad, expected in zip(grads, torch.autograd.grad(3.0 * oracle, wanted), strict=True):
        torch.testing.assert_close(grad, expected)


def test_gradients_survive_16_bits() -> None:
    """Of many tokens with small differences: each one's share of the mean is below what fp16 can hold."""
    student, head = torch.randn(4096, 32), torch.randn(512, 32)
    teacher = student + 0.01 * torch.randn(4096, 32)
    exact, rounded = student.clone().requires_grad_(), student.half().requires_grad_()
    distillation_kl(exact, teacher, head, head).backward()
    distillation_kl(rounded, teacher, head.half(), head).backward()
    assert exact.grad is not None
    assert rounded.grad is not None
    cosine = F.cosine_similarity(rounded.grad.double().flatten(), exact.grad.double().flatten(), dim=0)
    assert cosine > 0.9


def test_kl_of_a_model_with_itself_is_zero() -> None:
    hidden, head = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6)
    own = distillation_kl(hidden, hidden.detach(), head, head)
    own.backward()
    assert own.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_shortfall_is_one_sided() -> None:
    share = torch.tensor(0.6, requires_grad=True)
    short = compression_shortfall(share, 4.0)
    assert short.item() == pytest.approx(0.15)
    short.backward()
    assert share.grad == -1.0
    assert compression_shortfall(torch.tensor(0.8), 4.0) == 0.0
    assert compression_shortfall(torch.tensor(0.0), 1.0) == 0.0
