"""The weights of decode_linear: every value that is stored, scales of any size, and rows that lie anywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastdms.ops import decode_linear
from fastdms.ops.decode_linear import vector_kernel
from fastdms.ops.decode_linear.kernel import prefetch_bytes, tile
from fastdms.ops.int4 import GROUPS, INT4, dequantise_int4, quantise_int4
from tests.ops.harness import BACKENDS, DEVICE
from tests.ops.linears import (
    FP8,
    GPU,
    assert_right,
    define_linear,
    exact_weight,
    make_inputs,
    run_linear,
    to_device,
)
from tests.tolerance import LOGITS_RELATIVE, rounding_band


def test_words_of_a_buffer_that_begins_anywhere() -> None:
    foreign = torch.frombuffer(bytearray(64), dtype=torch.float16, offset=2, count=20)
    assert not vector_kernel.fits(foreign[1:9])
    assert not vector_kernel.fits(foreign[:8])
    assert vector_kernel.fits(torch.zeros(20, dtype=torch.float16)[2:10], None)


@GPU
def test_weights_that_begin_anywhere() -> None:
    """Rows that no vector load and no prefetch fits, at the end of an allocation too."""
    for rows, (k, offset) in itertools.product((1, 4), ((64, 1), (63, 0), (72, 8), (8, 0), (24, 4))):
        inputs = make_inputs(rows, 50, k, torch.bfloat16, norm=True)
        buffer = torch.empty(50 * k + offset, dtype=torch.bfloat16, device=DEVICE)
        moved = to_device(DEVICE, inputs)
        moved["weight"] = buffer[offset:].view(50, k)
        moved["weight"].copy_(inputs["weight"])
        assert_right(decode_linear(**moved).cpu(), inputs)


def test_prefetches_lie_within_their_rows() -> None:
    sizes = ((1, 8), (8, 24), (2048, 2048), (2048, 8192), (8192, 2048), (128_256, 2048), (151_936, 4096))
    for (n, k), dtype, swiglu in itertools.product(sizes, (torch.float32, torch.bfloat16, FP8, INT4), (False, True)):
        int4 = dtype == INT4
        if int4 and k % GROUPS[-1]:
            continue
        weight = torch.empty(n, k // 8 if int4 else k, dtype=dtype, device="meta")
        cut = tile(n, k, 4, swiglu, GROUPS[-1]) if int4 else tile(n, k, 8 * weight.element_size(), swiglu)
        rows, row_bytes = cut.channels * (2 if swiglu else 1), weight.shape[1] * weight.element_size()
        share = prefetch_bytes(weight, cut, swiglu)
        if row_bytes % 16:
            assert share == 0
            continue
        assert 16 <= share <= row_bytes
        assert share % 16 == 0
        assert 32 * cut.warps % rows == 0, "each row is asked for by as many threads"


@GPU
@pytest.mark.parametrize("rows", [1, 3])
def test_more_weights_than_32_bits_count(rows: int) -> None:
    n, k = 2**31 // 16384 + 64, 16384
    inputs = make_inputs(rows, 64, k, torch.bfloat16, FP8)
    large = to_device(DEVICE, inputs)
    large["weight"] = torch.zeros(n, k, dtype=torch.uint8, device=DEVICE).view(FP8)
    large["weight"][-64:].view(torch.uint8).copy_(inputs["weight"].view(torch.uint8))
    large["scale"] = F.pad(large["scale"], (n - 64, 0))
    out = decode_linear(**large).cpu()
    assert_right(out[:, -64:], inputs)
    assert not out[:, :-64].any()


@pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_fp8_weight(rows: int, dtype: torch.dtype, backend: str) -> None:
    """All but NaN, subnormals among them, exactly."""
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    stored = stored[~stored.float().isnan()]
    weight = torch.zeros(len(stored), 80)
    weight[:, 70] = stored.float()
    x = torch.zeros(rows, 80, dtype=dtype)
    x[:, 70] = 1.0
    inputs = {"x": x, "weight": weight.to(FP8), "scale": torch.full((len(stored),), 0.5), "fp32_out": True}
    assert torch.equal(run_linear(backend, inputs)[0], stored.float() / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("fp32_out", [False, True])
def test_every_int4_weight_in_every_place(fp32_out: bool, rows: int, dtype: torch.dtype, backend: str) -> None:
    """Exactly; the known bits of a word, by hand."""
    words = torch.tensor([[0x76543210, -0x01234568, 0, -1]], dtype=torch.int32)  # -0x01234568 is 0xfedcba98
    expected = [*range(-8, 8), *([-8] * 8), *([7] * 8)]
    assert dequantise_int4(words, torch.ones(1, 1), torch.float32).tolist() == [expected]
    scale = torch.tensor([[0.5], [-3.0]])
    for place, value in enumerate(expected):
        x = torch.zeros(rows, 32, dtype=dtype)
        x[:, place] = 1.0
        weight = words.expand(2, 4).contiguous()
        out = run_linear(backend, {"x": x, "weight": weight, "scale": scale, "fp32_out": fp32_out})
        assert out.tolist() == [[value * 0.5, value * -3.0]] * rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fp32_out", [False, True])
def test_int4_groups_have_scales_of_any_size(fp32_out: bool, group: int, rows: int, backend: str) -> None:
    """Of any dtype, too, those that fp16 can't hold among them where it need not hold the result."""
    inputs = make_inputs(rows, 9, 384, torch.float16)
    for dtype, largest in ((torch.float32, 30), (torch.bfloat16, 30), (torch.float16, 4)):
        if not fp32_out:
            largest = min(largest, 3)
        packed, scale = quantise_int4(inputs["weight"], group)
        sizes = 10.0 ** torch.linspace(-largest, largest, scale.shape[1])
        case = inputs | {"weight": packed, "scale": (scale.float() * sizes).to(dtype), "fp32_out": fp32_out}
        case["scale"][0] = 0.0
        out = run_linear(backend, case)
        assert_right(out, case)
        assert not out[:, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float16, 0), (torch.float16, -10), *(pytest.param(torch.bfloat16, p, marks=GPU) for p in (-110, 0, 100))],
)
def test_one_row_by_int4_has_14_bits_of_the_largest_of_32(dtype: torch.dtype, power: int, backend: str) -> None:
    """Whatever the largest is; what it leaves to the others shows where its own weight is 0."""
    inputs = make_inputs(1, 40, 256, torch.float16, INT4)
    x = inputs["x"].float()
    x[0, 37] = 3000.0
    inputs["weight"][:, 4] = inputs["weight"][:, 4] & ~(15 << 20) | 8 << 20  # the weight of column 37 is 0
    inputs["x"] = (x * 2.0**power).to(dtype)
    out = run_linear(backend, inputs).double()
    oracle = define_linear(inputs)
    blocks = inputs["x"].double().abs().view(1, 8, 32)
    weight = exact_weight(inputs["weight"], inputs["scale"]).abs().view(40, 8, 32)
    lost = 2.0**-14 * (blocks.amax(-1) @ weight.sum(-1).T)
    assert bool(((out - oracle).abs() <= rounding_band(oracle, dtype) + LOGITS_RELATIVE * oracle.abs() + lost).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_by_int4_keeps_every_bit_that_it_says(backend: str) -> None:
    """Odd multiples of 2^-13 beside one just below 2, each by a channel of its own."""
    x = (2.0 * torch.arange(32) + 1.0) * 2.0**-13
    x[5] = 2.0 - 2.0**-10
    weight = torch.full((32, 32), 8)  # 0, and 1 on the diagonal
    weight += torch.eye(32, dtype=torch.int64)
    words = (weight.view(32, 4, 8) << 4 * torch.arange(8)).sum(-1).to(torch.uint32).view(torch.int32)
    inputs = {"x": x[None].to(torch.float16), "weight": words, "scale": torch.ones(32, 1)}
    assert torch.equal(run_linear(backend, inputs)[0], inputs["x"][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_row_by_int4_that_is_not_finite(value: float, backend: str) -> None:
    inputs = make_inputs(1, 40, 256, torch.float16, INT4)
    inputs["x"][0, 200] = value
    assert not run_linear(backend, inputs).isfinite().any()


@pytest.mark.parametrize("swiglu", [False, True])
def test_int4_weights_keep_the_schema(swiglu: bool) -> None:
    inputs = to_device(DEVICE, make_inputs(2, 6, 64, torch.float32, INT4, norm=True, swiglu=swiglu))
    order = ("x", "weight", "scale", "bias", "norm", "norm_eps", "residual", "swiglu", "fp32_out")
    torch.library.opcheck(torch.ops.fastdms.decode_linear.default, tuple(inputs[name] for name in order))
