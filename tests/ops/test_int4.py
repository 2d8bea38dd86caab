"""int4 weights: what is packed comes back, and what rounding to them costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdms.ops import decode_linear
from fastdms.ops.int4 import GROUPS, dequantise_int4, pack_int4, quantise_int4


@given(rows=st.integers(1, 5), words=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_packing_goes_back_and_forth(rows: int, words: int, seed: int) -> None:
    q = torch.randint(-8, 8, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, words))
    assert dequantise_int4(packed, torch.ones(rows, 1), torch.float32).equal(q.float())


def test_a_word_by_hand() -> None:
    """The first weight lies in the lowest bits, -8 is 0 and 7 is 15, as compressed-tensors packs them."""
    assert pack_int4(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]])).tolist() == [[0x76543210]]
    assert pack_int4(torch.tensor([[7, 0, 0, 0, 0, 0, 0, -8]])).tolist() == [[0x0888888F]]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_nearest(dtype: torch.dtype, group: int) -> None:
    """Half a step, or what the largest opposite weight is clamped by; the scale's own rounding besides."""
    weight = (torch.randn(7, 256) * 10.0 ** torch.linspace(-3, 3, 7)[:, None]).to(dtype)
    packed, scale = quantise_int4(weight, group)
    assert (packed.shape, scale.shape, scale.dtype) == ((7, 32), (7, 256 // group), torch.bfloat16)
    groups = weight.float().unflatten(1, (-1, group))
    step = scale.float().abs()[..., None]
    assert bool((step * 8 - groups.abs().amax(-1, keepdim=True)).abs().le(step * 8 / 256).all())
    error = dequantise_int4(packed, scale, torch.float32).view_as(groups) - groups
    clamped = groups / scale.float()[..., None] > 7.5
    assert bool((error.abs() <= step * torch.where(clamped, 1.04, 0.54)).all())


def test_what_is_dequantised_is_rounded_once() -> None:
    packed, scale = quantise_int4(torch.randn(20, 128), 32)
    exact = dequantise_int4(packed, scale.double(), torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for stored in (torch.float32, torch.bfloat16):
            assert dequantise_int4(packed, scale.to(stored), dtype).equal(exact.to(dtype))


def test_zeros_and_the_smallest_stay() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e-45  # smaller than any scale
    weight[2, :32] = 3e38
    packed, scale = quantise_int4(weight, 32)
    stored = dequantise_int4(packed, scale, torch.float32)
    assert not stored[:2].any()
    assert not stored[2, 32:].any()
    assert stored[2, :32].allclose(torch.tensor(3e38), rtol=0.005)


@pytest.mark.parametrize(
    ("columns", "weight", "message"),
    [(64, torch.zeros(6, 8, dtype=torch.int64), "weight must be .* int4 in int32, got torch.int64"),
     (64, torch.zeros(6, 32, dtype=torch.uint8), "weight must be .* int4 in int32, got torch.uint8"),
     (40, torch.zeros(6, 5, dtype=torch.int32), "groups of 128, 64 or 32 of a row, and a row has 40")],
)  # fmt: skip
def test_what_is_wrong_with_a_weight_is_named(columns: int, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_linear(torch.zeros(1, columns), weight, scale=torch.ones(6, 1))
