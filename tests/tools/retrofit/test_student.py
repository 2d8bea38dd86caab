"""The student's passes against the written-out definition and the plain model."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from fastdms.config import DMSConfig
from fastdms.tools.retrofit.student import Decisions, Student, add_adapter, clear_borrowed_rows
from tests import oracle
from tests.models import DMS_LAYOUTS, adapter_weights, dms_config, tiny_model, tiny_tokens
from tests.tolerance import assert_logits_close

_FAMILIES = ("llama_group3", "llama_bias", "qwen2", "qwen3")


def _rule(layout, window_tokens=7) -> DMSConfig:
    rule = dms_config(layout, window_tokens)
    assert rule is not None
    return rule


def _student(family, layout):
    model, rule = tiny_model(family), _rule(layout)
    adapter = adapter_weights(model) if layout == "adapter" else None
    expected = oracle.run(model, tiny_tokens(60), rule, adapter)
    plain = oracle.dms_logits(model, tiny_tokens(60), None)
    if adapter is not None:
        add_adapter(model)
        for index, (norm, weight) in adapter.items():
            attention = model.model.layers[index].self_attn
            attention.dms_proj_alpha.weight.data = weight.clone()
            attention.dms_proj_alpha_norm.weight.data = norm.clone()
    return model, Student(model, rule), expected, plain


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("layout", DMS_LAYOUTS)
@torch.no_grad()
def test_hard_decisions_are_the_definition(family, layout) -> None:
    model, student, expected, plain = _student(family, layout)
    ids = torch.tensor([tiny_tokens(60)])
    decisions = Decisions.drawn()
    assert_logits_close(model.lm_head(student.masked(ids, decisions))[0], expected.logits)
    shares = (expected.alpha > 0).float().mean((1, 2))
    assert torch.equal(torch.stack(decisions.hard), shares)
    assert 0.1 < shares.mean() < 0.9
    # The plain model comes out of the same object, before and after.
    assert_logits_close(model.lm_head(student.dense(ids))[0], plain)


@pytest.mark.parametrize("layout", ["nvidia", "shisa"])
@torch.no_grad()
def test_fading_begins_with_the_plain_model_and_ends_with_the_channel_gone(layout) -> None:
    model, student, _, plain = _student("llama_group3", layout)
    ids = torch.tensor([tiny_tokens(60)])
    whole = student.masked(ids, Decisions.drawn(masks=False, borrowed_share=1.0))
    assert_logits_close(model.lm_head(whole)[0], plain)
    gone = model.lm_head(student.masked(ids, Decisions.drawn(masks=False, borrowed_share=0.0)))[0]
    never = oracle.dms_logits(model, tiny_tokens(60), _rule(layout, 100))
    assert_logits_close(gone, never)
    assert (gone - plain).abs().max() > 0.01


@torch.no_grad()
def test_noise_is_logistic_and_the_share_its_sigmoid() -> None:
    """With a = 0 everywhere, half of all tokens are flagged, and alpha = sigmoid(noise) is uniform at tau 1."""
    model = tiny_model("llama")
    add_adapter(model)
    student = Student(model, dataclasses.replace(_rule("adapter", 3), alpha_scale=1.0, alpha_offset=0.0))
    decisions = Decisions.drawn(tau=1.0, generator=torch.Generator().manual_seed(0))
    student.masked(torch.tensor([tiny_tokens(500)]), decisions)
    assert torch.stack(decisions.soft).mean().item() == pytest.approx(0.5, abs=0.02)
    cold = Decisions.drawn(tau=0.01, generator=torch.Generator().manual_seed(0))
    student.masked(torch.tensor([tiny_tokens(500)]), cold)
    assert torch.stack(cold.soft).mean().item() == pytest.approx(0.5, abs=0.03)


def test_adapter_starts_with_nothing_flagged_and_only_it_trains() -> None:
    model = tiny_model("qwen3")
    new = add_adapter(model)
    assert [p.requires_grad for p in new] == [True] * 4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in (0, 1)
        for name in ("dms_proj_alpha", "dms_proj_alpha_norm")
    }
    student = Student(model, _rule("adapter"))
    decisions = Decisions.drawn(tau=0.5, generator=torch.Generator().manual_seed(0))
    student.masked(torch.tensor([tiny_tokens(40)]), decisions).square().mean().backward()
    assert not any(decisions.hard)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new)
    assert model.model.layers[0].self_attn.dms_proj_alpha.weight.grad.any()


@pytest.mark.parametrize("layout", ["nvidia", "shisa"])
@pytest.mark.parametrize("family", ["llama_group3", "qwen3"])
@torch.no_grad()
def test_clearing_the_rows_of_a_channel_that_has_faded_changes_nothing(family, layout) -> None:
    model, ids = tiny_model(family), torch.tensor([tiny_tokens(60)])
    student = Student(model, _rule(layout))
    faded = student.masked(ids, Decisions.drawn(masks=False, borrowed_share=0.0))
    clear_borrowed_rows(model)
    assert_logits_close(student.masked(ids, Decisions.drawn())[0], faded[0])


def test_a_student_is_freed_with_its_model() -> None:
    model = tiny_model("llama")
    student = Student(model, _rule("shisa"))
    student.masked(torch.tensor([tiny_tokens(20)]), Decisions.drawn())
    freed = weakref.ref(model)
    del model, student
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_cleared_rows_keep_every_token(family) -> None:
    model = tiny_model(family)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    clear_borrowed_rows(model)
    decisions = Decisions.drawn()
    Student(model, _rule("shisa")).masked(torch.tensor([tiny_tokens(40)]), decisions)
    assert not any(decisions.hard)
    changed = (model.model.layers[0].self_attn.q_proj.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [15, 47]  # the last channel of heads 0 and 2, of 16 channels each
