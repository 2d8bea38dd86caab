"""How keys and values enter pages: fp8 with one scale per token and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdms.ops import decode_append, prefill_append
from fastdms.ops.quantise import FP8_MAX, quantise
from tests.ops.harness import CPU, DEVICE, make_cache
from tests.ops.rig import FLAG_NONE

EDGES = [447.0, 448.0, 449.0, 464.0, 465.0, 1e-30, 1e30, 600.0]


def _dequantised(x: torch.Tensor) -> torch.Tensor:
    data, scale = quantise(x, torch.float8_e4m3fn)
    assert scale is not None
    return data.float() * scale.float().unsqueeze(-1)


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), min_size=2, max_size=8),
    st.sampled_from([1.0, 1e-20, 1e-36]),
)
def test_fp8_is_close_for_any_numbers(values: list[float], factor: float) -> None:
    """Half a step of the larger of the value's own binade and the smallest one, relative to the token's largest."""
    x = torch.tensor([values]) * factor
    largest = float(x.abs().max())
    error = (_dequantised(x).double() - x.double()).abs()
    # 1/16 is half of e4m3's relative step; rounding the scale to bf16 can clamp the largest by 2^-8.
    allowed = x.double().abs() / 16 + max(largest, 448 * 2.0**-100) / FP8_MAX * 2.0**-9
    assert bool((error <= allowed).all())


@pytest.mark.parametrize("value", EDGES)
def test_fp8_never_saturates_into_nan(value: float) -> None:
    """Values around fp8's largest, as the largest of their token and beside a larger one."""
    for others in (0.0, 1.0, -value, 2 * value):
        x = torch.tensor([[value, others, -1.0, 0.5]])
        assert _dequantised(x).isfinite().all()


def test_an_outlier_costs_the_other_channels_little() -> None:
    """Up to where fp8's exponents end; from there on the error grows with the outlier, without a cliff."""
    x = torch.randn(64, 128)
    others = torch.arange(128) != 7
    errors = {}
    for outlier in (1.0, 30.0, 600.0, 3e4, 3e5):
        x[:, 7] = outlier
        errors[outlier] = float((_dequantised(x) - x)[:, others].square().mean().sqrt())
    assert max(errors[30.0], errors[600.0]) < 1.1 * errors[1.0]
    assert errors[3e4] < 2 * errors[1.0]
    assert errors[3e5] < 20 * errors[1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_stored_bytes_are_those_of_the_cpu(prefill: bool) -> None:
    """RoPE is the identity, so that both store the very same numbers."""
    tokens = len(EDGES) + 20
    k = torch.randn(tokens, 2, 32)
    k[: len(EDGES), :, 3] = torch.tensor(EDGES)[:, None]
    k[len(EDGES) : len(EDGES) + 4, 0] *= torch.tensor([30.0, 600.0, 1e-6, 0.0])[:, None]
    k[-1] = 0.0625 * torch.arange(64).view(2, 32)  # many ties
    v = -k.flip(0)
    caches = []
    for device in (CPU, DEVICE):
        cache = make_cache(
            device, head_dim=32, num_rows=tokens, kv_dtype=torch.float8_e4m3fn, page_size=1, max_context=1
        )
        rows = torch.arange(tokens, dtype=torch.int32, device=device)
        zeros = torch.zeros_like(rows)
        keys, values = k.to(device), v.to(device)
        if prefill:
            prefill_append(
                keys, values, torch.zeros(tokens, 2, dtype=torch.bool, device=device), cache.layer(0), positions=zeros,
                rows=rows, chunk_indptr=torch.arange(tokens + 1, dtype=torch.int32, device=device), shift=0,
            )  # fmt: skip
        else:
            decode_append(
                keys, keys, values, cache.layer(0), positions=zeros, rows=rows,
                cos=torch.ones(1, 16, device=device), sin=torch.zeros(1, 16, device=device), decision=FLAG_NONE,
                shift=0, zero_borrowed="none",
            )  # fmt: skip
        caches.append(cache.copy_to(CPU))
    expected, actual = caches
    for name in ("k", "v"):
        for part in ("pages", "scales"):
            mine, other = (getattr(cache, f"{name}_{part}").view(torch.uint8) for cache in (actual, expected))
            at, from_ = (cache.page_table[0, :, :, 0].long() for cache in (actual, expected))
            assert torch.equal(mine[at], other[from_]), f"{name}_{part}"
