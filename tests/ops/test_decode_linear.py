"""decode_linear: its definition with every part on and off, and rows that know nothing of each other."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.ops import MOST_ROWS, decode_linear
from fastdms.ops.decode_linear import vector_kernel
from fastdms.ops.decode_linear.kernel import Tile, prefetch_bytes, tile
from fastdms.ops.int4 import GROUPS, dequantise_int4, quantise_int4
from fastdms.ops.int4 import INT4 as _INT4
from tests.ops.harness import BACKENDS, DEVICE, on
from tests.tolerance import LOGITS_RELATIVE, assert_within_error_budget, rounding_band

_GPU = pytest.mark.gpu  # the interpreter rounds bf16 and fp8 wrongly
_FP8 = torch.float8_e4m3fn
# (compute dtype, weight dtype)
_DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=_GPU),
    pytest.param(torch.bfloat16, _FP8, id="bf16-fp8", marks=_GPU),
    pytest.param(torch.float16, _FP8, id="fp16-fp8", marks=_GPU),
    pytest.param(torch.float32, _FP8, id="fp32-fp8", marks=_GPU),
    pytest.param(torch.float32, _INT4, id="fp32-int4"),
    pytest.param(torch.float16, _INT4, id="fp16-int4"),
    pytest.param(torch.bfloat16, _INT4, id="bf16-int4", marks=_GPU),
]
_EPS = 1e-5


def _inputs(
    rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, *,
    norm: bool = False, bias: bool = False, residual: bool = False, swiglu: bool = False, fp32_out: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call of ``n`` output channels; with int4 weights ``k`` becomes the next multiple of 32."""
    if weight_dtype == _INT4:
        k = -(-k // GROUPS[-1]) * GROUPS[-1]
    channels = 2 * n if swiglu else n
    weight = torch.randn(channels, k) / k**0.5
    scale = None
    if weight_dtype == _FP8:
        scale = weight.abs().amax(1) / torch.finfo(_FP8).max
        weight = weight / scale[:, None]
    if weight_dtype == _INT4:
        weight, scale = quantise_int4(weight, next(group for group in GROUPS if k % group == 0))
    return {
        "x": torch.randn(rows, k).to(dtype), "weight": weight.to(weight_dtype or dtype), "scale": scale,
        "bias": torch.randn(channels).to(dtype) if bias else None, "norm": torch.randn(k).to(dtype) if norm else None,
        "norm_eps": _EPS, "residual": torch.randn(rows, n).to(dtype) if residual else None, "swiglu": swiglu,
        "fp32_out": fp32_out,
    }  # fmt: skip


def _to(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def _run(backend: str, inputs: dict[str, Any], gaps: bool = False) -> torch.Tensor:
    """gaps: x and residual lie in larger buffers, of NaN."""
    with on(backend) as device:
        placed = _to(device, inputs)
        for name in ("x", "residual") if gaps else ():
            if placed[name] is not None:
                rows, columns = placed[name].shape
                buffer = F.pad(placed[name], (0, 9, 0, 3), value=torch.nan)
                placed[name] = buffer[:rows, :columns]
        return decode_linear(**placed).cpu()


def _whole(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with the weight multiplied by its scale."""
    weight, scale = inputs["weight"], inputs["scale"]
    if scale is None:
        return inputs
    if weight.dtype != _INT4:
        return inputs | {"weight": weight.double() * scale[:, None], "scale": None}
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    q = (weight[..., None] >> shifts & 15).double() - 8  # [N, K / 8, 8]
    return inputs | {"weight": (q.view(*scale.shape, -1) * scale[..., None]).flatten(1), "scale": None}


def _oracle(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The definition in fp64; in another dtype with what each layer gives rounded to it."""
    given = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in _whole(inputs).items()}
    h, weight = given["x"], given["weight"]
    if given["norm"] is not None:
        h = h / (h.square().mean(-1, keepdim=True) + given["norm_eps"]).sqrt() * given["norm"]
        h = h.to(dtype).double()
    y = h @ weight.T
    if given["bias"] is not None:
        y = y + given["bias"]
    if given["swiglu"]:
        gate, up = y.to(dtype).double().chunk(2, -1)
        y = F.silu(gate) * up
    if given["residual"] is not None:
        y = y.to(dtype).double() + given["residual"]
    return y


def _assert_right(out: torch.Tensor, inputs: dict[str, Any]) -> None:
    """No element further off than roundings of its terms can move it, however they cancel."""
    oracle = _oracle(inputs)
    sizes = {name: x.float().abs() if isinstance(x, torch.Tensor) else x for name, x in _whole(inputs).items()}
    terms = _oracle(sizes)
    of_terms = LOGITS_RELATIVE + (torch.finfo(inputs["x"].dtype).eps if inputs["norm"] is not None else 0.0)
    error = (out.double() - oracle).abs()
    assert out.dtype == (torch.float32 if inputs["fp32_out"] else inputs["x"].dtype)
    assert bool((error <= rounding_band(oracle, out.dtype) + of_terms * terms).all()), f"off by up to {error.max():.3g}"


_FLAGS = ("norm", "bias", "residual", "swiglu", "fp32_out")


@pytest.mark.parametrize(("dtype", "weight_dtype"), _DTYPES)
@pytest.mark.parametrize("flags", [(), ("norm",), ("norm", "swiglu"), ("residual", "bias"), _FLAGS], ids="-".join)
@pytest.mark.parametrize("rows", [1, 13])
def test_right_and_within_the_error_budget(
    rows: int, flags: tuple[str, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Against roundings to the compute dtype wherever a layer of its own would end."""
    inputs = _inputs(rows, 40, 520, dtype, weight_dtype, **dict.fromkeys(flags, True))
    oracle, plain = _oracle(inputs), _oracle(inputs, dtype).to(dtype)
    reference, kernel = (_run(backend, inputs) for backend in BACKENDS)
    _assert_right(reference, inputs)
    _assert_right(kernel, inputs)
    if dtype != torch.float32:
        assert_within_error_budget(kernel, plain, oracle, dtype)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    "cut", [Tile(32, 64, 4, 3), Tile(64, 128, 4, 4), Tile(16, 32, 2, 2), Tile(128, 128, 8, 3)], ids=str
)
def test_any_tile(cut: Tile, swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastdms.ops.decode_linear.kernel"), "tile", lambda *_: cut)
    inputs = _inputs(6, 150, 200, torch.float16, norm=True, bias=True, residual=True, swiglu=swiglu)
    _assert_right(_run("kernel", inputs), inputs)


@pytest.mark.wide(7)
@pytest.mark.parametrize(("dtype", "weight_dtype"), _DTYPES)
@pytest.mark.parametrize("cut", [(1, 1), (4, 1), (8, 2), (2, 4), (4, 4), (4, 8), (1, 4, 2), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("k", [96, 2048, 4128])
def test_any_tile_of_one_row(
    k: int, cut: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of weights that end inside a tile, with it, and after several."""
    monkeypatch.setattr(vector_kernel, "tile", lambda *_: vector_kernel.Tile(*cut))
    inputs = _inputs(1, 21, k, dtype, weight_dtype, norm=True, residual=True, swiglu=True)
    _assert_right(_run("kernel", inputs), inputs)


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
        _run("kernel", _inputs(rows, 5, k, torch.float16))
    assert taken == [64, 2]


def test_words_of_a_buffer_that_begins_anywhere() -> None:
    foreign = torch.frombuffer(bytearray(64), dtype=torch.float16, offset=2, count=20)
    assert not vector_kernel.fits(foreign[1:9])
    assert not vector_kernel.fits(foreign[:8])
    assert vector_kernel.fits(torch.zeros(20, dtype=torch.float16)[2:10], None)


@_GPU
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, _FP8, _INT4], ids=["bf16", "fp8", "int4"])
@pytest.mark.parametrize(
    ("n", "k", "flags"),
    [(3072, 2048, ("norm",)), (2048, 8192, ("residual",)), (8192, 2048, ("norm", "swiglu")), (6144, 4096, ("norm",)),
     (12288, 4096, ("norm", "swiglu")), (4096, 12288, ("residual",)), (128_256, 2048, ("norm", "fp32_out"))],
    ids=str,
)  # fmt: skip
def test_layers_of_published_models(n: int, k: int, flags: tuple[str, ...], weight_dtype: torch.dtype) -> None:
    for rows in (1, 8, 16):
        inputs = _to(DEVICE, _inputs(rows, n, k, torch.bfloat16, weight_dtype, **dict.fromkeys(flags, True)))
        oracle, plain = _oracle(inputs), _oracle(inputs, torch.bfloat16).bfloat16()
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
        (torch.float32, _INT4),
        (torch.float16, _INT4),
    ]
    if DEVICE.type == "cuda":
        dtypes += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, _FP8), (torch.bfloat16, _INT4)]
    dtype, weight_dtype = data.draw(st.sampled_from(dtypes), "dtypes")
    flags = {name: data.draw(st.booleans(), name) for name in _FLAGS}
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    inputs = _inputs(rows, n, k, dtype, weight_dtype, **flags)
    for backend in BACKENDS:
        _assert_right(_run(backend, inputs), inputs)


@pytest.mark.parametrize(("dtype", "weight_dtype"), _DTYPES)
@pytest.mark.parametrize("flags", [("norm", "swiglu"), ("residual",)], ids="-".join)
def test_a_row_is_the_same_in_any_batch_and_place(
    flags: tuple[str, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Bit for bit: in each place of every kind of batch of several, beside other rows, infinities and NaN."""
    most = MOST_ROWS if DEVICE.type == "cuda" else 8  # numpy's products depend on the number of columns
    whole = _inputs(most, 33, 300, dtype, weight_dtype, **dict.fromkeys(flags, True))
    expected = _run("kernel", whole)

    def check(rows: list[int], others: float | None = None) -> None:
        part = dict(whole)
        for name in ("x", "residual"):
            if whole[name] is not None:
                part[name] = whole[name][rows]
                if others is not None:
                    part[name][1:] = others
        out = _run("kernel", part)
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
    inputs = _inputs(rows, 20, 70, torch.float32, None, **dict.fromkeys(flags, True))
    assert torch.equal(_run(backend, inputs, gaps=True), _run(backend, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=_GPU), torch.float32])
@pytest.mark.parametrize("magnitude", [6e-8, 1e-3, 6e4])
@pytest.mark.parametrize("rows", [1, 3])
def test_norms_of_large_and_small_rows(rows: int, magnitude: float, dtype: torch.dtype, backend: str) -> None:
    """Where x * norm or its square leaves fp16 although the normalised value does not."""
    inputs = _inputs(rows, 20, 100, dtype, norm=True)
    inputs["x"] = (torch.rand(rows, 100).sub(0.5).sign() * magnitude).to(dtype)
    inputs["norm"] = inputs["norm"] * 30
    inputs["norm_eps"] = 1e-12
    _assert_right(_run(backend, inputs), inputs)


@_GPU
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_norms_that_fp16_cannot_hold(magnitude: float, rows: int) -> None:
    """fp8 weights are multiplied in fp16, several rows of them."""
    inputs = _inputs(rows, 20, 100, torch.bfloat16, _FP8, norm=True, fp32_out=True)
    inputs["norm"] = inputs["norm"] * magnitude
    _assert_right(_run("kernel", inputs), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_gates_far_from_zero(rows: int, backend: str) -> None:
    inputs = _inputs(rows, 4, 1, swiglu=True)
    inputs["x"], inputs["weight"] = torch.ones(rows, 1), torch.tensor([-1e4, -80.0, 80, 1e4, 3, 3, 3, 3])[:, None]
    out = _run(backend, inputs)
    assert torch.equal(out[0, 2:], torch.tensor([240.0, 3e4]))
    assert bool((out[0, :2].abs() < 1e-30).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp32_out", [False, True])
def test_an_empty_batch(backend: str, fp32_out: bool) -> None:
    out = _run(backend, _inputs(0, 6, 8, torch.float16, norm=True, residual=True, swiglu=True, fp32_out=fp32_out))
    assert out.shape == (0, 6)
    assert out.dtype == (torch.float32 if fp32_out else torch.float16)


def test_prefetches_lie_within_their_rows() -> None:
    sizes = ((1, 8), (8, 24), (2048, 2048), (2048, 8192), (8192, 2048), (128_256, 2048), (151_936, 4096))
    for (n, k), dtype, swiglu in itertools.product(sizes, (torch.float32, torch.bfloat16, _FP8, _INT4), (False, True)):
        int4 = dtype == _INT4
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


@pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_fp8_weight(rows: int, dtype: torch.dtype, backend: str) -> None:
    """All but NaN, subnormals among them, exactly."""
    stored = torch.arange(256, dtype=torch.uint8).view(_FP8)
    stored = stored[~stored.float().isnan()]
    weight = torch.zeros(len(stored), 80)
    weight[:, 70] = stored.float()
    x = torch.zeros(rows, 80, dtype=dtype)
    x[:, 70] = 1.0
    inputs = {"x": x, "weight": weight.to(_FP8), "scale": torch.full((len(stored),), 0.5), "fp32_out": True}
    assert torch.equal(_run(backend, inputs)[0], stored.float() / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=_GPU)])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_int4_weight_in_every_place(rows: int, dtype: torch.dtype, backend: str) -> None:
    """Exactly; the known bits of a word, by hand."""
    words = torch.tensor([[0x76543210, -0x01234568, 0, -1]], dtype=torch.int32)  # -0x01234568 is 0xfedcba98
    expected = [*range(-8, 8), *([-8] * 8), *([7] * 8)]
    assert dequantise_int4(words, torch.ones(1, 1), torch.float32).tolist() == [expected]
    scale = torch.tensor([[0.5], [-3.0]])
    for place, value in enumerate(expected):
        x = torch.zeros(rows, 32, dtype=dtype)
        x[:, place] = 1.0
        out = _run(backend, {"x": x, "weight": words.expand(2, 4).contiguous(), "scale": scale, "fp32_out": True})
        assert out.tolist() == [[value * 0.5, value * -3.0]] * rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("group", GROUPS)
def test_int4_groups_have_scales_of_any_size(group: int, rows: int, backend: str) -> None:
    """Of any dtype, too, those that fp16 can't hold among them."""
    inputs = _inputs(rows, 9, 384, torch.float16)
    for dtype, largest in ((torch.float32, 30), (torch.bfloat16, 30), (torch.float16, 4)):
        packed, scale = quantise_int4(inputs["weight"], group)
        sizes = 10.0 ** torch.linspace(-largest, largest, scale.shape[1])
        case = inputs | {"weight": packed, "scale": (scale.float() * sizes).to(dtype), "fp32_out": True}
        case["scale"][0] = 0.0
        out = _run(backend, case)
        _assert_right(out, case)
        assert not out[:, 0].any()


@_GPU
def test_weights_that_begin_anywhere() -> None:
    """Rows that no vector load and no prefetch fits, at the end of an allocation too."""
    for rows, (k, offset) in itertools.product((1, 4), ((64, 1), (63, 0), (72, 8), (8, 0), (24, 4))):
        inputs = _inputs(rows, 50, k, torch.bfloat16, norm=True)
        buffer = torch.empty(50 * k + offset, dtype=torch.bfloat16, device=DEVICE)
        moved = _to(DEVICE, inputs)
        moved["weight"] = buffer[offset:].view(50, k)
        moved["weight"].copy_(inputs["weight"])
        _assert_right(decode_linear(**moved).cpu(), inputs)


@_GPU
@pytest.mark.parametrize("rows", [1, 3])
def test_more_weights_than_32_bits_count(rows: int) -> None:
    n, k = 2**31 // 16384 + 64, 16384
    inputs = _inputs(rows, 64, k, torch.bfloat16, _FP8)
    large = _to(DEVICE, inputs)
    large["weight"] = torch.zeros(n, k, dtype=torch.uint8, device=DEVICE).view(_FP8)
    large["weight"][-64:].view(torch.uint8).copy_(inputs["weight"].view(torch.uint8))
    large["scale"] = F.pad(large["scale"], (n - 64, 0))
    out = decode_linear(**large).cpu()
    _assert_right(out[:, -64:], inputs)
    assert not out[:, :-64].any()


@_GPU
@pytest.mark.parametrize("rows", [1, 16])
def test_a_chain_of_dependent_launches(rows: int) -> None:
    """Each layer begins before the one ahead of it has ended, and reads what that one wrote, in graphs too."""
    dtype, layers = torch.bfloat16, 12
    weights = [(torch.randn(4096, 1024, device=DEVICE) / 32, torch.randn(1024, 2048, device=DEVICE) / 45)
               for _ in range(layers)]  # fmt: skip
    weights = [(a.to(dtype), b.to(dtype)) for a, b in weights]
    norm = torch.rand(1024, device=DEVICE).add(0.5).to(dtype)

    def run(x: torch.Tensor, *, wait: bool = False) -> torch.Tensor:
        for up, down in weights:
            hidden = decode_linear(x, up, norm=norm, norm_eps=_EPS, swiglu=True)
            if wait:
                torch.cuda.synchronize()
            x = decode_linear(hidden, down, residual=x)
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


@pytest.mark.parametrize("swiglu", [False, True])
def test_int4_weights_keep_the_schema(swiglu: bool) -> None:
    inputs = _to(DEVICE, _inputs(2, 6, 64, torch.float32, _INT4, norm=True, swiglu=swiglu))
    order = ("x", "weight", "scale", "bias", "norm", "norm_eps", "residual", "swiglu", "fp32_out")
    torch.library.opcheck(torch.ops.fastdms.decode_linear.default, tuple(inputs[name] for name in order))


def test_bad_input_is_named() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(6, 8)
    good: dict[str, Any] = {"x": x, "weight": weight}
    scale, fp8 = torch.ones(6), weight.to(_FP8)
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
        ({"weight": torch.zeros(6, 1, dtype=torch.int32), "scale": torch.ones(6, 1)}, "scale of int4 weights"),
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
