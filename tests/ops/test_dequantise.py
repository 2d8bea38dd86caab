"""dequantise: every weight times its scale, bit for bit, of any shape; what doesn't fit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.ops import dequantise
from fastdms.ops.int4 import GROUPS, INT4, pack_int4
from tests.ops.harness import BACKENDS, DEVICE, on
from tests.ops.linears import FP8, GPU, exact_weight

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # by the interpreter
# The interpreter reads bf16, and numbers in fp8, as they are; what it rounds to them is wrong.
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=GPU),
]
# Of an int4 weight's scale.
SCALES = [torch.float32, torch.float16, torch.bfloat16]


def _fp8(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any finite bits, and scales of any size."""
    weight = torch.randint(0, 127, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))
    return weight.to(torch.uint8).view(FP8), torch.randn(rows) * 10.0 ** torch.randint(-40, 35, (rows,))


def _int4(rows: int, columns: int, group: int, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bits, and scales of any size that is finite in ``stored``."""
    largest = 4 if stored == torch.float16 else 35
    scale = torch.randn(rows, columns // group) * 10.0 ** torch.randint(-8, largest, (rows, columns // group))
    return torch.randint(-(2**31), 2**31, (rows, columns // 8)).int(), scale.to(stored)


def _check(backend: str, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to the product in fp64, rounded to fp32 and then to ``dtype``, down to the sign of a zero."""
    with on(backend) as device:
        out = dequantise(weight.to(device), scale.to(device), dtype).cpu()
    expected = exact_weight(weight, scale).float().to(dtype)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert torch.equal(out.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(out[~out.isnan()].view(bits), expected[~out.isnan()].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(rows=st.integers(1, 20), columns=st.one_of(st.integers(1, 70), st.integers(1000, 2100)), seed=st.integers(0, 99))
def test_fp8_of_any_shape(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, scale = _fp8(rows, columns)
    for backend in BACKENDS:
        _check(backend, weight, scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 20), groups=st.one_of(st.integers(1, 5), st.integers(15, 35)), group=st.sampled_from(GROUPS),
    stored=st.sampled_from(SCALES), seed=st.integers(0, 99),
)  # fmt: skip
def test_int4_of_any_shape(
    dtype: torch.dtype, rows: int, groups: int, group: int, stored: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, scale = _int4(rows, groups * group, group, stored)
    for backend in BACKENDS:
        _check(backend, weight, scale, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_value(dtype: torch.dtype, backend: str) -> None:
    """By scales that leave them as they are, round them, and take them beyond fp16 and fp32."""
    values = torch.arange(256).to(torch.uint8).view(FP8)
    weight = values[values.float().isfinite()].repeat(6, 1)
    assert weight.shape[1] == 254
    _check(backend, weight, torch.tensor([1.0, -1.0, 1 / 3, 2.0**-20, 3e38, 0.0]), dtype)


@pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=GPU)])
@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_what_is_not_a_number_stays(dtype: torch.dtype, backend: str) -> None:
    """Of both signs; Triton's interpreter takes them for 480."""
    weight = torch.tensor([[127, 1, 255, 126]], dtype=torch.uint8).view(FP8)
    _check(backend, weight, torch.ones(1), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", SCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_int4_value_in_every_place(dtype: torch.dtype, stored: torch.dtype, backend: str) -> None:
    q = (torch.arange(16)[:, None] + torch.arange(64)) % 16 - 8
    scale = torch.tensor([[1.0, -1 / 3], [2.0**-14, 6e4]]).repeat(8, 1).to(stored)
    _check(backend, pack_int4(q), scale, dtype)


@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_reference_in_every_dtype(dtype: torch.dtype) -> None:
    _check("reference", *_fp8(9, 200), dtype)
    for stored in SCALES:
        _check("reference", *_int4(9, 256, 64, stored), dtype)


def test_some_rows_of_a_weight() -> None:
    """They begin anywhere, at an odd address too."""
    weight, scale = _fp8(10, 33)
    for backend in BACKENDS:
        with on(backend) as device:
            some = dequantise(weight.to(device)[5:], scale.to(device)[5:], torch.float32)
            assert torch.equal(some, dequantise(weight.to(device), scale.to(device), torch.float32)[5:])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fp8_compiles_without_a_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dequantise, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        weight, scale = (x.to(DEVICE) for x in _fp8(rows, 40))
        assert torch.equal(compiled(weight, scale, torch.float16), dequantise(weight, scale, torch.float16))


def test_opcheck_in_fp8() -> None:
    """All but ``test_schema``, which can't compare fp8."""
    weight, scale = (x.to(DEVICE) for x in _fp8(3, 40))
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastdms.dequantise.default, (weight, scale, torch.float16), test_utils=tests)


@pytest.mark.gpu
def test_fp8_is_captured() -> None:
    weight, scale = (x.to(DEVICE) for x in _fp8(70, 3000))
    dequantise(weight, scale, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequantise(weight, scale, torch.bfloat16)
    for x, other in zip((weight, scale), _fp8(70, 3000), strict=True):
        x.copy_(other)
    graph.replay()
    assert torch.equal(out, dequantise(weight, scale, torch.bfloat16))


_FP8 = torch.zeros(6, 64).to(FP8)
_WORDS = torch.zeros(6, 8, dtype=INT4)
_ONES = torch.ones(6)


@pytest.mark.parametrize(
    ("weight", "scale", "dtype", "message"),
    [
        (_FP8, _ONES, torch.float64, "dtype must be fp32, fp16 or bf16, got torch.float64"),
        (_FP8, _ONES, torch.int32, "dtype must be fp32, fp16 or bf16, got torch.int32"),
        (_FP8.bfloat16(), _ONES, torch.float32, "weight must be float8_e4m3fn or int4 in int32, got torch.bfloat16"),
        (_FP8.to(torch.float8_e5m2), _ONES, torch.float32, "weight must be float8_e4m3fn or .* got torch.float8_e5m2"),
        (_WORDS.long(), torch.ones(6, 1), torch.float32, "weight must be .* int4 in int32, got torch.int64"),
        (_FP8[0], _ONES, torch.float32, r"weight must be contiguous \[N, K\].* got \(64,\)"),
        (_FP8[None], _ONES, torch.float32, r"weight must be contiguous .* got \(1, 6, 64\)"),
        (_FP8[:, :32], _ONES, torch.float32, r"weight must be contiguous .* got \(6, 32\)"),
        (_FP8.T, torch.ones(64), torch.float32, r"weight must be contiguous .* got \(64, 6\)"),
        (_FP8[:0], _ONES[:0], torch.float32, r"not empty, got \(0, 64\)"),
        (_FP8[:, :0], _ONES, torch.float32, r"not empty, got \(6, 0\)"),
        (
            _FP8,
            _ONES.bfloat16(),
            torch.float32,
            r"scale of an fp8 weight must be torch.float32 \(6,\) .* got torch.bfloat16",
        ),
        (_FP8, _ONES[:5], torch.float32, r"scale of an fp8 weight must be .* \(6,\) .* got torch.float32 \(5,\)"),
        (_FP8, _ONES[:, None], torch.float32, r"scale of an fp8 weight must be .* got torch.float32 \(6, 1\)"),
        (_FP8, torch.ones(6, 2)[:, 0], torch.float32, "scale of an fp8 weight must be .* with unit stride"),
        (_WORDS, _ONES, torch.float32, r"scale of int4 weights must be .* \[\(6, 1\), \(6, 2\)\] .* got .* \(6,\)"),
        (_WORDS, torch.ones(6, 4), torch.float32, r"scale of int4 weights must be .* got torch.float32 \(6, 4\)"),
        (_WORDS, torch.ones(5, 2), torch.float32, r"scale of int4 weights must be .* got torch.float32 \(5, 2\)"),
        (_WORDS, torch.ones(6, 2).double(), torch.float32, "scale of int4 weights must be .* got torch.float64"),
        (_WORDS, torch.ones(2, 6).T, torch.float32, "scale of int4 weights must be contiguous"),
        (_WORDS[:, :5].contiguous(), torch.ones(6, 1), torch.float32, "groups of 128, 64 or 32 of a row, .* has 40"),
    ],
)
def test_what_does_not_fit_is_named(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise(weight, scale, dtype)
