"""soft_attention: the training attention under the soft DMS mask, and its four gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdms.ops import soft_attention
from tests.ops.harness import BACKENDS, CPU, DEVICE, HEAD_SHAPES, assert_close_to_definition, on
from tests.tolerance import LOGITS_RELATIVE, assert_within_error_budget

_SCALE = 0.3
_FORWARD = torch.ops.fastdms.soft_attention.default
_BACKWARD = torch.ops.fastdms.soft_attention_backward.default
_DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]
_KEEP = {
    "all": lambda *shape: torch.zeros(shape),
    "none": lambda *shape: torch.full(shape, -torch.inf),
    "soft": lambda *shape: F.logsigmoid(3 * torch.randn(shape)),
    "hard": lambda *shape: torch.where(torch.rand(shape) < 0.5, -torch.inf, 0.0),
    "mixed": lambda *shape: torch.where(torch.rand(shape) < 0.3, -torch.inf, F.logsigmoid(3 * torch.randn(shape))),
}


class _Inputs(NamedTuple):
    """q, k, v: heads as they lie in a fused projection; log_keep: ``[B, T, Hkv]`` transposed; grad_out: like q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_keep: torch.Tensor
    grad_out: torch.Tensor

    def to(self, target: torch.dtype | torch.device) -> _Inputs:
        """All in a dtype but log_keep, which is fp32 unless the others are fp64; or all on a device."""
        keep = torch.promote_types(target, torch.float32) if isinstance(target, torch.dtype) else target
        q, k, v, log_keep, grad_out = self
        return _Inputs(q.to(target), k.to(target), v.to(target), log_keep.to(keep), grad_out.to(target))


def _inputs(
    batch: int, heads: tuple[int, int, int], tokens: int, dtype: torch.dtype = torch.float32, keep: str = "mixed"
) -> _Inputs:
    num_kv_heads, group, head_dim = heads
    num_heads = group * num_kv_heads
    fused = torch.randn(batch, tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    q, k, v = fused.transpose(1, 2).split((num_heads, num_kv_heads, num_kv_heads), 1)
    log_keep = _KEEP[keep](batch, tokens, num_kv_heads).transpose(1, 2)
    return _Inputs(q, k, v, log_keep, torch.randn(q.shape).to(dtype))


def _with_gradients(function: Any, inputs: _Inputs) -> list[torch.Tensor]:
    """out and the gradients in q, k, v and log_keep, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, inputs.grad_out))]


def _run(backend: str, inputs: _Inputs, window: int) -> list[torch.Tensor]:
    with on(backend) as device:
        return _with_gradients(
            lambda *leaves: soft_attention(*leaves, window_tokens=window, sm_scale=_SCALE), inputs.to(device)
        )


def _oracle(inputs: _Inputs, window: int, device: torch.device = CPU) -> list[torch.Tensor]:
    """fp64, differentiated by autograd through a masked softmax."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_keep: torch.Tensor) -> torch.Tensor:
        group, tokens = q.shape[1] // k.shape[1], q.shape[2]
        k, v, log_keep = (x.repeat_interleave(group, 1) for x in (k, v, log_keep))
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
        score = torch.einsum("bhid,bhjd->bhij", q, k) * _SCALE
        score = torch.where(ones.tril(-window - 1), score + log_keep.unsqueeze(2), score)
        return torch.einsum("bhij,bhjd->bhid", score.where(ones.tril(), -torch.inf).softmax(-1), v)

    return _with_gradients(attend, inputs.to(torch.float64).to(device))


def _compare(inputs: _Inputs, window: int) -> None:
    oracle = _oracle(inputs, window)
    reference, kernel = (_run(backend, inputs, window) for backend in BACKENDS)
    dtype = inputs.q.dtype
    for mine, plain, truth in zip(kernel, reference, oracle, strict=True):
        assert mine.stride() == plain.stride()
        if dtype == torch.float32:
            # Both are fp32 and differ in the order of their sums alone, so that neither's error bounds the other's.
            assert_close_to_definition(plain, truth)
            assert_close_to_definition(mine, truth)
        else:
            assert_within_error_budget(mine, plain, truth, dtype)


@pytest.mark.wide(7)
@pytest.mark.parametrize("tokens", [2, 17, 64, 65, 130])
@pytest.mark.parametrize("window", [0, 1, 7, 40, "T - 1", "T + 5"])
def test_windows_and_lengths(tokens: int, window: int | str) -> None:
    """In fp32, whose tiles are small: 32 queries or keys."""
    sizes = {"T - 1": tokens - 1, "T + 5": tokens + 5}
    _compare(_inputs(1, (1, 3, 16), tokens), sizes[window] if isinstance(window, str) else window)


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 130, 191, 299, 2**40])
def test_windows_across_16_bit_tiles(window: int) -> None:
    """300 tokens: far, edge, near and diagonal tiles of up to 128 queries or keys."""
    _compare(_inputs(1, (1, 2, 16), 300, torch.float16), window)


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("heads", [*HEAD_SHAPES, (1, 3, 8)], ids=str)
def test_shapes_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    _compare(_inputs(2, heads, 40, dtype), 9)


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("keep", sorted(_KEEP))
@pytest.mark.parametrize("window", [1, 5])
def test_what_is_kept(keep: str, window: int, dtype: torch.dtype) -> None:
    """Also key tiles that are evicted as a whole."""
    _compare(_inputs(2, (2, 2, 16), 140, dtype, keep), window)


@settings(max_examples=40 if DEVICE.type == "cuda" else 20)
@given(
    batch=st.integers(1, 2), num_kv_heads=st.integers(1, 2), group=st.integers(1, 4), head_dim=st.integers(4, 40),
    tokens=st.integers(8, 50), window=st.integers(1, 60), keep=st.sampled_from(sorted(_KEEP)),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    batch: int, num_kv_heads: int, group: int, head_dim: int, tokens: int, window: int, keep: str, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = _inputs(batch, (num_kv_heads, group, head_dim), tokens, keep=keep)
    oracle = _oracle(inputs, window)
    for backend in BACKENDS:
        for mine, truth in zip(_run(backend, inputs, window), oracle, strict=True):
            assert_close_to_definition(mine, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 140])
def test_a_token_that_sees_itself_alone(tokens: int, backend: str) -> None:
    inputs = _inputs(2, (2, 3, 16), tokens, keep="none")
    out, d_q, d_k, d_v, d_log_keep = _run(backend, inputs, 0)
    assert torch.equal(out, inputs.v.repeat_interleave(3, 1))
    assert_close_to_definition(d_v, inputs.grad_out.double().unflatten(1, (2, 3)).sum(2))
    assert not d_log_keep.any()
    for gradient in (d_q, d_k):  # p (do . v - do . out), two sums of the same terms
        assert float(gradient.abs().max()) <= LOGITS_RELATIVE * float(d_v.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_nothing(backend: str, shape: tuple[int, int]) -> None:
    inputs = _inputs(shape[0], (2, 3, 16), shape[1])
    for result, like in zip(_run(backend, inputs, 3), (inputs.q, *inputs[:4]), strict=True):
        assert result.shape == like.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_infinities_are_the_hard_mask(backend: str) -> None:
    inputs, window = _inputs(2, (2, 3, 16), 70, keep="hard"), 6
    positions = torch.arange(70)
    distance = positions[:, None] - positions
    visible = (distance >= 0) & ((distance <= window) | (inputs.log_keep == 0)[:, :, None])
    q, k, v = (x.double() for x in inputs[:3])
    mask = visible.repeat_interleave(3, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=_SCALE, enable_gqa=True)
    out, *_, d_log_keep = _run(backend, inputs, window)
    assert_close_to_definition(out, expected)
    assert not d_log_keep[inputs.log_keep != 0].any()
    assert d_log_keep[..., : 70 - window - 1][inputs.log_keep[..., : 70 - window - 1] == 0].all()


@pytest.mark.parametrize("dtype", _DTYPES)
def test_log_sum_exp(dtype: torch.dtype) -> None:
    q, k, v, log_keep, _ = _inputs(1, (2, 2, 16), 70, dtype)
    with on("kernel") as device:
        lse = _FORWARD(q.to(device), k.to(device), v.to(device), log_keep.to(device), 9, _SCALE)[1]
    assert lse.dtype == torch.float32
    expected = _FORWARD(q.double(), k.double(), v.double(), log_keep.double(), 9, _SCALE)[1]
    assert_close_to_definition(lse, expected)


@pytest.mark.parametrize("window", [0, 2, 20])
def test_reference_gradients_are_its_derivatives(window: int) -> None:
    leaves = [x.detach().requires_grad_() for x in _inputs(2, (2, 2, 4), 7, keep="soft").to(torch.float64)[:4]]
    assert torch.autograd.gradcheck(lambda *x: _FORWARD(*x, window, _SCALE)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_reference_rounds_once(dtype: torch.dtype) -> None:
    """In 16 bits it computes what it does in fp32 and rounds the results."""
    q, k, v, log_keep, grad_out = _inputs(2, (2, 3, 16), 20, dtype)
    out, lse = _FORWARD(q, k, v, log_keep, 3, _SCALE)
    wide_out, wide_lse = _FORWARD(q.float(), k.float(), v.float(), log_keep, 3, _SCALE)
    assert torch.equal(out, wide_out.to(dtype))
    assert torch.equal(lse, wide_lse)
    narrow = _BACKWARD(grad_out, q, k, v, log_keep, out, lse, 3, _SCALE)
    wide = _BACKWARD(grad_out.float(), q.float(), k.float(), v.float(), log_keep, out.float(), lse, 3, _SCALE)
    for mine, other in zip(narrow, wide, strict=True):
        assert torch.equal(mine, other.to(mine.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_each_run_and_for_any_strides(backend: str) -> None:
    inputs = _inputs(2, (2, 3, 16), 150, torch.float16)
    first = _run(backend, inputs, 20)
    assert first[0].transpose(1, 2).is_contiguous()
    for again in (inputs, _Inputs(*(x.contiguous() for x in inputs))):
        for mine, other in zip(_run(backend, again, 20), first, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_sum(backend: str) -> None:
    """It has no strides at all."""
    inputs = _inputs(1, (1, 2, 16), 20)
    ones = torch.ones_like(inputs.q)
    expanded = torch.ones(()).expand(inputs.q.shape)
    for mine, other in zip(
        _run(backend, inputs._replace(grad_out=expanded), 3),
        _run(backend, inputs._replace(grad_out=ones), 3),
        strict=True,
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("tokens", [1, 33, 130])
def test_reads_nothing_outside(tokens: int, dtype: torch.dtype) -> None:
    inputs = _inputs(2, (2, 2, 20), tokens, dtype)
    guarded = []
    for x in inputs:
        batch, heads, *rest = x.shape
        view = torch.full((batch, heads, *(n + 64 for n in rest)), torch.nan, dtype=x.dtype)
        for dim, size in enumerate(rest, 2):
            view = view.narrow(dim, 32, size)
        guarded.append(view.copy_(x))
    expected = _run("kernel", inputs, 9)
    with on("kernel") as device:  # moved as a whole, so that the guards come along
        moved = []
        for x in guarded:
            base = x._base
            assert base is not None
            moved.append(base.to(device).as_strided(x.shape, x.stride(), x.storage_offset()))
        actual = _with_gradients(
            lambda *leaves: soft_attention(*leaves, window_tokens=9, sm_scale=_SCALE), _Inputs(*moved)
        )
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_opcheck_with_gradients(dtype: torch.dtype) -> None:
    inputs = _inputs(2, (2, 3, 16), 9, dtype).to(DEVICE)
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    torch.library.opcheck(_FORWARD, (*leaves, 3, _SCALE))
    saved = _FORWARD(*inputs[:4], 3, _SCALE)
    torch.library.opcheck(_BACKWARD, (inputs.grad_out, *inputs[:4], *saved, 3, _SCALE))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    torch._dynamo.reset()

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return soft_attention(*leaves, window_tokens=3, sm_scale=_SCALE)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 12):
        inputs = _inputs(2, (2, 3, 16), tokens).to(DEVICE)
        for mine, other in zip(_with_gradients(compiled, inputs), _with_gradients(attend, inputs), strict=True):
            assert torch.equal(mine, other)


def test_bad_input_is_named() -> None:
    q, k, log_keep = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5)
    wide = torch.zeros(2, 2, 5, 257)
    for change, message in (
        ({"q": q[0]}, "q must be"),
        ({"q": q.double()}, "q must be"),
        ({"k": k.repeat(1, 1, 1, 2)[..., ::2]}, "k must be .* unit last stride"),
        ({"v": k.half()}, "of one dtype"),
        ({"q": q[:, :3]}, "3 query heads are no multiple of 2"),
        ({"k": k[:, :, :4], "v": k[:, :, :4]}, "don't fit"),
        ({"v": k[:, :1]}, "don't fit"),
        ({"q": q[:1]}, "don't fit"),
        ({"q": wide, "k": wide, "v": wide}, "head_dim must be 1..256, got 257"),
        ({"log_keep": log_keep.double()}, "log_keep must be fp32"),
        ({"log_keep": log_keep[..., :4]}, "log_keep must be fp32"),
        ({"window_tokens": -1}, "window_tokens must be at least 0, got -1"),
    ):
        good: dict[str, Any] = {"q": q, "k": k, "v": k, "log_keep": log_keep, "window_tokens": 3}
        with pytest.raises(ValueError, match=message):
            soft_attention(**{**good, **change}, sm_scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(3, 3, 64), (8, 4, 64), (8, 4, 128)], ids=str)
def test_the_shapes_that_are_trained(heads: tuple[int, int, int]) -> None:
    inputs, window = _inputs(2, heads, 2048, torch.bfloat16), 256
    oracle = _oracle(inputs, window, DEVICE)
    reference, kernel = (_run(backend, inputs, window) for backend in BACKENDS)
    for mine, plain, truth in zip(kernel, reference, oracle, strict=True):
        assert_within_error_budget(mine, plain, truth, torch.bfloat16)
    for mine, other in zip(_run("kernel", inputs, window), kernel, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """The last row of a huge batch comes out as it does alone."""
    batch, heads, tokens, head_dim = 33, 32, 8192, 256
    assert (batch - 1) * heads * tokens * head_dim >= 2**31
    q, grad_out = (
        torch.randn(batch, tokens, heads, head_dim, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
        for _ in range(2)
    )
    k, v = (torch.randn(batch, 1, tokens, head_dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    log_keep = F.logsigmoid(torch.randn(batch, 1, tokens, device=DEVICE))
    results = []
    for first in (0, batch - 1):
        leaves = [x[first:].detach().requires_grad_() for x in (q, k, v, log_keep)]
        out = soft_attention(*leaves, window_tokens=256, sm_scale=0.05)
        gradients = torch.autograd.grad(out, leaves, grad_out[first:])
        results.append([x[-1].detach().clone() for x in (out, *gradients)])
        del out, gradients
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
