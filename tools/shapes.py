"""Random models of published shapes, for measurements that don't need trained weights."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch

from fastdms.cache import CompactCache
from fastdms.config import DMSConfig, ModelConfig, RopeConfig
from fastdms.decoder import Decoder
from fastdms.options import resolve_cache, resolve_options
from fastdms.runner import ModelRunner
from fastdms.runtime import CompiledModel
from fastdms.weights import load_weights, weight_shapes

__all__ = ["SHAPES", "keep_share_rule", "random_model"]

SHAPES = {
    "llama-3.2-1b": ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        weight_dtype=torch.bfloat16,
        rope=RopeConfig(
            type="llama3",
            theta=500000.0,
            parameters=(
                ("factor", 32.0),
                ("low_freq_factor", 1.0),
                ("high_freq_factor", 4.0),
                ("original_max_position_embeddings", 8192),
            ),
        ),
    ),
    "qwen3-8b": ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        qk_norm=True,
        weight_dtype=torch.bfloat16,
        rope=RopeConfig(theta=1000000.0),
    ),
    "tiny": ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=16384,
        weight_dtype=torch.float32,
        rope=RopeConfig(),
    ),
}
_WEIGHT_STD = 0.02


def keep_share_rule(config: ModelConfig, kept: float, window_tokens: int) -> DMSConfig | None:
    """A rule under which a random model keeps about ``kept`` of the tokens past the window; None to keep all.

    The borrowed channel of random weights is about normal with the spread of a projection of normalised input, or 1
    where q is normalised itself; the threshold is set at its quantile. Always report the share measured.
    """
    if kept >= 1.0:
        return None
    spread = 1.0 if config.qk_norm else _WEIGHT_STD * config.hidden_size**0.5
    return DMSConfig(window_tokens=window_tokens, alpha_offset=100.0 * spread * NormalDist().inv_cdf(kept))


def random_model(config: ModelConfig, dms: DMSConfig | None, *, seed: int = 0, **options: Any) -> CompiledModel:
    """A ``CompiledModel`` of this shape, its weights normal with spread 0.02; ``options`` as in ``fastdms.compile``."""
    arguments: dict[str, Any] = {
        "device": None, "dtype": None, "kv_dtype": "auto", "weights": "auto", "max_concurrency": 8, "max_context": None,
        "kv_memory": None, "prefill_chunk": 2048, "mode": None,
    }  # fmt: skip
    resolved = resolve_options(config, **(arguments | options))
    decoder = Decoder(
        config, dms, num_positions=resolved.max_context, dtype=resolved.dtype, device=resolved.device,
        weight_dtype=resolved.weights, head_dtype=resolved.head,
    )  # fmt: skip
    generator = torch.Generator(resolved.device).manual_seed(seed)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=resolved.dtype, device=resolved.device)
        return tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=_WEIGHT_STD, generator=generator)

    load_weights(decoder, ((name, drawn(name, shape)) for name, shape in weight_shapes(decoder).items()))
    cache = CompactCache(resolve_cache(config, dms, resolved), resolved.device)
    runner = ModelRunner(
        decoder, cache, mode=resolved.mode, max_concurrency=resolved.max_concurrency,
        prefill_chunk=resolved.prefill_chunk,
    )  # fmt: skip
    return CompiledModel(config, dms, resolved, runner, None)
