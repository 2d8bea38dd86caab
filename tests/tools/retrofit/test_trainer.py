"""Training itself, on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.trainer import Trainer, contexts_of_step
from tests.models import tiny_model, tiny_tokens

_CONTEXTS = np.asarray([tiny_tokens(48, seed=i) for i in range(12)], np.int32)


def _settings(**changed) -> RetrofitSettings:
    common = {
        "window_tokens": 4, "target_compression": 3.0, "context": 48, "sequences": 4, "micro_batch": 2,
        "ramp_steps": 50, "anneal_steps": 40, "learning_rate": 1e-3, "aux_weight": 50.0,
    }  # fmt: skip
    return RetrofitSettings(**(common | changed))


def test_each_epoch_sees_every_context_once_in_an_order_of_its_own() -> None:
    def epoch(number, seed):
        return [i for step in range(3 * number, 3 * number + 3) for i in contexts_of_step(step, 5, 15, seed)]

    epochs = [epoch(number, seed=3) for number in (0, 1)]
    assert all(sorted(seen) == list(range(15)) for seen in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != epoch(0, seed=4)


@pytest.mark.parametrize(
    ("layout", "family", "extra"),
    [
        ("adapter", "llama_group3", {}),
        ("adapter", "qwen3", {}),
        ("nvidia", "qwen3", {"zeroing_steps": 20}),
        ("shisa", "qwen2", {"zeroing_steps": 20}),
    ],
)
def test_the_target_is_reached_and_then_the_loss_falls(layout, family, extra) -> None:
    settings = _settings(layout=layout, **extra)
    trainer = Trainer(tiny_model(family), _CONTEXTS, settings)
    log = [trainer.step(step) for step in range(settings.steps)]
    deciding = log[settings.zeroing_steps :]
    assert deciding[0]["flagged"] == 0.0
    assert all(line["compression_asked"] == 1.0 for line in log[: settings.zeroing_steps])
    reached = np.mean([line["compression"] for line in log[-10:]])
    assert 0.9 * settings.target_compression < reached < 1.25 * settings.target_compression
    loss = [line["kl"] + settings.aux_weight * line["shortfall"] for line in deciding]
    at_the_target = settings.ramp_steps
    assert np.mean(loss[-10:]) < np.mean(loss[at_the_target : at_the_target + 10])


def test_the_base_of_an_adapter_is_left_alone() -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, _CONTEXTS, _settings())
    for step in range(3):
        trainer.step(step)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert after.keys() - before.keys() == trainer.trained.keys()


def test_chosen_weights_train_and_no_others() -> None:
    model = tiny_model("llama_bias")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, _CONTEXTS, _settings(layout="shisa", zeroing_steps=2, trainable=("k_proj",)))
    for step in range(6):
        trainer.step(step)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    parts = ("k_proj.weight", "q_proj.weight", "q_proj.bias")
    assert moved - {f"model.layers.{layer}.self_attn.k_proj.bias" for layer in (0, 1)} == {
        f"model.layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in parts
    }


@pytest.mark.parametrize("layout", ["adapter", "nvidia"])
@pytest.mark.parametrize("stop", [1, 4, 5, 7])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["cpu-fp32", "cuda-bf16"],
)
def test_a_restart_is_exact(layout, stop, device, dtype) -> None:
    """Also when the stop is right before, at or after the step that clears the borrowed rows."""
    settings = _settings(layout=layout, zeroing_steps=0 if layout == "adapter" else 5, ramp_steps=5, anneal_steps=2)
    whole = Trainer(tiny_model("qwen3").to(device, dtype), _CONTEXTS, settings)
    lines = [whole.step(step) for step in range(9)]
    first = Trainer(tiny_model("qwen3").to(device, dtype), _CONTEXTS, settings)
    for step in range(stop):
        first.step(step)
    second = Trainer(tiny_model("qwen3").to(device, dtype), _CONTEXTS, settings)
    second.load_state(first.state())
    assert [second.step(step) for step in range(stop, 9)] == lines[stop:]
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, second.trained[name]), name


def test_a_state_of_another_model_is_refused() -> None:
    state = Trainer(tiny_model("llama"), _CONTEXTS, _settings()).state()
    with pytest.raises(ValueError, match="other trained weights"):
        Trainer(tiny_model("llama", num_hidden_layers=3), _CONTEXTS, _settings()).load_state(state)
    with pytest.raises(ValueError, match=r"another shape for model\.layers\.0"):
        Trainer(tiny_model("llama_group3"), _CONTEXTS, _settings()).load_state(state)


def test_a_loss_that_is_not_finite_is_an_error_before_the_weights_move() -> None:
    model = tiny_model("llama")
    trainer = Trainer(model, _CONTEXTS, _settings())
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = [p.clone() for p in trainer.trained.values()]
    with pytest.raises(ValueError, match="step 0: the loss is not finite"):
        trainer.step(0)
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.trained.values(), strict=True))
