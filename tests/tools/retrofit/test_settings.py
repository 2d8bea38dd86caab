"""The recipe: its bounds and its schedules."""

from __future__ import annotations

import pytest

from fastdms.config import DMSConfig
from fastdms.tools.retrofit.settings import RetrofitSettings


def test_compression_rises_linearly_and_stays() -> None:
    s = RetrofitSettings(layout="nvidia", target_compression=5.0, zeroing_steps=3, ramp_steps=4, anneal_steps=2)
    assert s.steps == 9
    assert [s.compression(step) for step in range(3, 9)] == [2.0, 3.0, 4.0, 5.0, 5.0, 5.0]
    assert [s.decides(step) for step in (2, 3)] == [False, True]


def test_borrowed_channel_fades_to_nothing() -> None:
    s = RetrofitSettings(layout="shisa", zeroing_steps=4)
    assert [s.borrowed_share(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_temperature_falls_over_the_deciding_steps() -> None:
    s = RetrofitSettings(layout="nvidia", zeroing_steps=5, ramp_steps=6, anneal_steps=5, tau_start=1.0, tau_end=0.1)
    assert s.tau(0) == s.tau(5) == 1.0
    assert s.tau(10) == pytest.approx(0.55)
    assert s.tau(15) == pytest.approx(0.1)


def test_learning_rate_warms_up_and_anneals() -> None:
    s = RetrofitSettings(ramp_steps=50, anneal_steps=50, learning_rate=1e-3)
    assert s.learning_rate_at(0) == pytest.approx(1e-4)
    assert s.learning_rate_at(10) == s.learning_rate_at(49) == 1e-3
    assert s.learning_rate_at(99) == pytest.approx(5e-5)
    annealed = [s.learning_rate_at(step) for step in range(49, 100)]
    assert annealed == sorted(annealed, reverse=True)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ("adapter", {"shift": 1, "zero_borrowed": "none", "source": "adapter"}),
        ("nvidia", {"shift": 1, "zero_borrowed": "pre_and_post_rope", "source": "borrowed_q"}),
        ("shisa", {"shift": 0, "zero_borrowed": "pre_rope", "source": "borrowed_q"}),
    ],
)
def test_rule_is_that_of_the_layout(layout, rule) -> None:
    settings = RetrofitSettings(layout=layout, window_tokens=64, target_compression=8)
    assert settings.rule == DMSConfig(window_tokens=64, target_compression=8.0, **rule)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": "other"}, "layout must be adapter, nvidia or shisa, got 'other'"),
        ({"target_compression": 1.0}, "target_compression must be a number > 1, at most 1,000, got 1.0"),
        ({"target_compression": 0.5}, "target_compression must be a number > 1, at most 1,000, got 0.5"),
        ({"target_compression": float("nan")}, "target_compression must be a number > 1, at most 1,000, got nan"),
        ({"window_tokens": -1}, "window_tokens must be an integer >= 0 and < 2"),
        ({"context": 256, "window_tokens": 255}, "leaves nothing to evict in a context of 256"),
        ({"ramp_steps": 0}, "ramp_steps must be an integer >= 1 and < 2"),
        ({"context": 2.5}, "context must be an integer >= 2 and < 2"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"tau_end": float("inf")}, "tau_end must be a number > 0, got inf"),
        ({"sequences": 8, "micro_batch": 3}, "sequences 8 is not a multiple of micro_batch 3"),
        ({"sequences": 8, "micro_batch": 0}, "micro_batch must be an integer >= 1, got 0"),
        ({"zeroing_steps": 5}, "zeroing_steps must be 0 for an adapter"),
        ({"trainable": ("q_proj",)}, "trainable is for a borrowed channel"),
        ({"layout": "shisa", "trainable": ()}, "trainable must name parts"),
        ({"layout": "shisa", "trainable": ("",)}, "trainable must name parts"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 10**19}, "seed must be an integer >= 0"),
        ({"target_compression": 1e300}, "target_compression must be a number > 1, at most 1,000"),
    ],
)
def test_bad_values_are_named(changed, message) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        RetrofitSettings(**changed)
