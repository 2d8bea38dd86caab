"""The training loop's body: one optimiser step, and the state that makes a restart exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from fastdms.tools.retrofit.loss import compression_shortfall, distillation_kl
from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.student import Decisions, Student, add_adapter, clear_borrowed_rows

__all__ = ["Trainer", "contexts_of_step"]

_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)


def contexts_of_step(step: int, sequences: int, num_contexts: int, seed: int) -> list[int]:
    """Which contexts ``step`` trains on: each epoch is a permutation of its own, drawn from ``seed``."""
    chosen: list[int] = []
    while len(chosen) < sequences:
        epoch, place = divmod(step * sequences + len(chosen), num_contexts)
        order = np.random.default_rng((seed, epoch)).permutation(num_contexts)
        chosen += order[place : place + sequences - len(chosen)].tolist()
    return chosen


class Trainer:
    """Distils ``model``, changed in place, under the schedules of ``settings``.

    model: on its device; for an adapter in the dtype to compute in, as it is only read, else in fp32, which CUDA then
        computes in bf16. contexts: token ids ``[N, context]``.

    Each step draws its text and its noise from the seed and its own number, so that a run which starts again from
    ``state`` goes on exactly as if it had never stopped.
    """

    def __init__(self, model: PreTrainedModel, contexts: npt.NDArray[np.int32], settings: RetrofitSettings) -> None:
        self.model, self.contexts, self.settings = model, contexts, settings
        self.device = model.device
        model.eval()  # no dropout; gradients don't ask for training mode
        self.adapter = settings.layout == "adapter"
        self.tied = model.lm_head.weight is model.model.embed_tokens.weight
        teacher: Any = model
        if self.adapter:
            add_adapter(model)
        else:
            teacher = copy.deepcopy(model).requires_grad_(False)
            _choose(model, settings.trainable)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.student = Student(model, settings.rule)
        self._teacher = teacher.model
        self._heads: tuple[nn.Parameter, nn.Parameter] = (model.lm_head.weight, teacher.lm_head.weight)
        self._dtype = model.dtype if self.adapter or self.device.type == "cpu" else torch.bfloat16
        self.optimizer = self._new_optimizer()

    def step(self, step: int) -> dict[str, float]:
        """Run step number ``step`` (from 0); what goes into the log. Raises ValueError if the loss is not finite."""
        s = self.settings
        if step == s.zeroing_steps and not self.adapter:
            clear_borrowed_rows(self.model)
            self.optimizer = self._new_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate_at(step)
        generator = torch.Generator(self.device).manual_seed(s.seed * 1_000_003 + step)
        chosen = contexts_of_step(step, s.sequences, len(self.contexts), s.seed)
        token_ids = torch.from_numpy(self.contexts[chosen].astype(np.int64)).to(self.device)
        parts = token_ids.split(s.micro_batch or s.sequences)
        figures = torch.stack([self._accumulate(part, step, generator) for part in parts]).mean(0)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), _CLIP_NORM)
        kl, shortfall, soft, hard, grad_norm = torch.cat([figures, norm[None]]).tolist()
        if not math.isfinite(kl + grad_norm):
            raise ValueError(f"step {step}: the loss is not finite; try a lower learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step,
            "kl": kl,
            "shortfall": shortfall,
            "compression_asked": s.compression(step) if s.decides(step) else 1.0,
            "flagged_soft": soft,
            "flagged": hard,
            "compression": 1.0 / max(1.0 - hard, 1e-6),
            "learning_rate": s.learning_rate_at(step),
            "tau": s.tau(step),
            "grad_norm": grad_norm,
        }

    def _accumulate(self, token_ids: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
        """Add the gradient of one micro batch; KL, shortfall, soft and hard share of flagged tokens, fp32 [4]."""
        s = self.settings
        with torch.no_grad(), self._autocast():
            target = self._teacher(input_ids=token_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        decisions = Decisions.drawn(
            tau=s.tau(step), generator=generator, borrowed_share=s.borrowed_share(step), masks=s.decides(step)
        )
        with self._autocast():
            own = self.student.masked(token_ids, decisions).flatten(0, 1)
        student_head, teacher_head = (head.to(self._dtype) for head in self._heads)
        kl = distillation_kl(own, target, student_head, teacher_head)
        zero = torch.zeros((), device=self.device)
        soft = torch.stack(decisions.soft).mean() if decisions.soft else zero
        hard = torch.stack(decisions.hard).mean() if decisions.hard else zero
        shortfall = compression_shortfall(soft, s.compression(step)) if s.decides(step) else zero
        loss = (kl + s.aux_weight * shortfall) * len(token_ids) / s.sequences
        loss.backward()
        return torch.stack([kl, shortfall, soft, hard]).detach()

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on, besides the step number."""
        return {
            "parameters": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a ``state``; ValueError if it belongs to another model or other settings."""
        saved = state["parameters"]
        if saved.keys() != self.trained.keys():
            raise ValueError("the saved state has other trained weights than this run")
        for name, parameter in self.trained.items():
            if saved[name].shape != parameter.shape:
                raise ValueError(f"the saved state has another shape for {name}")
            parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.trained.values(), lr=0.0, betas=_BETAS, weight_decay=0.0, fused=self.device.type == "cuda"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.adapter or self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _choose(model: PreTrainedModel, trainable: Sequence[str] | None) -> None:
    """Train the weights whose names have one of ``trainable`` in them, and q_proj, which makes the decisions."""
    names = [name for name, _ in model.named_parameters()]
    for part in trainable or ():
        if not any(part in name for name in names):
            raise ValueError(f"trainable: no weight has {part!r} in its name, such as {names[1]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is None or "q_proj" in name or any(part in name for part in trainable))
