"""What a retrofit is asked to do, and the schedules that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastdms.checkpoint.dms import LAYOUTS, Layout
from fastdms.config import DMSConfig

__all__ = ["RetrofitSettings"]

_WARM_UP_STEPS = 10
_LAST_LEARNING_RATE = 0.05
_MOST_COMPRESSION = 1000
_TOO_LARGE = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrofitSettings:
    """One training run: logit distillation of DMS into a model (arXiv 2506.05345, section 3).

    layout: whose checkpoint layout is trained and written. ``"adapter"``: the base is frozen, each layer gets a
        projection of its own; ``"nvidia"``, ``"shisa"``: the borrowed query channel, after it has been faded to zero.
    window_tokens: tokens besides the query's own that stay visible whatever their flag.
    target_compression: tokens per token kept, counted over all tokens; > 1.
    context, sequences: tokens of a training sequence, sequences of a step. micro_batch: sequences that run at once, a
        divisor of ``sequences``; None: all. Part of the recipe: noise and shortfall are those of a micro batch.
    zeroing_steps: steps in which the borrowed channel fades; 0 for an adapter. ramp_steps: then the compression asked
        for rises linearly from 1 to the target. anneal_steps: then it stays there while the learning rate falls.
    learning_rate: peak of AdamW (betas 0.9 and 0.95, no weight decay, gradient norm clipped to 1). It warms up over
        the first ten steps.
    aux_weight: of the one-sided loss that pulls the flagged share up to the target.
    tau_start, tau_end: temperature of the Gumbel-sigmoid, falling linearly over ramp and annealing.
    alpha_scale, alpha_offset: the decision is ``alpha_scale * s - alpha_offset > 0``.
    trainable: with a borrowed channel, parts of names of the weights to train besides q_proj; None: all weights.
    seed: of text order and noise.

    Raises ValueError for a value outside its range.
    """

    layout: Layout = "adapter"
    window_tokens: int = 256
    target_compression: float = 4.0
    context: int = 2048
    sequences: int = 8
    micro_batch: int | None = None
    zeroing_steps: int = 0
    ramp_steps: int = 150
    anneal_steps: int = 150
    learning_rate: float = 3e-4
    aux_weight: float = 2.0
    tau_start: float = 1.0
    tau_end: float = 0.1
    alpha_scale: float = 100.0
    alpha_offset: float = 5.0
    trainable: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be adapter, nvidia or shisa, got {self.layout!r}")
        least = {"context": 2, "sequences": 1, "zeroing_steps": 0, "ramp_steps": 1, "anneal_steps": 0}
        for name, minimum in (least | {"window_tokens": 0, "seed": 0}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < _TOO_LARGE:
                raise ValueError(f"{name} must be an integer >= {minimum} and < 2**31, got {value!r}")
        for name in ("learning_rate", "aux_weight", "tau_start", "tau_end", "alpha_scale", "alpha_offset"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        target = self.target_compression
        if not isinstance(target, (int, float)) or not 1 < target <= _MOST_COMPRESSION:
            raise ValueError(f"target_compression must be a number > 1, at most {_MOST_COMPRESSION:,}, got {target!r}")
        if self.window_tokens >= self.context - 1:
            raise ValueError(
                f"window_tokens {self.window_tokens} leaves nothing to evict in a context of {self.context} tokens"
            )
        part = self.micro_batch
        if part is not None and (isinstance(part, bool) or not isinstance(part, int) or part < 1):
            raise ValueError(f"micro_batch must be an integer >= 1, got {part!r}")
        if part is not None and self.sequences % part:
            raise ValueError(f"sequences {self.sequences} is not a multiple of micro_batch {part}")
        if self.layout == "adapter" and self.zeroing_steps:
            raise ValueError("zeroing_steps must be 0 for an adapter: it borrows no query channel")
        if self.layout == "adapter" and self.trainable is not None:
            raise ValueError("trainable is for a borrowed channel; an adapter leaves its base alone")
        if self.trainable is not None and not (self.trainable and all(self.trainable)):
            raise ValueError("trainable must name parts of weights' names, none of them empty")

    @property
    def rule(self) -> DMSConfig:
        """The rule that is trained, as the runtime applies it."""
        return replace(
            LAYOUTS[self.layout],
            window_tokens=self.window_tokens,
            alpha_scale=self.alpha_scale,
            alpha_offset=self.alpha_offset,
            target_compression=float(self.target_compression),
        )

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.zeroing_steps + self.ramp_steps + self.anneal_steps

    def borrowed_share(self, step: int) -> float:
        """How much of the borrowed channel attention still sees in ``step`` (from 0): falls linearly to 0."""
        return max(0.0, 1.0 - step / self.zeroing_steps) if self.zeroing_steps else 0.0

    def decides(self, step: int) -> bool:
        """Whether ``step`` trains decisions, rather than fading the borrowed channel."""
        return step >= self.zeroing_steps

    def compression(self, step: int) -> float:
        """The compression asked for in ``step``: ``1 + (target - 1) * progress`` along the ramp."""
        progress = (step + 1 - self.zeroing_steps) / self.ramp_steps
        return 1.0 + (self.target_compression - 1.0) * min(1.0, max(0.0, progress))

    def tau(self, step: int) -> float:
        """Temperature of the Gumbel-sigmoid in ``step``."""
        progress = max(0.0, (step - self.zeroing_steps) / max(1, self.ramp_steps + self.anneal_steps - 1))
        return self.tau_start + (self.tau_end - self.tau_start) * progress

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant until the target is reached, then half a cosine down to a twentieth."""
        warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
        annealed = step - self.zeroing_steps - self.ramp_steps
        if annealed < 0:
            return self.learning_rate * warm_up
        cosine = 0.5 * (1.0 + math.cos(math.pi * (annealed + 1) / self.anneal_steps))
        return self.learning_rate * warm_up * (_LAST_LEARNING_RATE + (1.0 - _LAST_LEARNING_RATE) * cosine)
