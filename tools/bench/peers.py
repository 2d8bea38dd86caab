"""Other libraries in the same run: FlashAttention 3 where it is to be had, torch's own attention and its product."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdms.tools.bench.spec import DTYPE, Case, Spec

__all__ = ["FlashAttention", "Peer", "decode_peers", "find_flash_attention", "linear_peers", "prefill_peers"]

# Where FlashAttention 3 is found, first what vLLM brings.
_MODULES = ("vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_interface")
_PAGE = 256  # of the paged cache that it reads


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttention:
    """``flash_attn_varlen_func`` and what it takes besides; ``missing`` says why there is none where one was asked."""

    name: str
    function: Callable[..., Any] | None = None
    arguments: dict[str, Any]
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """launches: one for each input set. num_bytes: moved by one of them."""

    name: str
    launches: list[Callable[[], Any]]
    num_bytes: int


def find_flash_attention(folder: str | None) -> FlashAttention:
    """FlashAttention 3 from ``folder``, which joins the module path's end."""
    if folder is None:
        return FlashAttention(name="FA3", arguments={})
    sys.path.append(str(Path(folder).resolve()))
    reasons = []
    for module in _MODULES:
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
        except Exception as error:  # a foreign package may fail in any way
            reasons.append(f"{module}: {type(error).__name__}: {error}")
            continue
        ours = module == _MODULES[0]
        return FlashAttention(
            name="FA3 (vLLM)" if ours else "FA3", function=function, arguments={"fa_version": 3} if ours else {}
        )
    return FlashAttention(name="FA3", arguments={}, missing="; ".join(reasons))


def decode_peers(case: Case, flash: FlashAttention, device: torch.device) -> list[Peer]:
    """FlashAttention over a paged, dense bf16 cache of as many bytes, spread evenly over the rows."""
    if flash.function is None:
        return []
    spec = case.spec
    token_bytes = 2 * spec.kv_heads * spec.head_dim * DTYPE.itemsize
    q_bytes = 2 * case.sets[0]["q"].nbytes
    tokens = max(1, round((case.num_bytes - q_bytes) / (spec.rows * token_bytes)))
    return [_paged_decode(spec, len(case.sets), tokens, flash, device, spec.rows * tokens * token_bytes + q_bytes)]


def linear_peers(case: Case) -> list[Peer]:
    """Torch's product alone, without what the layer does besides; none of weights in fp8 or int4."""
    if case.spec.weights != "bf16":
        return []
    launches: list[Callable[[], Any]] = [functools.partial(F.linear, one["x"], one["weight"]) for one in case.sets]
    return [Peer(name="product alone", launches=launches, num_bytes=case.num_bytes)]


def _paged_decode(
    spec: Spec, num_sets: int, tokens: int, flash: FlashAttention, device: torch.device, num_bytes: int
) -> Peer:
    blocks = -(-tokens // _PAGE)
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_sets * spec.rows * blocks, _PAGE, spec.kv_heads, spec.head_dim)
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=DTYPE) for _ in "kv")
    tables = torch.randperm(shape[0], generator=generator, device=device).int().view(num_sets, spec.rows, blocks)
    lengths = torch.full((spec.rows,), tokens, dtype=torch.int32, device=device)
    indptr = torch.arange(spec.rows + 1, dtype=torch.int32, device=device)
    q = torch.randn(
        (spec.rows, spec.kv_heads * spec.group, spec.head_dim), generator=generator, device=device, dtype=DTYPE
    )

    def call(table: torch.Tensor) -> Callable[[], Any]:
        assert flash.function is not None
        function = flash.function
        return lambda: function(
            q, k, v, max_seqlen_q=1, cu_seqlens_q=indptr, max_seqlen_k=tokens, seqused_k=lengths, block_table=table,
            softmax_scale=spec.sm_scale, causal=True, **flash.arguments,
        )  # fmt: skip

    return Peer(name=flash.name, launches=[call(table) for table in tables], num_bytes=num_bytes)


def prefill_peers(case: Case, flash: FlashAttention, device: torch.device) -> list[Peer]:
    """Dense causal attention over the same q, k and v; torch's own can't let a chunk follow other tokens."""
    backends = {"SDPA (flash)": SDPBackend.FLASH_ATTENTION, "SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION}
    if device.type != "cuda":
        backends = {"SDPA (math)": SDPBackend.MATH}
    spec = case.spec
    scale, tokens = spec.sm_scale, spec.length - spec.start
    qkv = [(one["q"], one["k"], one["v"]) for one in case.sets]
    if spec.start:
        backends = {}
        before = torch.zeros((spec.start, spec.kv_heads, spec.head_dim), dtype=DTYPE, device=device)
        qkv = [(q, torch.cat((before, k)), torch.cat((before, v))) for q, k, v in qkv] if flash.function else []

    def torch_own(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    _heads_first(q), _heads_first(k), _heads_first(v), is_causal=True, scale=scale, enable_gqa=True
                )

        return call

    num_bytes = 2 * spec.head_dim * spec.kv_heads * DTYPE.itemsize * (spec.group * tokens + spec.length)
    peers = [
        Peer(name=name, launches=[torch_own(backend, *one) for one in qkv], num_bytes=num_bytes)
        for name, backend in backends.items()
    ]
    if flash.function is not None:
        function, arguments = flash.function, flash.arguments
        ends, key_ends = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, spec.length))

        def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
            return lambda: function(
                q, k, v, max_seqlen_q=tokens, cu_seqlens_q=ends, max_seqlen_k=spec.length, cu_seqlens_k=key_ends,
                softmax_scale=scale, causal=True, **arguments,
            )  # fmt: skip

        peers.append(Peer(name=flash.name, launches=[dense(*one) for one in qkv], num_bytes=num_bytes))
    return peers


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x[None].transpose(1, 2)
