"""decode_linear: its definition with every part on and off, and rows that know nothing of each other."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.ops import MOST_ROWS, decode_linear
from fastdms.ops.decode_linear import vector_kernel
from fastdms.ops.decode_linear.kernel import Tile
from fastdms.ops.int4 import INT4
from tests.ops.harness import BACKENDS, DEVICE
from tests.ops.linears import (
    DTYPES,
    FLAGS,
    FP8,
    GPU,
    assert_right,
    define_linear,
    make_inputs,
    run_linear,
    to_device,
)
from tests.tolerance import assert_within_error_budget


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("flags", [(), ("norm",), ("norm", "swiglu"), ("residual", "bias"), FLAGS], ids="-".join)
@pytest.mark.parametrize("rows", [1, 13])
def test_right_and_within_the_error_budget(
    rows: int, flags: tuple[str, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Against roundings to the compute dtype wherever a layer of its own would end."""
    inputs = make_inputs(rows, 40, 520, dtype, weight_dtype, **dict.fromkeys(flags, True))
    oracle, plain = define_linear(inputs), define_linear(inputs, dtype).to(dtype)
    reference, kernel = (run_linear(backend, inputs) for backend in BACKENDS)
    assert_right(reference, inputs)
    assert_right(kernel, inputs)
    if dtype != torch.float32:
        assert_within_error_budget(kernel, plain, oracle, dtype)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    "cut", [Tile(32, 64, 4, 3), Tile(64, 128, 4, 4), Tile(16, 32, 2, 2), Tile(128, 128, 8, 3)], ids=str
)
def test_any_tile(cut: Tile, swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastdms.ops.decode_linear.kernel"), "tile", lambda *_: cut)
    inputs = make_inputs(6, 150, 200, torch.float16, norm=True, bias=True, residual=True, swiglu=swiglu)
    assert_right(run_linear("kernel", inputs), inputs)


@pytest.mark.wide(7)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("cut", [(1, 1), (4, 1), (8, 2), (2, 4), (4, 4), (4, 8), (1, 4, 2), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("k", [96, 2048, 4128])
def test_any_tile_of_one_row(
    k: int, cut: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of weights that end inside a tile, with it, and after several."""
    monkeypatch.setattr(vector_kernel, "tile", lambda *_: vector_kernel.Tile(*cut))
    inputs = make_inputs(1, 21, k, dtype, weight_dtype, norm=True, residual=True, swiglu=True)
    assert_right(run_linear("kernel", inputs), inputs)


def test_which_kernel_takes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for a vector, if rows are whole words."""
    kernel = importlib.import_module("fastdms.ops.decode_linear.kernel")
    taken: list[int] = []
    run = kernel.decode_vector

    def noted(x: torch.Tensor, *others: Any) -> None:
        taken.append(x.shape[1])
        run(x, *others)

    monkeypatch.setattr(kernel, "decode_vector", noted)
    for rows, k in ((1, 64), (1, 63), (1, 2), (1, 1), (2, 64)):
        run_linear("kernel", make_inputs(rows, 5, k, torch.float16))
    assert taken == [64, 2]


@GPU
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8, INT4], ids=["bf16", "fp8", "int4"])
@pytest.mark.parametrize(
    ("n", "k", "flags"),
    [(3072, 2048, ("norm",)), (2048, 8192, ("residual",)), (8192, 2048, ("norm", "swiglu")), (6144, 4096, ("norm",)),
     (12288, 4096, ("norm", "swiglu")), (4096, 12288, ("residual",)), (128_256, 2048, ("norm", "fp32_out"))],
    ids=str,
)  # fmt: skip
def test_layers_of_published_models(n: int, k: int, flags: tuple[str, ...], weight_dtype: torch.dtype) -> None:
    for rows in (1, 8, 16):
        inputs = to_device(DEVICE, make_inputs(rows, n, k, torch.bfloat16, weight_dtype, **dict.fromkeys(flags, True)))
        oracle, plain = define_linear(inputs), define_linear(inputs, torch.bfloat16).bfloat16()
        assert_within_error_budget(decode_linear(**inputs), plain, oracle, torch.bfloat16)


@settings(max_examples=40)
@given(data=st.data())
def test_any_size_and_any_part(data: st.DataObject) -> None:
    rows = data.draw(st.just(1) | st.integers(1, MOST_ROWS), "rows")
    n, k = data.draw(st.integers(1, 70), "n"), data.draw(st.integers(1, 600), "k")
    if data.draw(st.booleans(), "aligned"):
        k = -(-k // 64) * 64
    dtypes = [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, INT4),
        (torch.float16, INT4),
    ]
    if DEVICE.type == "cuda":
        dtypes += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8), (torch.bfloat16, INT4)]
    dtype, weight_dtype = data.draw(st.sampled_from(dtypes), "dtypes")
    flags = {name: data.draw(st.booleans(), name) for name in FLAGS}
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    inputs = make_inputs(rows, n, k, dtype, weight_dtype, **flags)
    for backend in BACKENDS:
        assert_right(run_linear(backend, inputs), inputs)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("flags", [("norm", "swiglu"), ("residual",)], ids="-".join)
def test_a_row_is_the_same_in_any_batch_and_place(
    flags: tuple[str, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Bit for bit: in each place of every kind of batch of several, beside other rows, infinities and NaN."""
    most = MOST_ROWS if DEVICE.type == "cuda" else 8  # numpy's products depend on the number of columns
    whole = make_inputs(most, 33, 300, dtype, weight_dtype, **dict.fromkeys(flags, True))
    expected = run_linear("kernel", whole)

    def check(rows: list[int], others: float | None = None) -> None:
        part = dict(whole)
        for name in ("x", "residual"):
            if whole[name] is not None:
                part[name] = whole[name][rows]
                if others is not None:
                    part[name][1:] = others
        out = run_linear("kernel", part)
        checked = 1 if others is not None else len(rows)
        assert torch.equal(out[:checked], expected[rows][:checked]), rows

    check(list(range(most - 1, -1, -1)))
    check([5, 0, 3])
    check([most - 7, most - 7, 2, 4, most - 5, 7])
    for others in (torch.nan, torch.inf, -torch.inf, 0.0):
        check([3, 1, 2], others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", [("norm",), ("residual", "swiglu")], ids="-".join)
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_with_gaps_and_nothing_read_between_them(rows: int, flags: tuple[str, ...], backend: str) -> None:
    inputs = make_inputs(rows, 20, 70, torch.float32, None, **dict.fromkeys(flags, True))
    assert torch.equal(run_linear(backend, inputs, gaps=True), run_linear(backend, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=GPU), torch.float32])
@pytest.mark.parametrize("magnitude", [6e-8, 1e-3, 6e4])
@pytest.mark.parametrize("rows", [1, 3])
def test_norms_of_large_and_small_rows(rows: int, magnitude: float, dtype: torch.dtype, backend: str) -> None:
    """Where x * norm or its square leaves fp16 although the normalised value does not."""
    inputs = make_inputs(rows, 20, 100, dtype, norm=True)
    inputs["x"] = (torch.rand(rows, 100).sub(0.5).sign() * magnitude).to(dtype)
    inputs["norm"] = inputs["norm"] * 30
    inputs["norm_eps"] = 1e-12
    assert_right(run_linear(backend, inputs), inputs)


@GPU
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_norms_that_fp16_cannot_hold(magnitude: float, rows: int) -> None:
    """fp8 weights are multiplied in fp16, several rows of them."""
    inputs = make_inputs(rows, 20, 100, torch.bfloat16, FP8, norm=True, fp32_out=True)
    inputs["norm"] = inputs["norm"] * magnitude
    assert_right(run_linear("kernel", inputs), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_gates_far_from_zero(rows: int, backend: str) -> None:
    inputs = make_inputs(rows, 4, 1, swiglu=True)
    inputs["x"], inputs["weight"] = torch.ones(rows, 1), torch.tensor([-1e4, -80.0, 80, 1e4, 3, 3, 3, 3])[:, None]
    out = run_linear(backend, inputs)
    assert torch.equal(out[0, 2:], torch.tensor([240.0, 3e4]))
    assert bool((out[0, :2].abs() < 1e-30).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp32_out", [False, True])
def test_an_empty_batch(backend: str, fp32_out: bool) -> None:
    out = run_linear(
        backend, make_inputs(0, 6, 8, torch.float16, norm=True, residual=True, swiglu=True, fp32_out=fp32_out)
    )
    assert out.shape == (0, 6)
    assert out.dtype == (torch.float32 if fp32_out else torch.float16)


@GPU
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("weight_dtype", [None, FP8, INT4], ids=["bf16", "fp8", "int4"])
def test_a_chain_of_dependent_launches(weight_dtype: torch.dtype | None, rows: int) -> None:
    """Each layer begins before the one ahead of it has ended, and reads what that one wrote, in graphs too."""
    dtype, layers = torch.bfloat16, 12
    pairs = [
        (
            make_inputs(rows, 2048, 1024, dtype, weight_dtype, norm=True, bias=True, swiglu=True),
            make_inputs(rows, 1024, 2048, dtype, weight_dtype, bias=True),
        )
        for _ in range(layers)
    ]
    pairs = [(to_device(DEVICE, up), to_device(DEVICE, down)) for up, down in pairs]

    def run(x: torch.Tensor, *, wait: bool = False) -> torch.Tensor:
        for up, down in pairs:
            hidden = decode_linear(**up | {"x": x})
            if wait:
                torch.cuda.synchronize()
            x = decode_linear(**down | {"x": hidden, "residual": x})
            if wait:
                torch.cuda.synchronize()
        return x

    static = torch.zeros(rows, 1024, dtype=dtype, device=DEVICE)
    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for _ in range(20):
        x = torch.randn(rows, 1024, device=DEVICE).to(dtype)
        expected = run(x, wait=True)
        assert torch.equal(run(x), expected)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)


def test_bad_input_is_named() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(6, 8)
    good: dict[str, Any] = {"x": x, "weight": weight}
    scale, fp8 = torch.ones(6), weight.to(FP8)
    for inputs, message in (
        ({"x": x[0]}, "x must"),
        ({"x": x.double()}, "x must"),
        ({"x": torch.zeros(8, 2).T}, "x must"),
        ({"x": torch.zeros(MOST_ROWS + 1, 8)}, "17 rows"),
        ({"weight": weight[:, :7]}, "weight"),
        ({"weight": weight[:0]}, "weight"),
        ({"weight": torch.zeros(8, 6).T}, "weight"),
        ({"weight": weight.half()}, "weight must"),
        ({"weight": fp8}, "scale"),
        ({"scale": scale}, "scale"),
        ({"weight": fp8, "scale": scale[:5]}, "scale"),
        ({"weight": fp8, "scale": scale.half()}, "scale"),
        ({"weight": torch.zeros(6, 1, dtype=torch.int32)}, "scale"),
        ({"weight": torch.zeros(6, 1, dtype=torch.int32), "scale": torch.ones(6, 1)}, "a row has 8"),
        ({"weight": weight.int()}, r"\[N, 8 / 8\]"),
        ({"bias": scale[:5]}, "bias"),
        ({"bias": scale.half()}, "bias"),
        ({"norm": scale}, "norm"),
        ({"norm": torch.zeros(8).half()}, "norm"),
        ({"residual": torch.zeros(2, 5)}, "residual"),
        ({"residual": torch.zeros(2, 6), "swiglu": True}, "residual"),
        ({"residual": torch.zeros(2, 6).half()}, "residual"),
        ({"residual": torch.zeros(6, 2).T}, "residual"),
        ({"weight": weight[:5], "swiglu": True}, "even"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_linear(**{**good, **inputs})
    x, weight = torch.zeros(2, 128), torch.zeros(6, 16, dtype=torch.int32)
    right = torch.ones(6, 2)
    for scale in (right[:, 0], torch.ones(6, 3), torch.ones(6, 8), right[:5], torch.ones(2, 6).T, right.double()):
        with pytest.raises(ValueError, match=r"scale of int4 weights .* \[\(6, 1\), \(6, 2\), \(6, 4\)\]"):
            decode_linear(x, weight, scale=scale)
    assert decode_linear(x, weight, scale=right).shape == (2, 6)
