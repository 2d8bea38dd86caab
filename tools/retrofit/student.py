"""A transformers model as teacher and as student: plain, or with the soft DMS mask in its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdms.config import DMSConfig
from fastdms.ops import soft_attention

__all__ = ["Decisions", "Student", "add_adapter", "clear_borrowed_rows"]

_DENSE = "sdpa"
_MASKED = "fastdms_soft_mask"


@dataclass(slots=True, kw_only=True)
class Decisions:
    """How one forward pass decides. ``tau``: temperature; ``generator``: of the noise, None for hard decisions.

    masks: whether decisions are made and mask; where not, ``borrowed_share`` of the borrowed channel is left in
        q_proj's output (and, in a layout that zeroes after RoPE too, of what it is there).
    Filled by the pass, one entry per layer: ``soft``, the mean of alpha (differentiable), ``hard``, that of ``a > 0``.
    """

    tau: float = 1.0
    generator: torch.Generator | None = None
    borrowed_share: float = 0.0
    masks: bool = True
    soft: list[torch.Tensor]
    hard: list[torch.Tensor]
    log_keep: dict[int, torch.Tensor]

    @classmethod
    def drawn(cls, **fields: Any) -> Decisions:
        """A pass that has not run yet."""
        return cls(soft=[], hard=[], log_keep={}, **fields)


class Student:
    """Runs ``model`` without its output head: ``dense`` as it is, ``masked`` under soft decisions.

    model: a Llama-type transformers model, with an adapter (``add_adapter``) where ``rule.source`` asks for one.
    """

    def __init__(self, model: PreTrainedModel, rule: DMSConfig) -> None:
        self.model, self.rule = model, rule
        self.layers: list[Any] = list(model.model.layers)
        self.eps = float(model.config.rms_norm_eps)
        self.num_kv_heads = int(model.config.num_key_value_heads)
        self.head_dim = int(self.layers[0].self_attn.head_dim)
        self._pass: Decisions | None = None
        for index, layer in enumerate(self.layers):
            if rule.source == "adapter":
                layer.register_forward_pre_hook(self._adapter_hook(index), with_kwargs=True)
            else:
                query = getattr(layer.self_attn, "q_norm", None) or layer.self_attn.q_proj
                # It fades where its rows will be cleared, before any norm; it is read where the runtime reads it.
                layer.self_attn.q_proj.register_forward_hook(self._fade_hook)
                query.register_forward_hook(self._borrow_hook(index))

    def dense(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states ``[B, T, hidden]`` of token_ids ``[B, T]``, nothing masked and nothing borrowed."""
        hidden: torch.Tensor = self.model.model(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden

    def masked(self, token_ids: torch.Tensor, decisions: Decisions) -> torch.Tensor:
        """The same under ``decisions``, which the pass fills."""
        with self._deciding(decisions):
            return self.dense(token_ids)

    @contextmanager
    def _deciding(self, decisions: Decisions) -> Iterator[None]:
        config: Any = self.model.config
        config._attn_implementation, self._pass = _MASKED, decisions
        running = _running.set(self)
        try:
            yield
        finally:
            _running.reset(running)
            config._attn_implementation, self._pass = _DENSE, None

    def _adapter_hook(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is not None:
                attention = layer.self_attn
                residual = (args[0] if args else kwargs["hidden_states"]).float()
                norm, projection = attention.dms_proj_alpha_norm.weight, attention.dms_proj_alpha.weight
                with torch.autocast(residual.device.type, enabled=False):
                    normalised = F.rms_norm(residual, residual.shape[-1:], norm, self.eps)
                    self._decide(index, F.linear(normalised, projection))

        return hook

    def _fade_hook(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if self._pass is None or self._pass.masks:
            return None
        return self._scaled(self._grouped(output), self._pass.borrowed_share).reshape(output.shape)

    def _borrow_hook(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._pass is None or not self._pass.masks:
                return None
            grouped = self._grouped(output)
            self._decide(index, grouped[..., 0, -1].float())
            return self._scaled(grouped, 0.0).reshape(output.shape)

        return hook

    def _grouped(self, query: torch.Tensor) -> torch.Tensor:
        """``[B, T, Hq * D]`` or ``[B, T, Hq, D]`` -> ``[B, T, Hkv, G, D]``."""
        heads = query.unflatten(-1, (-1, self.head_dim)) if query.dim() == 3 else query
        grouped: torch.Tensor = heads.unflatten(2, (self.num_kv_heads, -1))
        return grouped

    def _scaled(self, grouped: torch.Tensor, share: float) -> torch.Tensor:
        """The borrowed channel of ``[..., G, D]``, the last of each group's first head, times ``share``."""
        seen = torch.ones(grouped.shape[-2:], dtype=grouped.dtype, device=grouped.device)
        seen[0, -1] = share
        return grouped * seen

    def _decide(self, index: int, decision_input: torch.Tensor) -> None:
        """decision_input: ``[B, T, Hkv]`` fp32. alpha = sigmoid((a + noise) / tau), log_keep = log(1 - alpha)."""
        assert self._pass is not None
        a = self.rule.alpha_scale * decision_input - self.rule.alpha_offset
        self._pass.hard.append((a > 0).float().mean().detach())
        if self._pass.generator is None:
            log_keep = torch.where(a > 0, -torch.inf, 0.0)
        else:
            uniform = torch.rand(a.shape, generator=self._pass.generator, device=a.device).clamp_(1e-6, 1.0 - 1e-6)
            # The difference of two Gumbel variables is logistic.
            logit = (a + uniform.log() - (-uniform).log1p()) / self._pass.tau
            self._pass.soft.append(logit.sigmoid().mean())
            log_keep = F.logsigmoid(-logit)
        if self.rule.shift:
            log_keep = F.pad(log_keep[:, 1:], (0, 0, 0, 1))
        self._pass.log_keep[index] = log_keep.transpose(1, 2).contiguous()  # [B, Hkv, T]

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query ``[B, Hq, T, D]``, key and value ``[B, Hkv, T, D]``, after RoPE -> ``[B, T, Hq, D]``."""
        assert self._pass is not None
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self.rule.zero_borrowed == "pre_and_post_rope":
            grouped = self._grouped(query.transpose(1, 2))
            query = self._scaled(grouped, self._pass.borrowed_share).flatten(2, 3).transpose(1, 2)
        # Also where nothing masks yet: its backward gives the same bits each time, which an exact restart needs.
        log_keep = (
            self._pass.log_keep.pop(module.layer_idx) if self._pass.masks else query.new_zeros(key.shape[:3]).float()
        )
        out = soft_attention(query, key, value, log_keep, window_tokens=self.rule.window_tokens, sm_scale=scaling)
        return out.transpose(1, 2), None


# The student whose masked pass runs: transformers' registry is global, and would keep a student for ever.
_running: ContextVar[Student] = ContextVar("running")


def _attend_as_running(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _running.get()._attend(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_MASKED, _attend_as_running)
ALL_MASK_ATTENTION_FUNCTIONS.register(_MASKED, lambda *args, **kwargs: None)


def add_adapter(model: PreTrainedModel) -> list[nn.Parameter]:
    """Give each layer a zero ``dms_proj_alpha`` and its norm, fp32, and freeze everything else; the new parameters.

    The norm starts as the layer's own input norm, which already knows the residual stream's outlier channels.
    """
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    layers: Any = model.model.layers
    for layer in layers:
        attention, norm = layer.self_attn, layer.input_layernorm.weight
        projection = nn.Linear(norm.shape[0], model.config.num_key_value_heads, bias=False)
        nn.init.zeros_(projection.weight)
        attention.dms_proj_alpha = projection.to(norm.device)
        attention.dms_proj_alpha_norm = nn.Module()
        attention.dms_proj_alpha_norm.weight = nn.Parameter(norm.detach().float().clone())
        parameters += [attention.dms_proj_alpha.weight, attention.dms_proj_alpha_norm.weight]
    return parameters


@torch.no_grad()
def clear_borrowed_rows(model: PreTrainedModel) -> None:
    """Zero the rows (and biases) of q_proj that make the borrowed channels: every decision starts at -offset."""
    layers: Any = model.model.layers
    for layer in layers:
        attention = layer.self_attn
        head_dim = int(attention.head_dim)
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        rows = slice(head_dim - 1, None, group * head_dim)
        attention.q_proj.weight[rows] = 0
        if attention.q_proj.bias is not None:
            attention.q_proj.bias[rows] = 0
