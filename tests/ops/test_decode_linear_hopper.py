"""decode_linear's kernel for Hopper, of several normed rows and many channels: what it takes, and its edges.

Without a GPU it is emulated: all but layouts and the matrix units' roundings.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastdms.ops import MOST_ROWS
from fastdms.ops.decode_linear import hopper_kernel
from fastdms.ops.decode_linear.hopper_kernel import Cut, cut, padded_rows
from fastdms.ops.int4 import INT4
from fastdms.ops.triton_common import on_hopper
from tests.ops.gluon_emulator import emulate
from tests.ops.harness import CPU, DEVICE
from tests.ops.linears import EPS, FP8, GPU, assert_right, define_linear, make_inputs, run_linear, to_device
from tests.tolerance import assert_within_error_budget

kernel = importlib.import_module("fastdms.ops.decode_linear.kernel")
# (compute dtype, weight dtype) that the kernel takes.
TAKEN = [
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.bfloat16, FP8, id="bf16-fp8"),
]
_STEP = 16384  # bytes


@pytest.fixture(scope="module")
def hopper() -> Iterator[None]:
    """A Hopper card, or the kernel emulated."""
    if DEVICE != CPU and not on_hopper(torch.device("cuda")):
        pytest.skip("needs a Hopper card")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == CPU:
            patch.setattr(kernel, "on_hopper", lambda _: True)
            emulate(patch, hopper_kernel, "_decode_linear_hopper_kernel", {})
        yield


def _use(patch: pytest.MonkeyPatch, processors: int, by: Cut | None = None) -> None:
    """Cut the work for so many multiprocessors, and like ``by``."""
    patch.setattr(hopper_kernel, "_multiprocessors", lambda _: processors)
    if by is not None:
        patch.setattr(hopper_kernel, "cut", lambda _: by)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 rows as the kernel takes them beside fp8 weights, the rows between them NaN; and each row's power."""
    rows, k = x.shape
    largest = x.abs().amax(1)
    power = torch.where(largest > 0, largest, 1.0).log2().ceil().exp2() / 256
    scaled = x / power[:, None]
    high = scaled.to(FP8)
    parts = torch.full((2, padded_rows(rows), k), torch.nan).to(FP8)
    parts[0, :rows] = high
    parts[1, :rows] = (16 * (scaled - high.float())).to(FP8)
    return parts.flatten(0, 1), power


def _add_parts(parts: torch.Tensor, rows: int) -> torch.Tensor:
    both = parts.float().view(2, -1, parts.shape[1])[:, :rows]
    return both[0] + both[1] / 16


def _run_normed(inputs: dict[str, Any]) -> torch.Tensor:
    """The kernel alone; x is normed already."""
    placed = to_device(DEVICE, inputs)
    x, weight, swiglu = placed["x"], placed["weight"], placed["swiglu"]
    n = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out: torch.Tensor = x.new_empty((x.shape[0], n), dtype=torch.float32 if placed["fp32_out"] else x.dtype)
    normed, power = _parts(x.float()) if weight.dtype == FP8 else (x, None)
    hopper_kernel.decode_hopper(normed, power, weight, placed["scale"], placed["bias"], out, swiglu)
    return out.cpu()


def _check_normed(inputs: dict[str, Any]) -> None:
    out = _run_normed(inputs)
    if DEVICE != CPU and inputs["weight"].dtype == FP8:  # the matrix units keep some 14 bits
        plain = define_linear(inputs, torch.bfloat16).to(torch.bfloat16)
        assert_within_error_budget(out, plain, define_linear(inputs), torch.bfloat16)
    else:
        assert_right(out, inputs)


@pytest.mark.parametrize(
    ("supported", "rows", "n", "k", "dtype", "weight_dtype"),
    [
        (True, 2, 192, 256, torch.bfloat16, torch.bfloat16),
        (True, 16, 200, 128, torch.float16, torch.float16),
        (True, 13, 192, 256, torch.bfloat16, FP8),
        (True, 2, 192, 5888, torch.bfloat16, FP8),
        (False, 1, 192, 256, torch.bfloat16, torch.bfloat16),
        (False, 2, 192, 256, torch.float32, torch.float32),
        (False, 2, 192, 256, torch.float32, FP8),
        (False, 2, 192, 256, torch.float16, FP8),
        (False, 2, 192, 256, torch.bfloat16, INT4),
        (False, 2, 191, 256, torch.bfloat16, torch.bfloat16),
        (False, 2, 192, 192, torch.bfloat16, torch.bfloat16),
        (False, 2, 192, 128, torch.bfloat16, FP8),
        (False, 16, 192, 6144, torch.bfloat16, torch.bfloat16),
    ],
)  # fmt: skip
def test_what_it_takes(
    supported: bool, rows: int, n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _use(monkeypatch, 3)
    weight = torch.empty((n, k // 8 if weight_dtype == INT4 else k), dtype=weight_dtype)
    assert hopper_kernel.is_supported(torch.empty((rows, k), dtype=dtype), weight) == supported


def test_weights_that_begin_between_vectors_are_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, 1)
    x, buffer = torch.empty(2, 128).half(), torch.empty(64 * 128 + 8).half()
    assert hopper_kernel.is_supported(x, buffer[8:].view(64, 128))
    assert not hopper_kernel.is_supported(x, buffer[4:-4].view(64, 128))


def test_residuals_and_other_cards_are_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, 1)
    x, weight = torch.empty(2, 128).half(), torch.empty(64, 128).half()
    monkeypatch.setattr(kernel, "on_hopper", lambda _: False)
    assert kernel._hopper_kernel(x, weight, None) is None
    monkeypatch.setattr(kernel, "on_hopper", lambda _: True)
    assert kernel._hopper_kernel(x, weight, None) is hopper_kernel
    assert kernel._hopper_kernel(x, weight, torch.empty(2, 64).half()) is None


def test_a_batch_of_several_is_taken_whatever_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a row's result would depend on how many there are beside it."""
    _use(monkeypatch, 1)
    for k in range(128, 2**14, 128):
        x, weight = torch.empty(MOST_ROWS, k, device="meta").bfloat16(), torch.empty(64, k, device="meta").bfloat16()
        assert len({hopper_kernel.is_supported(x[:rows], weight) for rows in range(2, MOST_ROWS + 1)}) == 1, k


def test_what_is_cut_fits_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, 1)
    taken = 0
    for k in range(128, 2**14, 128):
        for rows in (2, 8, 9, 16):
            x, weight = torch.empty(rows, k, device="meta").half(), torch.empty(64, k, device="meta").half()
            if hopper_kernel.is_supported(x, weight):
                x_bytes = 2 * padded_rows(rows) * k
                programs, stages = cut(x_bytes)
                assert 2 <= stages <= 8
                assert programs * (x_bytes + stages * _STEP) <= 222 * 1024
                taken += 1
    assert taken > 100
    assert [padded_rows(rows) for rows in (2, 8, 9, 16)] == [8, 8, 16, 16]


def _exact() -> torch.Tensor:
    """Positive bf16 numbers up to 256 that two parts hold: all of the upper 14 octaves, below multiples of 2^-13."""
    upper = torch.arange(0x3C80, 0x4381, dtype=torch.int16).view(torch.bfloat16)
    assert upper[[0, -1]].tolist() == [2**-6, 256]
    return torch.cat((torch.arange(128).bfloat16() * 2**-13, upper))


def test_two_parts_hold_eight_bits_over_14_octaves() -> None:
    """Exactly, and whatever else to half of bf16's roundings; below with an error that is the same for all."""
    exact = _exact().float()
    for x in (exact, -exact):
        parts, power = _parts(x[None])
        assert power == 1
        assert torch.equal(_add_parts(parts, 1)[0], x)
    x = torch.cat((torch.rand(10_000) * 256, torch.rand(10_000) / 64, torch.tensor([256.0])))
    error = (_add_parts(_parts(x[None])[0], 1)[0] - x).abs()
    assert bool((error <= (x * 2**-9).clamp_min(2**-14)).all())


@pytest.mark.parametrize("magnitude", [2.0**-100, 1.0, 2.0**100])
def test_a_norm_leaves_exact_parts(magnitude: float) -> None:
    """x is 1 or -1, so that what is normed is the norm's weight; and a row of zeros."""
    norm = _exact()
    x = torch.rand(3, len(norm)).sub(0.5).sign().bfloat16()
    x[1] = 0
    parts, power = _norm_to_parts(x, norm * magnitude, 1e-30)
    assert power.tolist() == [magnitude, 1 / 256, magnitude]
    assert torch.equal(_add_parts(parts, 3), x * norm.float())


@GPU
def test_a_norm_leaves_parts_of_any_numbers() -> None:
    rows, k = 13, 2048
    x, norm = torch.randn(rows, k).bfloat16(), torch.randn(k).mul(30).bfloat16()
    x[5] *= torch.logspace(-20, 0, k)
    parts, power = _norm_to_parts(x, norm, EPS)
    normed = x.float() / (x.float().square().mean(1, keepdim=True) + EPS).sqrt() * norm.float()
    expected, expected_power = _parts(normed)
    assert torch.equal(power, expected_power)
    error = (_add_parts(parts, rows) - normed / power[:, None]).abs()
    expected_error = (_add_parts(expected, rows) - normed / power[:, None]).abs()
    assert bool((error <= expected_error + 256 * 2**-20).all())


def _norm_to_parts(x: torch.Tensor, norm: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, k), low = x.shape, padded_rows(len(x))
    parts, power = torch.empty((2 * low, k), dtype=FP8, device=DEVICE), torch.empty(rows, device=DEVICE)
    kernel._norm_kernel[(rows,)](
        x.to(DEVICE), norm.to(DEVICE), parts, power, k, k, eps, low, BLOCK_K=4096, FORM="parts", DEPENDENT=False,
        num_warps=2,
    )  # fmt: skip
    return parts.cpu(), power.cpu()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    ("by", "rows", "n", "k"),
    [
        (Cut(1, 2), 2, 64, 256), (Cut(1, 2), 8, 127, 1280), (Cut(1, 3), 9, 129, 768), (Cut(1, 3), 16, 330, 1024),
        (Cut(2, 5), 16, 127, 1280), (Cut(2, 5), 2, 330, 768), (Cut(1, 8), 9, 64, 256), (Cut(1, 8), 8, 330, 768),
    ],
    ids=str,
)  # fmt: skip
def test_edges_of_tiles_and_rings(
    by: Cut, rows: int, n: int, k: int, swiglu: bool, dtype: torch.dtype, weight_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tiles that end with the channels and after them, a program's first, second and later ones; rings that end within
    a tile's columns, and that hold more than a program has."""
    _use(monkeypatch, 1, by)
    _check_normed(make_inputs(rows, n, k, dtype, weight_dtype, bias=True, swiglu=swiglu, fp32_out=True))


@pytest.mark.usefixtures("hopper")
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_size_and_any_cut(data: st.DataObject) -> None:
    dtypes: list[Any] = [param.values for param in TAKEN]
    dtype, weight_dtype = data.draw(st.sampled_from(dtypes), "dtypes")
    flags = {name: data.draw(st.booleans(), name) for name in ("bias", "swiglu", "fp32_out")}
    n = data.draw(st.integers(32 if flags["swiglu"] else 64, 400), "n")
    k = data.draw(st.integers(1, 5), "steps") * (256 if weight_dtype == FP8 else 128)
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    inputs = make_inputs(data.draw(st.integers(2, MOST_ROWS), "rows"), n, k, dtype, weight_dtype, **flags)
    with pytest.MonkeyPatch.context() as patch:
        by = Cut(data.draw(st.integers(1, 2), "programs"), data.draw(st.integers(2, 6), "stages"))
        _use(patch, data.draw(st.integers(1, 4), "processors"), by)
        _check_normed(inputs)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
def test_layers_whose_norm_goes_before(
    dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the op; without a norm, with a residual, or of one row another kernel has them."""
    if DEVICE == CPU and dtype != torch.float16:
        pytest.skip("the interpreter rounds bf16 and fp8 wrongly")
    _use(monkeypatch, 2)
    taken = []
    run = hopper_kernel.decode_hopper

    def noted(x: torch.Tensor, *others: Any) -> None:
        taken.append(len(others[-2]))
        run(x, *others)

    monkeypatch.setattr(hopper_kernel, "decode_hopper", noted)
    for rows, flags in (
        (3, ("norm",)), (16, ("norm", "bias", "swiglu", "fp32_out")), (2, ()), (4, ("norm", "residual")), (1, ("norm",))
    ):  # fmt: skip
        inputs = make_inputs(rows, 200, 512, dtype, weight_dtype, **dict.fromkeys(flags, True))
        assert_right(run_linear("kernel", inputs), inputs)
    assert taken == [3, 16]
