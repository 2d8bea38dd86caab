"""The definition of DMS, written out: a transformers model run under an explicit mask.

Independent of the runtime on purpose: of fastdms only the plain dataclass ``DMSConfig`` is used. RoPE, norms,
projections and the MLP are those of the transformers model; only the attention function is replaced, and hooks
read the decision inputs. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdms.config import DMSConfig

Adapter = dict[int, tuple[torch.Tensor, torch.Tensor]]
_NAME = "written_out_dms"


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRun:
    """logits: [T, vocab] fp32. flagged, kept: [L, Hkv, T] bool. alpha: [L, Hkv, T] fp32, before any shift.

    ``kept[l, h, k]``: token k is live in that span once all T tokens have been appended.
    """

    logits: torch.Tensor
    flagged: torch.Tensor
    kept: torch.Tensor
    alpha: torch.Tensor


def dms_logits(
    model: PreTrainedModel,
    token_ids: Sequence[int] | torch.Tensor,
    dms: DMSConfig | None,
    adapter: Adapter | None = None,
    prompt_len: int | None = None,
) -> torch.Tensor:
    """Next-token logits [T, vocab] fp32 after each of the T tokens; see ``run``."""
    return run(model, token_ids, dms, adapter, prompt_len).logits


def kept(
    model: PreTrainedModel,
    token_ids: Sequence[int] | torch.Tensor,
    dms: DMSConfig | None,
    adapter: Adapter | None = None,
    prompt_len: int | None = None,
) -> torch.Tensor:
    """The live set after T tokens, [L, Hkv, T] bool: its sum over T is ``live_tokens``; see ``run``."""
    return run(model, token_ids, dms, adapter, prompt_len).kept


def run(
    model: PreTrainedModel,
    token_ids: Sequence[int] | torch.Tensor,
    dms: DMSConfig | None,
    adapter: Adapter | None = None,
    prompt_len: int | None = None,
) -> OracleRun:
    """Run ``model`` over one sequence with eviction as ``dms`` says; None runs it unchanged (plain causal).

    adapter: layer -> (norm weight [hidden], projection [Hkv, hidden]), for ``source="adapter"``.
    prompt_len: with ``prefill="dense"``, how many of the tokens are the prompt (required there).
    """
    if dms is not None and dms.prefill == "dense" and prompt_len is None:
        raise ValueError('prefill="dense" needs prompt_len')
    if dms is not None and (dms.source == "adapter") != (adapter is not None):
        raise ValueError(f"source={dms.source!r} with adapter={'given' if adapter is not None else None}")
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=model.device).view(1, -1)
    dense_queries = prompt_len if dms is not None and dms.prefill == "dense" and prompt_len is not None else 0
    written_out = _WrittenOutAttention(model, dms, adapter, dense_queries, ids.shape[1])
    with torch.no_grad(), written_out.installed():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return written_out.result(logits)


def visible(flagged: torch.Tensor, window_tokens: int, dense_queries: int = 0) -> torch.Tensor:
    """flagged: [..., T] bool -> [..., T queries, T keys] bool: which keys each query may attend to."""
    num_tokens = flagged.shape[-1]
    position = torch.arange(num_tokens, device=flagged.device)
    age = position[:, None] - position[None, :]
    in_prompt = (position < dense_queries)[:, None]
    return (age >= 0) & (in_prompt | (age <= window_tokens) | ~flagged[..., None, :])


def flags_of(alpha: torch.Tensor, shift: int) -> torch.Tensor:
    """alpha: [..., T] -> flagged [..., T] bool; with shift 1 the last token has no decision yet and is kept."""
    decision = alpha > 0
    if shift == 0:
        return decision
    return torch.cat([decision[..., 1:], torch.zeros_like(decision[..., :1])], dim=-1)


class _WrittenOutAttention:
    """One run's attention function, with the hooks that feed it."""

    def __init__(
        self,
        model: PreTrainedModel,
        dms: DMSConfig | None,
        adapter: Adapter | None,
        dense_queries: int,
        num_tokens: int,
    ) -> None:
        self.model, self.dms, self.adapter, self.dense_queries = model, dms, adapter, dense_queries
        self.layers: list[Any] = list(model.model.layers)
        config = model.config
        self.num_kv_heads = int(config.num_key_value_heads)
        self.group = config.num_attention_heads // self.num_kv_heads
        self.head_dim = int(self.layers[0].self_attn.head_dim)
        self.num_tokens = num_tokens
        self.alpha: dict[int, torch.Tensor] = {}
        self.attended: list[int] = []

    def result(self, logits: torch.Tensor) -> OracleRun:
        # A model whose attention implementation is looked up on another config object would quietly run its own.
        if self.attended != list(range(len(self.layers))):
            raise RuntimeError(f"the written-out attention ran for layers {self.attended}, not for all in order")
        shape = (len(self.layers), self.num_kv_heads, self.num_tokens)
        if self.dms is None:
            nothing = torch.zeros(shape, dtype=torch.bool)
            return OracleRun(logits=logits, flagged=nothing, kept=~nothing, alpha=torch.full(shape, -torch.inf))
        alpha = torch.stack([self.alpha[layer] for layer in range(len(self.layers))])
        flagged = flags_of(alpha, self.dms.shift)
        live = visible(flagged, self.dms.window_tokens)[..., -1, :]
        return OracleRun(logits=logits, flagged=flagged, kept=live, alpha=alpha)

    @contextmanager
    def installed(self) -> Iterator[None]:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, lambda *args, **kwargs: None)
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}.values()
        before = [(config, config._attn_implementation) for config in configs]
        with ExitStack() as stack:
            for config, implementation in before:
                stack.callback(setattr, config, "_attn_implementation", implementation)
                config._attn_implementation = _NAME
            for index, layer in enumerate(self.layers if self.dms is not None else []):
                for handle in self._hooks(index, layer):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, index: int, layer: Any) -> Iterator[Any]:
        assert self.dms is not None
        if self.dms.source == "adapter":
            yield layer.register_forward_pre_hook(
                lambda module, args, kwargs: self._decide_by_adapter(
                    index, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
        query = getattr(layer.self_attn, "q_norm", None) or layer.self_attn.q_proj
        yield query.register_forward_hook(lambda module, args, output: self._borrow(index, output))

    def _decide_by_adapter(self, index: int, residual: torch.Tensor) -> None:
        assert self.adapter is not None
        norm, weight = (tensor.to(residual) for tensor in self.adapter[index])
        mean_square = residual.square().mean(dim=-1, keepdim=True)
        normalised = residual * torch.rsqrt(mean_square + self.model.config.rms_norm_eps) * norm
        self._decide(index, normalised @ weight.T)

    def _borrow(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """Read the decision from the query before RoPE and, where asked to, zero the channel it was read from."""
        assert self.dms is not None
        query = output.reshape(1, self.num_tokens, self.num_kv_heads, self.group, self.head_dim).clone()
        if self.dms.source == "borrowed_q":
            self._decide(index, query[:, :, :, 0, -1].clone())
        if self.dms.zero_borrowed != "none":
            query[:, :, :, 0, -1] = 0
        return query.reshape(output.shape)

    def _decide(self, index: int, decision_input: torch.Tensor) -> None:
        """decision_input: [1, T, Hkv]."""
        assert self.dms is not None
        alpha = self.dms.alpha_scale * decision_input.float() - self.dms.alpha_offset
        self.alpha[index] = alpha[0].T.contiguous()

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query: [1, Hq, T, D]; key, value: [1, Hkv, T, D], all after RoPE -> [1, T, Hq, D]."""
        self.attended.append(module.layer_idx)
        query = query.unflatten(1, (self.num_kv_heads, self.group))
        if self.dms is None:
            allowed = visible(torch.zeros(self.num_kv_heads, self.num_tokens, dtype=torch.bool, device=key.device), 0)
        else:
            flagged = flags_of(self.alpha[module.layer_idx], self.dms.shift)
            allowed = visible(flagged, self.dms.window_tokens, self.dense_queries)
            if self.dms.zero_borrowed == "pre_and_post_rope":
                query = query.clone()
                query[:, :, 0, :, -1] = 0
        scores = scaling * (query @ key[:, :, None].transpose(-1, -2))
        scores = scores.masked_fill(~allowed[None, :, None], -torch.inf)
        attended = scores.softmax(dim=-1) @ value[:, :, None]
        return attended.flatten(1, 2).transpose(1, 2), None
