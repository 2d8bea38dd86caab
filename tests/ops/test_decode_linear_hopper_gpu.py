"""decode_linear's kernel for Hopper by the op, on a card: all that reaches it, and that it is it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdms.ops import MOST_ROWS, decode_linear
from fastdms.ops.decode_linear import hopper_kernel
from fastdms.ops.triton_common import on_hopper
from tests.ops.harness import CPU, DEVICE
from tests.ops.linears import FP8, assert_right, define_linear, make_inputs, to_device
from tests.ops.test_decode_linear_hopper import TAKEN
from tests.tolerance import assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == CPU or not on_hopper(torch.device("cuda")), reason="needs a Hopper card"),
]
_N = 8500  # rows of weights: no whole tiles, and some more than multiprocessors
_F = 4300  # their pairs


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each call that the kernel took: one at least."""
    rows: list[int] = []
    run = hopper_kernel.decode_hopper

    def noted(*args: Any) -> None:
        rows.append(len(args[5]))
        run(*args)

    monkeypatch.setattr(hopper_kernel, "decode_hopper", noted)
    yield rows
    assert rows, "another kernel took it"


def _run(inputs: dict[str, Any]) -> torch.Tensor:
    """Once all of them are there: the kernel just ahead of the op may write neither weight nor norm."""
    torch.cuda.synchronize()
    return decode_linear(**inputs)


def _make(
    rows: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, n: int | None = None, **flags: bool
) -> dict[str, Any]:
    n = n or (_F if flags.get("swiglu") else _N)
    return to_device(DEVICE, make_inputs(rows, n, k, dtype, weight_dtype, norm=True, **flags))


@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
@pytest.mark.parametrize("flags", [(), ("bias",), ("swiglu",), ("bias", "swiglu", "fp32_out")], ids="-".join)
@pytest.mark.parametrize("k", [512, 2048])
def test_right_and_within_the_error_budget(
    k: int, flags: tuple[str, ...], dtype: torch.dtype, weight_dtype: torch.dtype, taken: list[int]
) -> None:
    whole = _make(MOST_ROWS, k, dtype, weight_dtype, **dict.fromkeys(flags, True))
    for rows in (2, 8, 13, 16):
        inputs = whole | {"x": whole["x"][:rows]}
        out = _run(inputs)
        assert_right(out, inputs)
        assert_within_error_budget(out, define_linear(inputs, dtype).to(dtype), define_linear(inputs), dtype)
    assert taken == [2, 8, 13, 16]


@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_row_is_the_same_in_any_batch_and_place(
    swiglu: bool, dtype: torch.dtype, weight_dtype: torch.dtype, taken: list[int]
) -> None:
    """Bit for bit, beside other rows, infinities and NaN."""
    whole = _make(MOST_ROWS, 1024, dtype, weight_dtype, swiglu=swiglu, bias=True)
    expected = _run(whole)
    assert not expected.isnan().any()
    for rows in range(2, MOST_ROWS + 1):
        order = torch.randperm(MOST_ROWS, device=DEVICE)[:rows]
        x = whole["x"][order]
        assert torch.equal(_run(whole | {"x": x}), expected[order]), order
        for other in (torch.nan, torch.inf, -torch.inf, 0.0):
            place = int(order[0]) % rows
            beside = torch.full_like(x, other)
            beside[place] = x[0]
            assert torch.equal(_run(whole | {"x": beside})[place], expected[order[0]]), (rows, place, other)
    assert len(taken) == 1 + 5 * (MOST_ROWS - 1)


@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
def test_rows_of_any_size(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Beside each other, one with a number 2^12 times the others' size, which most channels don't look at."""
    inputs = _make(10, 1024, dtype, weight_dtype, fp32_out=True)
    if dtype == torch.float16:
        sizes = torch.tensor([6e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e3, 1e4, 3e-3, 0.0])
        inputs["norm_eps"] = 1e-12
    else:
        sizes = torch.tensor([1e-30, 1e-20, 1e-10, 1e-5, 1.0, 1e5, 1e10, 1e17, 3e-3, 0.0])
    inputs["x"] = (inputs["x"].float().clamp(-4, 4) * sizes.to(DEVICE)[:, None]).to(dtype)
    inputs["x"][8, 77] = 12.0
    weight = inputs["weight"].float()
    weight[5:, 77] = 0.0
    inputs["weight"] = weight.to(weight_dtype)
    out = _run(inputs)
    assert_right(out, inputs)
    assert not out[9].any()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_norms_that_fp16_cannot_hold(magnitude: float, weight_dtype: torch.dtype) -> None:
    inputs = _make(3, 512, torch.bfloat16, weight_dtype, fp32_out=True)
    inputs["norm"] = inputs["norm"] * magnitude
    assert_right(_run(inputs), inputs)


def test_every_fp8_weight() -> None:
    """All but NaN, subnormals among them, exactly; of numbers with 8 bits, in both parts, in any place."""
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    stored = stored[~stored.float().isnan()].to(DEVICE)
    k = 1024
    repeated = stored.float().repeat(-(-_N // len(stored)))[:_N]
    for column, value in ((0, 1.0), (70, 1.6640625), (127, -1.4921875), (128, 1.5078125), (1023, 1.9921875)):
        weight = torch.zeros(_N, k, device=DEVICE)
        weight[:, column] = repeated
        x = torch.zeros(5, k, device=DEVICE)
        x[:, column] = 1.0  # normed 32
        inputs = {
            "x": x.bfloat16(), "weight": weight.to(FP8), "scale": torch.full((_N,), 0.5, device=DEVICE),
            "norm": torch.full((k,), value / 32, dtype=torch.bfloat16, device=DEVICE), "fp32_out": True,
        }  # fmt: skip
        out = _run(inputs)
        assert torch.equal(out, (repeated * value / 2).expand(5, -1)), value


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_more_weights_than_32_bits_count(swiglu: bool, weight_dtype: torch.dtype) -> None:
    """The last channels as if they were alone, all others zero."""
    k, last = 4096, 70
    halves = 2 if swiglu else 1
    n = (2**31 // k + 200) // halves
    inputs = _make(3, k, torch.bfloat16, weight_dtype, last, swiglu=swiglu)
    weight = torch.zeros(halves, n, k, dtype=weight_dtype, device=DEVICE)
    weight[:, -last:] = inputs["weight"].view(halves, last, k)
    assert weight.numel() > 2**31
    large = inputs | {"weight": weight.flatten(0, 1)}
    if inputs["scale"] is not None:
        large["scale"] = F.pad(inputs["scale"].view(halves, last), (n - last, 0)).flatten()
    out = _run(large)
    assert_right(out[:, -last:], inputs)
    assert not out[:, :-last].any()


@pytest.mark.parametrize(("dtype", "weight_dtype"), TAKEN)
@pytest.mark.parametrize(("rows", "k"), [(3, 512), (16, 512), (8, 6016), (16, 6016)])
def test_the_same_over_and_over(rows: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Right behind each other, so that each call's weights come while the one before still runs; up to the most columns
    that there is room for."""
    k -= k % 256 if weight_dtype == FP8 else 0
    inputs = _make(rows, k, dtype, weight_dtype, swiglu=True)
    expected = _run(inputs)
    assert_right(expected, inputs)
    outs = [decode_linear(**inputs) for _ in range(200)]
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("rows", [2, 16])
def test_a_chain_of_dependent_launches(rows: int, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer reads what the one ahead of it wrote, in graphs with other data too."""
    # Poisoning fills what an op allocates, by a kernel that would come between it and the op ahead.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_empty.__wrapped__)  # type: ignore[attr-defined]
    hidden, dtype = 1024, torch.bfloat16
    layers = []
    for _ in range(8):
        up = _make(1, hidden, dtype, weight_dtype, swiglu=True, bias=True)
        down = torch.randn(hidden, _F, device=DEVICE).div(_F**0.5).to(dtype)
        layers.append(({name: up[name] for name in ("weight", "scale", "bias", "norm", "norm_eps", "swiglu")}, down))

    def run(x: torch.Tensor, *, wait: bool = False) -> torch.Tensor:
        for up, down in layers:
            wide = decode_linear(x, **up)
            if wait:
                torch.cuda.synchronize()
            x = decode_linear(wide, down, residual=x)
            if wait:
                torch.cuda.synchronize()
        return x

    static = torch.zeros(rows, hidden, dtype=dtype, device=DEVICE)
    torch.cuda.synchronize()
    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for _ in range(30):
        x = torch.randn(rows, hidden, device=DEVICE).to(dtype)
        expected = run(x, wait=True)
        assert torch.equal(run(x), expected)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)


def test_a_single_row_has_another_kernel(taken: list[int]) -> None:
    inputs = _make(2, 512, torch.bfloat16, torch.bfloat16)
    both = _run(inputs)
    alone = _run(inputs | {"x": inputs["x"][:1]})
    assert taken == [2]
    assert_right(alone, inputs | {"x": inputs["x"][:1]})
    assert_right(both, inputs)
