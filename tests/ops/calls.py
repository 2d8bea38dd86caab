"""One sample call of every op through its public function, for tests that treat all ops alike."""

from __future__ import annotations

from typing import Any

import torch

import fastdms.ops as ops
from fastdms.ops.span_cache import SpanCache
from tests.ops.harness import GuardedCache, split_heads
from tests.ops.rig import Rig

_KV_HEADS, _GROUP, _DIM, _TOKENS = 2, 3, 16, 9  # tokens that each row of the cache holds already
_WITHOUT_CACHE = ("decode_linear", "dense_attention", "dequantise", "prefill_rope", "sample", "soft_attention")


class Call:
    """``inputs`` are fresh tensors on ``device``; the same ``op`` and ``size`` give the same shapes for any ``seed``.

    size: batch entries or chunk tokens. ``run`` takes the tensors explicitly, so that it can be compiled and captured.
    """

    def __init__(
        self, op: str, device: torch.device, *, seed: int = 0, size: int = 3, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        rig = Rig("reference", rows=6, page_size=4, window=3, heads=(_KV_HEADS, _GROUP, _DIM), shift=1, seed=seed,
                  kv_dtype=kv_dtype, num_pages=96)  # fmt: skip
        rig.prefill([(row, _TOKENS) for row in range(6)])
        self.op, self.cache = op, rig.cache.copy_to(device)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        q, k, v = split_heads(normal(size, (_GROUP + 2) * _KV_HEADS, _DIM), _KV_HEADS)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        rows = torch.randperm(6, generator=generator)[:size].int().to(device)
        tables = {"cos": rig.cos.to(device), "sin": rig.sin.to(device)}
        batch = {"positions": torch.full((size,), _TOKENS, **ints), "rows": rows}
        chunk = {
            "positions": torch.arange(_TOKENS, _TOKENS + size, **ints),
            "rows": rows[:1],
            "chunk_indptr": torch.tensor([0, size - 1], **ints),  # the last token is padding
        }
        flags = normal(size, _KV_HEADS) > 0
        history = {"k_history": normal(40, _KV_HEADS, _DIM), "v_history": normal(40, _KV_HEADS, _DIM)}
        weights = {"alpha": normal(size, _KV_HEADS), "q_norm": normal(_DIM), "k_norm": normal(_DIM)}
        # Two rows of ``size`` tokens, as heads that lie token by token.
        soft_q, soft_k, soft_v = (
            normal(2, size, (_GROUP + 2) * _KV_HEADS, _DIM)
            .transpose(1, 2)
            .split((_GROUP * _KV_HEADS, _KV_HEADS, _KV_HEADS), 1)
        )
        self.inputs: dict[str, torch.Tensor] = {
            "decode_append": {"q": q, "k": k, "v": v, **weights, **tables, **batch},
            "decode_attention": {"q": q, **batch},
            "decode_linear": {
                "x": normal(size, 40), "weight": normal(24, 40), "bias": normal(24), "norm": normal(40),
                "residual": normal(size, 12),
            },
            "prefill_rope": {"q": q, "k": k, **weights, **tables, "positions": chunk["positions"]},
            "prefill_append": {"k": k, "v": v, "decisions": flags, **chunk},
            "prefill_attention": {"q": q, "k": k, "v": v, "decisions": flags, **chunk},
            "dense_attention": {"q": q, "k": k, "v": v, **history},
            "soft_attention": {"q": soft_q, "k": soft_k, "v": soft_v, "log_keep": -normal(2, _KV_HEADS, size).abs()},
            "dequantise": {
                "weight": torch.randint(-(2**31), 2**31, (size, 12), generator=generator).int().to(device),
                "scale": normal(size, 3),
            },
            "release": {"rows": rows},
            "sample": {
                "logits": normal(size, 50), "temperature": normal(size).abs(), "top_p": normal(size).sigmoid(),
                "min_p": normal(size).sigmoid() * 0.1, "top_k": torch.arange(size, **ints) * 4,
                "seeds": torch.arange(size, device=device) + seed, "positions": torch.arange(size, **ints),
                "end_ids": torch.arange(2 * size, **ints).view(size, 2), "banned_until": torch.ones(size, **ints),
                "penalties": normal(size, 3).sigmoid(), "count_rows": rows - 1,
                "counts": (normal(6, 50) * 2).to(torch.int16),
            },
        }[op]  # fmt: skip

    def state(self) -> tuple[torch.Tensor, ...]:
        """What ``run`` takes as its second argument."""
        c = self.cache
        if self.op == "release":
            return (c.page_table, c.live_len, c.free_pages, c.num_free, c.starved)
        return c.layer(0)

    def run(self, inputs: dict[str, torch.Tensor], state: tuple[torch.Tensor, ...]) -> Any:
        function = getattr(ops, self.op)
        if self.op == "release":
            names = ("page_table", "live_len", "free_pages", "num_free", "starved")
            return function(**inputs, **dict(zip(names, state, strict=True)), page_size=4)
        options: dict[str, Any] = {}
        if self.op not in _WITHOUT_CACHE:
            options["cache"] = SpanCache(*state)
        if self.op == "dense_attention":
            options["start"] = _TOKENS
        if self.op == "dequantise":
            options["dtype"] = torch.float16
        if self.op == "decode_linear":
            options |= {"norm_eps": 1e-5, "swiglu": True}
        if self.op == "soft_attention":
            options["window_tokens"] = 1
        if self.op.endswith("attention"):
            options["sm_scale"] = 0.25
        if self.op in ("decode_append", "prefill_append", "prefill_attention"):
            options["shift"] = 1
        if self.op in ("decode_append", "prefill_rope"):
            options |= {"decision": (1.0, 0.05), "zero_borrowed": "pre_and_post_rope", "norm_eps": 1e-5}
        return function(**inputs, **options)

    def copy_from(self, other: Call) -> None:
        """Take over all tensors' contents, in place."""
        for mine, theirs in zip(self.inputs.values(), other.inputs.values(), strict=True):
            mine.copy_(theirs)
        copy_state(self.cache, other.cache)


def copy_state(cache: GuardedCache, other: GuardedCache) -> None:
    """Overwrite ``cache`` by ``other``, in place."""
    for mine, theirs in zip(cache.layer(0), other.layer(0), strict=True):
        mine.copy_(theirs)
