"""The oracle itself: against plain transformers, against loops written by hand, and against a token-by-token replay."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastdms.config import DMSConfig
from tests.models import (
    DMS_LAYOUTS,
    FAMILIES,
    HEAD_DIM,
    AdapterWeights,
    Layout,
    adapter_weights,
    dms_config,
    tiny_model,
    tiny_tokens,
)
from tests.oracle import OracleRun, dms_logits, flags_of, kept, run, visible
from tests.tolerance import LOGITS_RELATIVE, assert_logits_close

WINDOWS = (0, 1, 7, 64)
NUM_TOKENS = 90


def _run(model: Any, ids: list[int], layout: Layout, window_tokens: int, **changes: Any) -> OracleRun:
    dms = dms_config(layout, window_tokens)
    assert dms is not None
    prompt_len = changes.pop("prompt_len", None)
    return run(model, ids, dataclasses.replace(dms, **changes), _adapter(model, layout), prompt_len)


def _adapter(model: Any, layout: Layout) -> AdapterWeights | None:
    return adapter_weights(model) if layout == "adapter" else None


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1000 * LOGITS_RELATIVE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_eviction_it_is_the_plain_model(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(NUM_TOKENS)
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0]
    assert_logits_close(dms_logits(model, ids, None), plain)
    assert kept(model, ids, None).all()
    for window_tokens in (NUM_TOKENS - 1, NUM_TOKENS):
        dms = DMSConfig(window_tokens=window_tokens)
        assert_logits_close(dms_logits(model, ids, dms), plain)
        assert kept(model, ids, dms).all()


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fixtures_make_every_mistake_visible(family: str, layout: Layout) -> None:
    """About half flagged in every head, no decision near its threshold, attention peaked, logits spread."""
    model, ids = tiny_model(family), tiny_tokens(NUM_TOKENS)
    for window_tokens in WINDOWS:
        result = _run(model, ids, layout, window_tokens)
        share = result.flagged.float().mean(dim=-1)
        assert ((share > 0.15) & (share < 0.85)).all()
        assert result.alpha.abs().min() > 0.01
        top = result.logits.softmax(dim=-1).amax(dim=-1).mean()
        assert 0.2 < top < 0.8
        assert _differ(result.logits, dms_logits(model, ids, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_changes_the_result(family: str) -> None:
    """On the same weights: layouts, shift, zeroing, window and prefill all give different logits."""
    model, ids = tiny_model(family), tiny_tokens(NUM_TOKENS)
    base = DMSConfig(window_tokens=7)
    variants = {
        "as trained by shisa": base,
        "window": dataclasses.replace(base, window_tokens=8),
        "shift": dataclasses.replace(base, shift=1),
        "zero before": dataclasses.replace(base, zero_borrowed="pre_rope"),
        "zero before and after": dataclasses.replace(base, zero_borrowed="pre_and_post_rope"),
        "scale": dataclasses.replace(base, alpha_scale=3.0),
        "dense prefill": dataclasses.replace(base, prefill="dense"),
    }
    results = {name: dms_logits(model, ids, dms, prompt_len=40) for name, dms in variants.items()}
    adapter = dataclasses.replace(base, source="adapter")
    results["adapter"] = dms_logits(model, ids, adapter, adapter_weights(model))
    results |= {layout: _run(model, ids, layout, 7).logits for layout in ("nvidia", "adapter")}
    names = list(results)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert _differ(results[a], results[b]), (a, b)


def test_a_hand_written_mask() -> None:
    decision = torch.tensor([-1.0, 2.0, -1.0, 3.0, 4.0])
    assert flags_of(decision, 0).int().tolist() == [0, 1, 0, 1, 1]
    assert flags_of(decision, 1).int().tolist() == [1, 0, 1, 1, 0]
    flagged = flags_of(decision, 1)
    assert visible(flagged, 1).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]
    assert visible(flagged, 0, dense_queries=3).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_the_live_set_is_what_a_window_ring_leaves(layout: Layout) -> None:
    """Append one token at a time; the one that leaves the window is dropped if it is flagged."""
    model, ids = tiny_model("qwen3"), tiny_tokens(40)
    for window_tokens in (0, 1, 7):
        result = _run(model, ids, layout, window_tokens)
        for span_flags, span_kept in zip(result.flagged.flatten(0, 1), result.kept.flatten(0, 1), strict=True):
            live: set[int] = set()
            for t in range(len(ids)):
                live.add(t)
                leaving = t - window_tokens - 1
                if leaving >= 0 and span_flags[leaving]:
                    live.remove(leaving)
            assert set(span_kept.nonzero().flatten().tolist()) == live


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
def test_later_tokens_change_nothing(layout: Layout) -> None:
    """Row i of a long sequence is the last row of its prefix: one decode step at a time means the same thing."""
    model, ids = tiny_model("llama"), tiny_tokens(30)
    for window_tokens in (0, 7):
        whole = _run(model, ids, layout, window_tokens).logits
        for length in (1, 2, 9, 29):
            assert_logits_close(_run(model, ids[:length], layout, window_tokens).logits, whole[:length])


def test_dense_prefill_forgets_after_the_prompt() -> None:
    model, ids, prompt_len = tiny_model("mistral"), tiny_tokens(40), 25
    dense = _run(model, ids, "shisa", 3, prefill="dense", zero_borrowed="none", prompt_len=prompt_len)
    assert_logits_close(dense.logits[:prompt_len], dms_logits(model, ids[:prompt_len], None))
    assert _differ(dense.logits[prompt_len], dms_logits(model, ids, None)[prompt_len])
    assert not dense.kept.all()
    with pytest.raises(ValueError, match="prompt_len"):
        _run(model, ids, "shisa", 3, prefill="dense")


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny_model("qwen2"), tiny_tokens(20)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits
        _run(model, ids, "nvidia", 1)
        torch.testing.assert_close(model(torch.tensor([ids])).logits, before, rtol=0, atol=0)
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("zero_borrowed", ["none", "pre_rope", "pre_and_post_rope"])
@pytest.mark.parametrize(
    ("family", "source"), [("mistral", "borrowed_q"), ("qwen3", "borrowed_q"), ("qwen3", "adapter")]
)
def test_one_layer_by_hand(family: str, source: Any, zero_borrowed: Any, shift: Any) -> None:
    """The whole model in loops over tokens and heads, the zeroed channel by the formulas for its rotated pair."""
    model, ids, window_tokens = tiny_model(family, num_hidden_layers=1), tiny_tokens(12), 2
    dms = DMSConfig(window_tokens=window_tokens, shift=shift, zero_borrowed=zero_borrowed, source=source)
    adapter = adapter_weights(model) if source == "adapter" else None
    layer: Any = model.model.layers[0]
    attention, theta, half = layer.self_attn, model.config.rope_parameters["rope_theta"], HEAD_DIM // 2

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        rotated = x.clone()
        for i in range(half):
            phi = position * theta ** (-2 * i / HEAD_DIM)
            rotated[i] = x[i] * math.cos(phi) - x[i + half] * math.sin(phi)
            rotated[i + half] = x[i + half] * math.cos(phi) + x[i] * math.sin(phi)
        return rotated

    with torch.no_grad():
        residual = model.model.embed_tokens(torch.tensor(ids))
        h = layer.input_layernorm(residual)
        q = attention.q_proj(h).view(len(ids), 4, HEAD_DIM)
        k = attention.k_proj(h).view(len(ids), 2, HEAD_DIM)
        v = attention.v_proj(h).view(len(ids), 2, HEAD_DIM)
        if family == "qwen3":
            q, k = attention.q_norm(q), attention.k_norm(k)
        decision_input = q[:, ::2, -1]
        if adapter is not None:
            norm, weight = adapter[0]
            root_mean_square = (residual.square().mean(dim=-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
            decision_input = (residual / root_mean_square * norm) @ weight.T
        decided = (decision_input > 0.05).T.tolist()
        mixed = torch.zeros(len(ids), 4, HEAD_DIM)
        for t in range(len(ids)):
            for head in range(4):
                query, g = rotate(q[t, head], t), head // 2
                if head % 2 == 0 and zero_borrowed != "none":
                    phi = t * theta ** (-2 * (half - 1) / HEAD_DIM)
                    query[half - 1] = q[t, head, half - 1] * math.cos(phi)
                    query[-1] = q[t, head, half - 1] * math.sin(phi) if zero_borrowed == "pre_rope" else 0
                keys = [j for j in range(t + 1) if t - j <= window_tokens or not decided[g][j + shift]]
                scores = torch.stack([query @ rotate(k[j, g], j) for j in keys]) / math.sqrt(HEAD_DIM)
                mixed[t, head] = scores.softmax(dim=0) @ torch.stack([v[j, g] for j in keys])
        residual = residual + attention.o_proj(mixed.flatten(1))
        residual = residual + layer.mlp(layer.post_attention_layernorm(residual))
        by_hand = model.lm_head(model.model.norm(residual))
    assert_logits_close(dms_logits(model, ids, dms, adapter), by_hand)
