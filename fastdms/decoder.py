"""The one decoder definition: Llama, Mistral, Qwen2 and Qwen3, told apart by their config alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fastdms.cache import CompactCache
from fastdms.config import DMSConfig, ModelConfig
from fastdms.linear import Linear, LinearMaker, empty
from fastdms.ops import (
    MOST_ROWS,
    SpanCache,
    decision_constants,
    decode_append,
    decode_attention,
    decode_linear,
    dense_attention,
    prefill_append,
    prefill_attention,
    prefill_rope,
)
from fastdms.rope import rope_tables

__all__ = ["Chunk", "Decoder", "DecoderLayer", "DenseHistory", "Linear"]

_NEVER_EVICT = (1.0, float("inf"))


class Chunk:
    """Device tensors of a ragged prefill chunk; ``history`` and ``start`` are for a dense one, of one row alone."""

    __slots__ = ("chunk_indptr", "history", "outputs", "positions", "rows", "start", "tokens")

    def __init__(
        self,
        *,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        chunk_indptr: torch.Tensor,
        outputs: torch.Tensor,
        history: DenseHistory | None = None,
        start: int = 0,
    ) -> None:
        self.tokens = tokens  # [T] int64
        self.positions = positions  # [T] int32
        self.rows = rows  # [B] int32
        self.chunk_indptr = chunk_indptr  # [B + 1] int32
        self.outputs = outputs  # [n] int64: tokens whose logits are wanted
        self.history = history
        self.start = start  # position of the first token


class DenseHistory:
    """Keys and values of one prompt, whole, while it is prefilled densely: two ``[L, N, Hkv, D]`` tensors."""

    def __init__(self, config: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, num_tokens, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)


def _apply(
    x: torch.Tensor,
    linear: Linear,
    *,
    decoding: bool,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    fp32_out: bool = False,
) -> torch.Tensor:
    """A linear layer with what stands around it, as in ``decode_linear``, which decodes few enough rows on CUDA.

    On the CPU it decodes fp8 and int4 weights alone, which torch's product would need a copy of.
    """
    if decoding and x.shape[0] <= MOST_ROWS and (x.is_cuda or linear.scale is not None):
        return decode_linear(
            x, linear.weight, scale=linear.scale, bias=linear.bias, norm=norm, norm_eps=eps, residual=residual,
            swiglu=swiglu, fp32_out=fp32_out,
        )  # fmt: skip
    dtype = x.dtype
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], norm, eps)
    weight = linear.dequantised(dtype)
    if swiglu:  # two products, since what follows is faster on wholes than on halves
        biases = linear.bias.chunk(2) if linear.bias is not None else (None, None)
        gate, up = (F.linear(x, half, bias) for half, bias in zip(weight.chunk(2), biases, strict=True))
        x = F.silu(gate, inplace=True).mul_(up)
    else:
        x = F.linear(x, weight, linear.bias)
    if residual is not None:
        if torch.compiler.is_compiling():  # the sum of two 16-bit tensors, but not one that cuBLAS would add to a copy
            residual, x = residual.float(), x.float()
        x = (residual + x).to(dtype)
    return x.float() if fp32_out else x


class DecoderLayer(nn.Module):
    """One transformer block with fused qkv and gate_up projections, over one layer of the compact cache."""

    def __init__(
        self,
        config: ModelConfig,
        dms: DMSConfig | None,
        zero_borrowed: str,
        index: int,
        maker: LinearMaker,
    ) -> None:
        super().__init__()
        c = config
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = (
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.rms_norm_eps,
        )
        self.shift = dms.shift if dms else 0
        self.zero_borrowed = zero_borrowed
        self.decision = decision_constants(dms.alpha_scale, dms.alpha_offset) if dms else _NEVER_EVICT

        def vector(size: int) -> nn.Parameter:
            return empty(size, dtype=maker.dtype, device=maker.device)

        def linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            return maker.layer(index, name, inputs, outputs, bias)

        self.input_norm, self.post_norm = vector(c.hidden_size), vector(c.hidden_size)
        self.qkv = linear("qkv", c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.qkv_bias)
        self.q_norm = vector(c.head_dim) if c.qk_norm else None
        self.k_norm = vector(c.head_dim) if c.qk_norm else None
        self.o = linear("o", c.num_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.gate_up = linear("gate_up", c.hidden_size, 2 * c.intermediate_size, c.mlp_bias)
        self.down = linear("down", c.intermediate_size, c.hidden_size, c.mlp_bias)
        adapter = dms is not None and dms.source == "adapter"
        self.alpha_norm = vector(c.hidden_size) if adapter else None
        shape = (c.num_kv_heads, c.hidden_size)
        self.alpha = Linear(empty(*shape, dtype=maker.dtype, device=maker.device)) if adapter else None

    def decode(
        self,
        x: torch.Tensor,
        cache: SpanCache,
        positions: torch.Tensor,
        rows: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """One token per row: ``x [B, hidden]`` -> ``[B, hidden]``; the cache is mutated."""
        q, k, v, alpha = self._project(x, decoding=True)
        q = decode_append(
            q, k, v, cache, positions=positions, rows=rows, cos=cos, sin=sin, decision=self.decision, shift=self.shift,
            zero_borrowed=self.zero_borrowed, alpha=alpha, q_norm=self.q_norm, k_norm=self.k_norm, norm_eps=self.eps,
        )  # fmt: skip
        attended = decode_attention(q, cache, positions=positions, rows=rows, sm_scale=self.head_dim**-0.5)
        return self._finish(x, attended, decoding=True)

    def prefill(
        self,
        x: torch.Tensor,
        cache: SpanCache,
        chunk: Chunk,
        history: tuple[torch.Tensor, torch.Tensor] | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """A ragged chunk: ``x [T, hidden]`` -> ``[T, hidden]``; the cache, and a dense history, are mutated."""
        q, k, v, alpha = self._project(x, decoding=False)
        q, k, decisions = prefill_rope(
            q, k, positions=chunk.positions, cos=cos, sin=sin, decision=self.decision, zero_borrowed=self.zero_borrowed,
            alpha=alpha, q_norm=self.q_norm, k_norm=self.k_norm, norm_eps=self.eps,
        )  # fmt: skip
        ragged = {"positions": chunk.positions, "rows": chunk.rows, "chunk_indptr": chunk.chunk_indptr}
        scale = self.head_dim**-0.5
        if history is None:
            attended = prefill_attention(q, k, v, decisions, cache, **ragged, shift=self.shift, sm_scale=scale)
        else:
            attended = dense_attention(
                q, k, v, k_history=history[0], v_history=history[1], start=chunk.start, sm_scale=scale
            )
        prefill_append(k, v, decisions, cache, **ragged, shift=self.shift)
        return self._finish(x, attended, decoding=False)

    def _project(
        self, x: torch.Tensor, *, decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        qkv = _apply(x, self.qkv, decoding=decoding, norm=self.input_norm, eps=self.eps)
        heads = qkv.view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        if self.alpha is None:
            return q, k, v, None
        # The adapter sees the residual stream itself, through a norm of its own.
        return q, k, v, _apply(x, self.alpha, decoding=decoding, norm=self.alpha_norm, eps=self.eps)

    def _finish(self, x: torch.Tensor, attended: torch.Tensor, *, decoding: bool) -> torch.Tensor:
        x = _apply(attended.flatten(1), self.o, decoding=decoding, residual=x)
        hidden = _apply(x, self.gate_up, decoding=decoding, norm=self.post_norm, eps=self.eps, swiglu=True)
        return _apply(hidden, self.down, decoding=decoding, residual=x)


class Decoder(nn.Module):
    """Token ids in, fp32 logits out, over a compact cache.

    num_positions: bounds the RoPE tables. weight_dtype: of the linear layers, ``dtype`` (also for None), float8_e4m3fn
    or INT4; what ``config.int4`` says of a layer comes first. head_dtype: the same of the output head, None: as
    weight_dtype. All else, a DMS adapter included, is in ``dtype``. zero_borrowed: where the borrowed query channel is
    zero although ``dms`` is None (eviction off for a model that was trained so).

    Raises ValueError, naming the layer, for int4 weights that make no whole groups.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        dms: DMSConfig | None,
        *,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        weight_dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = None,
        zero_borrowed: str = "none",
    ) -> None:
        super().__init__()
        self.config, self.dms = config, dms
        if dms is not None:
            zero_borrowed = dms.zero_borrowed if dms.source == "borrowed_q" else "none"
        weight_dtype = weight_dtype or dtype
        head_dtype = head_dtype or weight_dtype
        maker = LinearMaker(config, weight_dtype=weight_dtype, head_dtype=head_dtype, dtype=dtype, device=device)
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self.embed = empty(vocabulary, hidden, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, dms, zero_borrowed, index, maker) for index in range(config.num_layers)
        )
        self.norm = empty(hidden, dtype=dtype, device=device)
        if config.tie_word_embeddings and head_dtype == dtype:
            self.lm_head = Linear(self.embed)
        else:  # what is looked up stays as it is, also where fewer bits of it are multiplied by
            self.lm_head = maker.head(hidden, vocabulary)
        cos, sin = rope_tables(config, num_positions)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, cache: CompactCache
    ) -> torch.Tensor:
        """Logits ``[B, V]`` fp32 after one more token per row: tokens ``[B]`` int64, positions, rows ``[B]`` int32."""
        x = F.embedding(tokens, self.embed)
        for index, layer in enumerate(self._layers()):
            x = layer.decode(x, cache.layer(index), positions, rows, self.cos, self.sin)
        return self._logits(x, decoding=True)

    def prefill(self, chunk: Chunk, cache: CompactCache) -> torch.Tensor:
        """Logits ``[n, V]`` fp32 of the chunk's wanted tokens."""
        x = F.embedding(chunk.tokens, self.embed)
        for index, layer in enumerate(self._layers()):
            history = (chunk.history.k[index], chunk.history.v[index]) if chunk.history else None
            x = layer.prefill(x, cache.layer(index), chunk, history, self.cos, self.sin)
        return self._logits(x[chunk.outputs], decoding=False)

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    def _logits(self, x: torch.Tensor, *, decoding: bool) -> torch.Tensor:
        # A chunk wants logits of few tokens: a copy of a head in fewer bits would take longer than the product with it.
        decoding = decoding or self.lm_head.scale is not None
        return _apply(x, self.lm_head, decoding=decoding, norm=self.norm, eps=self.config.rms_norm_eps, fp32_out=True)
