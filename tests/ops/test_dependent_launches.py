"""A decode step's ops right behind each other on a GPU, where each begins before the one ahead of it has ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdms.ops import decode_append, decode_attention, decode_linear, sample
from tests.ops.harness import DEVICE, GuardedCache, make_cache, split_heads
from tests.ops.rig import FLAG_HALF

pytestmark = pytest.mark.gpu

LAYERS, HEADS, KV_HEADS, STEPS = 6, 8, 2, 150


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_step_equals_its_ops_one_by_one(
    dim: int, num_rows: int, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, while spans grow over tiles and pages; the graph's step against one that waits after each op."""
    # Poisoning fills what an op allocates, by a kernel that would come between it and the op ahead.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_empty.__wrapped__)  # type: ignore[attr-defined]
    hidden, dtype = HEADS * dim, torch.bfloat16
    layers = [
        (torch.randn((HEADS + 2 * KV_HEADS) * dim, hidden, device=DEVICE).div(hidden**0.5).to(dtype),
         torch.randn(hidden, hidden, device=DEVICE).div(hidden**0.5).to(dtype))
        for _ in range(LAYERS)
    ]  # fmt: skip
    norm = torch.rand(hidden, device=DEVICE).add(0.5).to(dtype)
    angles = torch.arange(STEPS, device=DEVICE)[:, None] / 100 ** torch.linspace(0, 1, dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    sizes = {"num_layers": LAYERS, "num_rows": num_rows, "num_kv_heads": KV_HEADS, "head_dim": dim, "window_tokens": 7,
             "page_size": 64, "max_context": STEPS, "num_pages": 200, "kv_dtype": torch.float8_e4m3fn}  # fmt: skip
    chained, apart = (make_cache(DEVICE, **sizes, seed=1) for _ in range(2))
    rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    positions = torch.full_like(rows, -1)  # all padding: compiles, and leaves the spans alone

    def step(cache: GuardedCache, x: torch.Tensor, wait: bool) -> torch.Tensor:
        def waited(out: torch.Tensor) -> torch.Tensor:
            if wait:
                torch.cuda.synchronize()
            return out

        for i, (qkv, o) in enumerate(layers):
            fused = waited(decode_linear(x, qkv, norm=norm, norm_eps=1e-5))
            q, k, v = split_heads(fused.view(num_rows, -1, dim), KV_HEADS)
            q = waited(
                decode_append(
                    q, k, v, cache.layer(i), positions=positions, rows=rows, cos=cos, sin=sin, decision=FLAG_HALF,
                    shift=0, zero_borrowed="none",
                )
            )  # fmt: skip
            attended = waited(decode_attention(q, cache.layer(i), positions=positions, rows=rows, sm_scale=dim**-0.5))
            x = waited(decode_linear(attended.flatten(1), o, residual=x))
        return x

    static = torch.zeros(num_rows, hidden, dtype=dtype, device=DEVICE)
    step(chained, static, wait=True)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(chained, static, wait=False)
    for position in range(STEPS):
        static.copy_(torch.randn(num_rows, hidden, device=DEVICE))
        positions.fill_(position)
        torch.cuda.synchronize()
        expected = step(apart, static, wait=True)
        if captured:
            graph.replay()
        else:
            out = step(chained, static, wait=False)
        assert torch.equal(out, expected), f"position {position}"
        assert torch.equal(chained.live_len, apart.live_len)
    assert int(chained.live_len.max()) > 64


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_sampling_right_behind_the_head(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows and rows that draw; the next head writes its logits where the last sampling had its scratch."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_empty.__wrapped__)  # type: ignore[attr-defined]
    hidden, vocab, rows = 64, 40_000, 4
    head = torch.randn(vocab, hidden, device=DEVICE)

    def ints(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    settings = {
        "temperature": torch.tensor([0.0, 1.0, 0.0, 0.7], device=DEVICE),
        "top_k": ints([0, 0, 0, 50]),
        "top_p": torch.ones(rows, device=DEVICE),
        "min_p": torch.zeros(rows, device=DEVICE),
        "seeds": torch.arange(rows, device=DEVICE),
        "positions": ints([0, 1, 2, 3]),
        "end_ids": ints([[7, 4096], [7, 4096], [-1, -1], [0, 39_999]]),
        "banned_until": ints([9] * rows),
        "penalties": torch.tensor([[0.1, 0.2, 1.2]], device=DEVICE).repeat(rows, 1),
        "count_rows": ints([-1, 0, -1, 1]),
        "counts": torch.zeros(2, vocab, dtype=torch.int16, device=DEVICE),
    }

    def run(x: torch.Tensor, wait: bool) -> list[torch.Tensor]:
        tokens = []
        settings["counts"].zero_()
        for step in x:
            logits = decode_linear(step, head, fp32_out=True)
            if wait:
                torch.cuda.synchronize()
            tokens.append(sample(logits, **settings)[0])
            if wait:
                torch.cuda.synchronize()
                allowed = logits[0].index_fill(0, settings["end_ids"][0].long(), -torch.inf)
                assert tokens[-1][[0, 2]].tolist() == [int(allowed.argmax()), int(logits[2].argmax())]
        return tokens

    static = torch.randn(STEPS, rows, hidden, device=DEVICE)
    run(static[:1], wait=True)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(static, wait=False)
    for _ in range(5):
        static.normal_()
        torch.cuda.synchronize()
        expected = run(static, wait=True)
        if captured:
            graph.replay()
        else:
            out = run(static, wait=False)
        assert torch.equal(torch.stack(out), torch.stack(expected))
