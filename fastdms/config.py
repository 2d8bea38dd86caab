"""The frozen descriptions that everything else is built from: the model's shape and how it was trained to forget."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["CHUNKS_AHEAD", "DMSConfig", "Int4Layers", "ModelConfig", "RopeConfig", "dense_chunk", "dense_tokens"]

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
ZeroBorrowed = Literal["none", "pre_rope", "pre_and_post_rope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DMSConfig:
    """How a checkpoint decides what its KV cache forgets (Dynamic Memory Sparsification, arXiv 2506.05345).

    Key ``k`` is visible to query ``q >= k`` iff ``q - k <= window_tokens`` or key ``k`` is not flagged. The flag is
    ``alpha_scale * s - alpha_offset > 0``, where ``s`` is the decision input of position ``k + shift``.

    window_tokens: tokens, besides the query's own, that are visible whatever their flag.
    alpha_scale, alpha_offset: the decision's affine map.
    shift: 0 when position ``k`` decides about itself, 1 when position ``k + 1`` decides about ``k``.
    zero_borrowed: where attention sees the borrowed query channel as zero.
    source: ``"borrowed_q"``: ``s`` is the last channel of the first query head of each group, before RoPE;
        ``"adapter"``: ``s`` is a projection of its own (``dms_proj_alpha``) of the normalised residual stream.
    prefill: ``"masked"`` applies the rule inside the prompt, as trained; ``"dense"`` lets prompt tokens see all others
        and forgets only afterwards.
    target_compression: the ratio trained for, if known; only reported.

    Raises ValueError for a value outside its range.
    """

    window_tokens: int = 256
    alpha_scale: float = 100.0
    alpha_offset: float = 5.0
    shift: Literal[0, 1] = 0
    zero_borrowed: ZeroBorrowed = "none"
    source: Literal["borrowed_q", "adapter"] = "borrowed_q"
    prefill: Literal["masked", "dense"] = "masked"
    target_compression: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.window_tokens, bool) or not isinstance(self.window_tokens, int) or self.window_tokens < 0:
            raise ValueError(f"window_tokens must be an integer >= 0, got {self.window_tokens!r}")
        for name in ("alpha_scale", "alpha_offset"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        _one_of("shift", self.shift, (0, 1))
        _one_of("zero_borrowed", self.zero_borrowed, ("none", "pre_rope", "pre_and_post_rope"))
        _one_of("source", self.source, ("borrowed_q", "adapter"))
        _one_of("prefill", self.prefill, ("masked", "dense"))
        target = self.target_compression
        if target is not None and (not isinstance(target, (int, float)) or not 1 <= target < math.inf):
            raise ValueError(f"target_compression must be None or a number >= 1, got {target!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, as ``fastdms.rope.rope_config`` checks it.

    ``type`` is one of ``fastdms.rope.ROPE_TYPES``, ``parameters`` what that type reads; ``factors``, if any, divide the
    inverse frequencies pair by pair (a GGUF file's ``rope_freqs``).
    """

    type: str = "default"
    theta: float = 10000.0
    parameters: tuple[tuple[str, float | bool], ...] = ()
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Layers:
    """The linear layers that a checkpoint stores as int4, by their published names without ``.weight``.

    names: sorted, since the key of the compiler's artifacts is made of a config's ``repr``. group: weights that share a
    scale. scale_dtype: of the scales as stored.
    """

    names: tuple[str, ...]
    group: int
    scale_dtype: torch.dtype

    def has(self, names: Collection[str]) -> bool:
        """Whether ``names``, which are computed together, are int4; ValueError where some are and some aren't."""
        found = [name for name in names if name in self.names]
        if found and len(found) < len(names):
            other = next(name for name in names if name not in self.names)
            raise ValueError(f"{found[0]} is int4 and {other} is not; layers that are computed together must be alike")
        return bool(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder-only model of a supported family.

    ``qkv_bias``, ``o_bias``, ``mlp_bias``: which linear layers carry a bias. ``qk_norm``: RMSNorm over each head of
    q and k before RoPE. ``weight_dtype``: as stored in the checkpoint. ``int4``: what of it is stored as int4.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weight_dtype: torch.dtype = torch.float32
    int4: Int4Layers | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


CHUNKS_AHEAD = 4  # that may be prefilled before the host looks at the first, and before the next decode step
_MOST_DENSE = 8192


def dense_chunk(chunk: int) -> int:
    """The most tokens of a dense chunk on a GPU: those of as many chunks of ``chunk`` as may go ahead, within 8,192.

    Without a graph, a small one takes the host longer than the device.
    """
    return max(chunk, min(CHUNKS_AHEAD * chunk, _MOST_DENSE))


def dense_tokens(dms: DMSConfig | None, prompt_len: int, num_tokens: int, chunk: int) -> int:
    """How many of a row's first ``num_tokens`` tokens are prefilled densely, ``prompt_len`` of them its prompt.

    Without eviction, which has no use for the mask, those that fill a chunk of ``chunk`` tokens; fewer share one.
    """
    if dms is None:
        return num_tokens if num_tokens >= chunk else 0
    return prompt_len if dms.prefill == "dense" else 0


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
