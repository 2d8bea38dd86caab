"""The same figures without the runtime: the checkpoint in transformers, in fp32, under the DMS mask written out.

Key ``k`` is visible to query ``q >= k`` iff ``q - k <= window_tokens`` or key ``k`` is not flagged (``DMSConfig``); the
mask is applied to all queries at once, whichever path they would take in the runtime.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdms.config import DMSConfig
from fastdms.progress import progress
from fastdms.tools.quality.measure import Subject
from fastdms.tools.quality.metrics import Steps, compare, summarise
from fastdms.tools.reference_model import load_reference

__all__ = ["MaskedModel", "measure_masked", "relative_differences"]

_ATTENTION = "fastdms_written_out_mask"


def measure_masked(subject: Subject) -> list[dict[str, Any]]:
    """One dict for each text: ``decode`` and the live shares outside the window, as ``measure.measure`` gives them.

    Over the same tokens as there. The KV dtypes don't matter: there is no cache. fp32 throughout. Nothing of the model
    is left on the device. Raises ValueError where transformers can't load it.
    """
    device = next(iter(subject.options.values())).device
    try:
        return _measure(MaskedModel(subject.folder, subject.dms, device), subject)
    finally:
        gc.collect()
        if device.type == "cuda":  # what engines may take is sized by what the device reports as free
            torch.cuda.empty_cache()


def _measure(model: MaskedModel, subject: Subject) -> list[dict[str, Any]]:
    settings, windows = subject.settings, subject.windows
    results = []
    with progress(total=sum(map(len, windows.values())), desc="measuring with transformers", unit=" sequences") as bar:
        for name, sequences in windows.items():
            steps: list[Steps] = []
            kept = []
            for sequence in sequences:
                ids, targets = sequence[: settings.context], sequence[settings.prompt_tokens + 1 :]
                off, _ = model.run(ids, evict=False, last=settings.decode_tokens)
                on, flagged = model.run(ids, evict=True, last=settings.decode_tokens)
                steps.append(compare(off, on, targets))
                outside = settings.context - subject.dms.window_tokens - 1
                kept.append(1.0 - flagged[..., :outside].double().mean(-1))
                bar.update()
            share = torch.stack(kept).mean(0)
            results.append({
                "text": name,
                "sequences": len(sequences),
                "decode": asdict(summarise(steps)),
                "live_share_outside_window": float(share.mean()),
                "live_share_outside_window_spans": share.tolist(),
            })  # fmt: skip
    return results


def relative_differences(runtime: dict[str, Any], masked: dict[str, Any]) -> dict[str, float | None]:
    """``runtime / masked - 1`` of the live share outside the window, perplexities and KLD; None by a zero."""
    pairs = {
        "live_share_outside_window": (runtime, masked),
        "perplexity_off": (runtime["decode"], masked["decode"]),
        "perplexity_on": (runtime["decode"], masked["decode"]),
        "kld": (runtime["decode"], masked["decode"]),
    }
    return {
        name: 0.0 if ours[name] == theirs[name] else ours[name] / theirs[name] - 1.0 if theirs[name] else None
        for name, (ours, theirs) in pairs.items()
    }


class MaskedModel:
    """A checkpoint's folder as a transformers model that can run under the mask.

    Raises ValueError where transformers can't load the folder.
    """

    def __init__(self, folder: Path, dms: DMSConfig, device: torch.device) -> None:
        self._dms = dms
        self._model = load_reference(folder, torch.float32, device)
        self._layers: list[Any] = list(self._model.model.layers)
        config = self._model.config
        self._heads = (int(config.num_key_value_heads), config.num_attention_heads // config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        self._adapter = _read_adapter(folder, device) if dms.source == "adapter" else {}
        self._device = device

    def run(self, token_ids: Sequence[int], *, evict: bool, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits ``[last, V]`` after each of the last tokens; what was flagged, bool ``[L, Hkv, T]`` on the CPU.

        evict: without, nothing is masked but the future and nothing flagged; a borrowed channel stays zeroed.
        """
        ids = torch.tensor([list(token_ids)], device=self._device)
        flagged: list[torch.Tensor] = []
        with torch.no_grad(), self._watched(flagged, evict):
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]
        return logits, torch.stack(flagged).cpu()

    @contextmanager
    def _watched(self, flagged: list[torch.Tensor], evict: bool) -> Iterator[None]:
        """Under this, ``flagged`` gets each layer's decisions just before its attention runs by them."""

        def decide(inputs: torch.Tensor) -> None:  # [1, T, Hkv]
            decision = (self._dms.alpha_scale * inputs - self._dms.alpha_offset > 0) & evict
            if self._dms.shift:
                # The token that decides about the last one hasn't come yet.
                decision = torch.cat([decision[:, 1:], torch.zeros_like(decision[:, :1])], dim=1)
            flagged.append(decision[0].T)

        def attend(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
        ) -> Any:
            if self._dms.zero_borrowed == "pre_and_post_rope":
                query = self._zeroed(query.transpose(1, 2)).transpose(1, 2)
            visible = self._visible(flagged[module.layer_idx]) if evict else None
            return sdpa_attention_forward(module, query, key, value, visible, scaling=kwargs["scaling"])

        with ExitStack() as stack:
            # Left there, it would keep this model alive.
            stack.callback(ALL_ATTENTION_FUNCTIONS.pop, _ATTENTION)
            ALL_ATTENTION_FUNCTIONS[_ATTENTION] = attend
            stack.callback(self._model.set_attn_implementation, self._model.config._attn_implementation)
            self._model.set_attn_implementation(_ATTENTION)
            for index, layer in enumerate(self._layers):
                for handle in self._hooks(index, layer, decide):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, index: int, layer: Any, decide: Any) -> list[Any]:
        def by_adapter(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            norm, weight = self._adapter[index]
            residual = args[0] if args else kwargs["hidden_states"]
            decide(F.rms_norm(residual, residual.shape[-1:], norm, self._eps) @ weight.T)

        def by_borrowed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            heads = output.unflatten(-1, (-1, layer.self_attn.head_dim)) if output.dim() == 3 else output
            decide(heads[:, :, :: self._heads[1], -1].float())
            seen = heads if self._dms.zero_borrowed == "none" else self._zeroed(heads)
            return seen.reshape(output.shape)

        if self._dms.source == "adapter":
            return [layer.register_forward_pre_hook(by_adapter, with_kwargs=True)]
        query = getattr(layer.self_attn, "q_norm", None) or layer.self_attn.q_proj
        return [query.register_forward_hook(by_borrowed)]

    def _zeroed(self, query: torch.Tensor) -> torch.Tensor:
        """A copy of query ``[1, T, Hq, D]`` without the last channel of each group's first head."""
        query = query.clone()
        query[:, :, :: self._heads[1], -1] = 0
        return query

    def _visible(self, flagged: torch.Tensor) -> torch.Tensor:
        """flagged: ``[Hkv, T]`` -> ``[1, Hq, T queries, T keys]`` bool."""
        position = torch.arange(flagged.shape[-1], device=flagged.device)
        age = position[:, None] - position
        visible = (age >= 0) & ((age <= self._dms.window_tokens) | ~flagged[:, None, :])
        return visible.repeat_interleave(self._heads[1], dim=0)[None]


def _read_adapter(folder: Path, device: torch.device) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> norm ``[hidden]`` and projection ``[Hkv, hidden]``, fp32."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if "dms_proj_alpha" in name}  # noqa: SIM118
    layers = [f"model.layers.{index}.self_attn.dms_proj_alpha" for index in range(len(found) // 2)]
    return {
        index: (found[f"{name}_norm.weight"].float().to(device), found[f"{name}.weight"].float().to(device))
        for index, name in enumerate(layers)
    }
