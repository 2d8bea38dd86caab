"""dense_attention: causal attention of a chunk over a whole history, which it extends."""

from __future__ import annotations

import pytest
import torch

from fastdms.ops import dense_attention
from tests.ops.definition import attend
from tests.ops.harness import BACKENDS, HEAD_SHAPES, KERNEL_DTYPES, assert_close_to_definition, on, split_heads
from tests.tolerance import assert_within_error_budget

_SCALE = 0.2


def _run(
    backend: str, fused: torch.Tensor, num_kv_heads: int, chunks: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of all chunks and the history afterwards, which is NaN wherever nothing was written."""
    with on(backend) as device:
        shape = (fused.shape[0] + 70, num_kv_heads, fused.shape[2])
        k_history = torch.full(shape, torch.nan, dtype=fused.dtype, device=device)
        v_history = k_history.clone()
        out, start = [], 0
        for tokens in chunks:
            q, k, v = split_heads(fused[start : start + tokens].to(device), num_kv_heads)
            positions = torch.arange(start, start + tokens, dtype=torch.int32, device=device)
            out.append(
                dense_attention(q, k, v, positions=positions, k_history=k_history, v_history=v_history, sm_scale=_SCALE)
            )
            start += tokens
    return torch.cat(out).cpu(), k_history.cpu(), v_history.cpu()


def _oracle(fused: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    q, k, v = split_heads(fused.double(), num_kv_heads)
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    for t in range(q.shape[0]):
        for head in range(num_kv_heads):
            own = slice(head * group, (head + 1) * group)
            out[t, own] = attend(q[t, own], list(k[: t + 1, head]), list(v[: t + 1, head]), _SCALE)
    return out


def _compare(fused: torch.Tensor, num_kv_heads: int, chunks: list[int]) -> None:
    oracle = _oracle(fused, num_kv_heads)
    results = {backend: _run(backend, fused, num_kv_heads, chunks) for backend in BACKENDS}
    assert_close_to_definition(results["reference"][0], oracle)
    assert_within_error_budget(results["kernel"][0], results["reference"][0], oracle)
    _, k, v = split_heads(fused, num_kv_heads)
    tokens = fused.shape[0]
    for _, k_history, v_history in results.values():
        assert torch.equal(k_history[:tokens], k)
        assert torch.equal(v_history[:tokens], v)
        assert k_history[tokens:].isnan().all()
        assert v_history[tokens:].isnan().all()


@pytest.mark.parametrize("chunks", [[1, 1, 1], [63, 1, 1], [64, 2], [65, 64], [130], [7, 0, 60]], ids=str)
def test_chunks_around_the_tiles(chunks: list[int]) -> None:
    _compare(torch.randn(sum(chunks), 4, 16), 1, chunks)


@pytest.mark.parametrize(("dtype", "kv_dtype"), KERNEL_DTYPES[:4])
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_shapes_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    del kv_dtype
    num_kv_heads, group, head_dim = heads
    _compare(torch.randn(9, num_kv_heads * (group + 2), head_dim).to(dtype), num_kv_heads, [5, 4])


def test_reference_in_bf16() -> None:
    fused = torch.randn(20, 8, 32).to(torch.bfloat16)
    assert_close_to_definition(_run("reference", fused, 2, [13, 7])[0], _oracle(fused, 2))


def test_bad_input_is_named() -> None:
    q, k = torch.zeros(3, 4, 16), torch.zeros(3, 2, 16)
    positions, history = torch.arange(3, dtype=torch.int32), torch.zeros(9, 2, 16)
    for change, message in (
        ({"q": q[:2]}, "q, k, v"),
        ({"q": q[:, :3]}, "heads"),
        ({"v": k[:2]}, "q, k, v"),
        ({"positions": positions.long()}, "positions"),
        ({"positions": positions[:2]}, "positions"),
        ({"k_history": history.half()}, "history"),
        ({"k_history": history[:, :1]}, "history"),
        ({"k_history": history.repeat(2, 1, 1)[::2], "v_history": history.repeat(2, 1, 1)[::2]}, "contiguous"),
    ):
        good = {"q": q, "k": k, "v": k, "positions": positions, "k_history": history, "v_history": history}
        with pytest.raises(ValueError, match=message):
            dense_attention(**{**good, **change}, sm_scale=1.0)
