"""dense_attention: causal attention of a chunk over a whole history, which it extends."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastdms.ops import dense_attention
from fastdms.ops.dense_attention.choice import choose_kernel, installed_kernels
from tests.ops.definition import attend
from tests.ops.harness import (
    BACKENDS,
    CPU,
    DEVICE,
    HEAD_SHAPES,
    KERNEL_DTYPES,
    assert_close_to_definition,
    on,
    split_heads,
)
from tests.ops.prefill_emulator import emulated
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
            out.append(dense_attention(q, k, v, k_history=k_history, v_history=v_history, start=start, sm_scale=_SCALE))
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
    history = torch.zeros(9, 2, 16)
    for change, message in (
        ({"q": q[:2]}, "q, k, v"),
        ({"q": q[:, :3]}, "heads"),
        ({"v": k[:2]}, "q, k, v"),
        ({"start": -1}, "start must be in"),
        ({"start": 7}, r"start must be in \[0, 9 - 3\], got 7"),
        ({"k_history": history.half()}, "history"),
        ({"k_history": history[:, :1]}, "history"),
        ({"k_history": history.repeat(2, 1, 1)[::2], "v_history": history.repeat(2, 1, 1)[::2]}, "contiguous"),
    ):
        good: dict[str, Any] = {"q": q, "k": k, "v": k, "start": 6, "k_history": history, "v_history": history}
        with pytest.raises(ValueError, match=message):
            dense_attention(**{**good, **change}, sm_scale=1.0)


_ALL = frozenset({"flash_attn_3", "gluon", "cudnn", "flash_attn_2", "torch_flash"})
_HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", _HALF, ids=str)
@pytest.mark.parametrize(
    ("capability", "head_dim", "order"),
    [
        ((9, 0), 64, ["flash_attn_3", "gluon", "cudnn", "flash_attn_2", "torch_flash", "triton"]),
        ((10, 0), 64, ["cudnn", "flash_attn_2", "torch_flash", "triton"]),
        ((9, 0), 80, ["flash_attn_3", "cudnn", "flash_attn_2", "torch_flash", "triton"]),
        ((9, 0), 256, ["flash_attn_3", "flash_attn_2", "torch_flash", "triton"]),
        ((9, 0), 16, ["flash_attn_3", "flash_attn_2", "torch_flash", "triton"]),
        ((9, 0), 84, ["triton"]),
        ((9, 0), 264, ["triton"]),
        ((10, 0), 128, ["cudnn", "flash_attn_2", "torch_flash", "triton"]),
        ((8, 0), 128, ["flash_attn_2", "torch_flash", "triton"]),
        ((7, 5), 64, ["triton"]),
    ],
    ids=str,
)
def test_the_next_best_is_chosen(
    dtype: torch.dtype, capability: tuple[int, int], head_dim: int, order: list[str]
) -> None:
    """Whatever is chosen is taken away, until only the project's own kernel is left."""
    installed, chosen = _ALL, list[str]()
    while not chosen or chosen[-1] != "triton":
        chosen.append(choose_kernel(dtype, head_dim, 4, capability, installed))
        installed -= {chosen[-1]}
    assert chosen == order


def test_fp32_is_for_the_own_kernel() -> None:
    assert choose_kernel(torch.float32, 64, 4, (9, 0), _ALL) == "triton"


def test_groups_that_specialised_warps_take() -> None:
    taken = [
        g for g in range(1, 17) if choose_kernel(torch.bfloat16, 64, g, (9, 0), _ALL - {"flash_attn_3"}) == "gluon"
    ]
    assert taken == [1, 2, 4, 8]


def _module(name: str) -> Any:
    return importlib.import_module(f"fastdms.ops.dense_attention.{name}")


@pytest.mark.parametrize("chunks", [[128, 40], [100, 130, 30], [130, 126], [256, 128]], ids=str)
def test_the_parts_of_a_later_chunk_are_merged(monkeypatch: pytest.MonkeyPatch, chunks: list[int]) -> None:
    """cuDNN's place is taken by the plain definition of a part."""
    shapes, odd = [], []

    def part(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, *, causal: bool, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append((q.shape[0], k.shape[0], causal))
        assert with_lse == (k.shape[0] != q.shape[0] or len(shapes) > 1)
        return _part(q, k, v, sm_scale, causal)

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> torch.Tensor:
        odd.append(k.shape[0] - q.shape[0])
        return _module("flash_kernel").flash_attention(q, k, v, odd[-1], sm_scale)  # type: ignore[no-any-return]

    monkeypatch.setattr(_module("libraries"), "cudnn_part", part)
    monkeypatch.setattr(_module("libraries"), "torch_flash", flash)
    monkeypatch.setattr(_module("kernel"), "dense_kernel", lambda *_: "cudnn")
    _compare(torch.randn(sum(chunks), 5, 16), 1, chunks)
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    assert odd == [start for start in starts if start % 128]
    assert {tokens % 128 for tokens, _, _ in shapes} == {0}
    assert [keys for _, keys, causal in shapes if not causal] == [s for s in starts[1:] if s % 128 == 0]


def _part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * sm_scale
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0]).tril().bool(), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
    return out.contiguous(), scores.logsumexp(-1).contiguous()


def test_chunks_are_padded_to_few_lengths() -> None:
    padded = [_module("libraries").padded_tokens(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= length < tokens + max(128, tokens / 4) for tokens, length in enumerate(padded, 1))
    assert all(length % 128 == 0 for length in padded)
    assert len(set(padded)) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("chunks", [[300], [256, 100], [130, 70], [128, 1, 128]], ids=str)
def test_every_kernel_to_be_had(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, group: int, chunks: list[int]
) -> None:
    """Each is held against fp64 by itself, whichever of them would be chosen."""
    capability = torch.cuda.get_device_capability()
    fused = torch.randn(sum(chunks), 2 * (group + 2), head_dim).to(dtype)
    q, k, v = split_heads(fused.double(), 2)
    oracle, _ = _part(q, k, v, _SCALE, causal=True)
    reference, *_ = _run("reference", fused, 2, chunks)
    kernels = {choose_kernel(dtype, head_dim, group, capability, frozenset({one})) for one in installed_kernels()}
    for kernel in sorted(kernels | {"triton"}):
        with monkeypatch.context() as patch:
            patch.setattr(_module("kernel"), "dense_kernel", lambda *_, kernel=kernel: kernel)
            out, k_history, v_history = _run("kernel", fused, 2, chunks)
        try:
            assert_within_error_budget(out, reference, oracle)
        except AssertionError as error:
            raise AssertionError(f"{kernel}: {error}") from error
        for history, written in ((k_history, k), (v_history, v)):
            assert torch.equal(history[: len(oracle)], written.to(dtype))
            assert history[len(oracle) :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "chunks", [[1], [48, 1], [130, 70], [64, 0, 128, 9], [127, 1], [79, 49], [31, 97], [255, 1]], ids=str
)
def test_specialised_warps(
    chunks: list[int], group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Around their blocks and tiles; on a Hopper card, or emulated."""
    monkeypatch.setattr(_module("kernel"), "dense_kernel", lambda *_: "gluon")
    fused = torch.randn(sum(chunks), 2 * (group + 2), 64).to(dtype)
    with emulated():
        _compare(fused, 2, chunks)


@pytest.mark.skipif(DEVICE != CPU, reason="a card has as many multiprocessors as it has")
@pytest.mark.parametrize("processors", [1, 2, 5])
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("chunks", [[31, 97], [127, 1], [200, 56]], ids=str)
def test_specialised_warps_on_few_programs(
    chunks: list[int], group: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes through several blocks, the last of which may end with a tile that every query sees."""
    monkeypatch.setattr(_module("kernel"), "dense_kernel", lambda *_: "gluon")
    specialised = importlib.import_module("fastdms.ops.prefill_attention.specialised_kernel")
    monkeypatch.setattr(specialised, "_num_processors", lambda _: processors)
    with emulated():
        _compare(torch.randn(sum(chunks), 2 * (group + 2), 64).half(), 2, chunks)


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same, contiguous but beginning within 16 bytes."""
    moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("which", ["q", "k", "v", "odd rows"])
def test_specialised_warps_take_what_lies_anywhere(which: str) -> None:
    q, k, v = torch.randn(3, 70, 2, 64, device=DEVICE).half()
    given = {"q": q, "k": k, "v": v}
    if which == "odd rows":
        given["q"] = q[:1].new_empty(130)[:128].as_strided((1, 2, 64), (129, 64, 1)).copy_(q[69:])
    else:
        given[which] = _unaligned(given[which])
    with emulated():
        first = 70 - len(given["q"])
        out = _module("hopper").gluon(*given.values(), first, _SCALE)
        assert torch.equal(out, _module("hopper").gluon(q[first:].contiguous(), k, v, first, _SCALE))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-42])
def test_specialised_warps_under_any_scale(scale: float) -> None:
    q, k, v = torch.randn(3, 60, 2, 64).half()
    with emulated():
        out = _module("hopper").gluon(*(x.to(DEVICE) for x in (q, k, v)), 0, scale)
    assert_within_error_budget(
        out.cpu(), _part(q.float(), k.float(), v.float(), scale, True)[0].half(),
        _part(q.double(), k.double(), v.double(), scale, True)[0],
    )  # fmt: skip
