"""prefill_rope: decisions, zeroing and RoPE of prompt tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fastdms.ops import prefill_rope
from fastdms.ops.rope_decide import ZERO_MODES
from tests.ops.definition import prepare_token
from tests.ops.harness import (
    HEAD_SHAPES,
    KERNEL_DTYPES,
    assert_close_to_definition,
    on,
    split_heads,
)
from tests.tolerance import assert_within_error_budget

_EPS, _DECISION, _TABLE = 1e-5, (1.0, 0.05), 40


class _Case:
    """Random tokens in any order of positions, padding among them."""

    def __init__(
        self, heads: tuple[int, int, int], dtype: torch.dtype, *, zero: str, alpha: bool, norms: bool, tokens: int = 5
    ) -> None:
        num_kv_heads, group, head_dim = heads
        self.zero, self.num_kv_heads = zero, num_kv_heads
        self.positions = torch.tensor([7, -1, 0, _TABLE - 1, 7][:tokens], dtype=torch.int32)
        self.fused = torch.randn(tokens, (group + 2) * num_kv_heads, head_dim).to(dtype)
        self.alpha = torch.randn(num_kv_heads, tokens).to(dtype).T if alpha else None  # strided
        self.norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if norms else None
        angles = torch.rand(_TABLE, head_dim // 2) * 2 * math.pi
        self.cos, self.sin = angles.cos(), angles.sin()

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with on(backend) as device:
            q, k, _ = split_heads(self.fused.to(device), self.num_kv_heads)
            norms = [None, None] if self.norms is None else [x.to(device) for x in self.norms]
            q, k, decisions = prefill_rope(
                q, k, positions=self.positions.to(device), cos=self.cos.to(device), sin=self.sin.to(device),
                decision=_DECISION, zero_borrowed=self.zero, norm_eps=_EPS, q_norm=norms[0], k_norm=norms[1],
                alpha=None if self.alpha is None else self.alpha.to(device),
            )  # fmt: skip
        real = self.positions >= 0
        return q.cpu()[real], k.cpu()[real], decisions.cpu()[real]

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = []
        q, k, _ = split_heads(self.fused.double(), self.num_kv_heads)
        norms = None if self.norms is None else (self.norms[0].double(), self.norms[1].double())
        for t, position in enumerate(self.positions.tolist()):
            if position >= 0:
                angles = (self.cos[position].double(), self.sin[position].double())
                alpha = None if self.alpha is None else self.alpha[t].double()
                out.append(prepare_token(q[t], k[t], alpha, norms, _EPS, angles, _DECISION, self.zero))
        queries, keys, decisions = zip(*out, strict=True)
        return torch.stack(queries), torch.stack(keys), torch.tensor(decisions)

    def compare(self) -> None:
        """Reference against the definition, kernel within the reference's error; decisions exactly."""
        reference, kernel, oracle = self.run("reference"), self.run("kernel"), self.oracle()
        for mine, other, expected in zip(kernel[:2], reference[:2], oracle[:2], strict=True):
            assert_close_to_definition(other, expected)
            assert_within_error_budget(mine, other, expected)
        assert torch.equal(reference[2], oracle[2])
        assert torch.equal(kernel[2], oracle[2])


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("alpha", [False, True], ids=["borrowed", "alpha"])
@pytest.mark.parametrize("zero", ZERO_MODES)
def test_variants(zero: str, alpha: bool, norms: bool) -> None:
    _Case((2, 2, 16), torch.float32, zero=zero, alpha=alpha, norms=norms).compare()


@pytest.mark.parametrize(("dtype", "kv_dtype"), KERNEL_DTYPES[:4])
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_shapes_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    del kv_dtype
    _Case(heads, dtype, zero="pre_and_post_rope", alpha=False, norms=True).compare()


@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_reference_in_bf16(heads: tuple[int, int, int]) -> None:
    case = _Case(heads, torch.bfloat16, zero="pre_and_post_rope", alpha=True, norms=True)
    reference, oracle = case.run("reference"), case.oracle()
    for mine, expected in zip(reference[:2], oracle[:2], strict=True):
        assert_close_to_definition(mine, expected)
    assert torch.equal(reference[2], oracle[2])


def test_zero_modes_differ() -> None:
    """What each mode leaves in the borrowed channel of the first head of a group, and that no other head is touched."""
    torch.manual_seed(3)
    outputs = {}
    fused = torch.randn(2, 8, 16)  # 4 query heads, 2 KV heads
    angles = torch.rand(2, 8)
    for zero in ZERO_MODES:
        q, k, _ = split_heads(fused, 2)
        outputs[zero], *_ = prefill_rope(
            q, k, positions=torch.tensor([0, 1], dtype=torch.int32), cos=angles.cos(), sin=angles.sin(),
            decision=_DECISION, zero_borrowed=zero,
        )  # fmt: skip
    none, pre, both = (outputs[zero] for zero in ZERO_MODES)
    assert torch.equal(none[:, 1::2], pre[:, 1::2])
    assert torch.equal(none[:, 1::2], both[:, 1::2])
    assert torch.equal(pre[..., :-1], both[..., :-1])
    assert not both[:, ::2, -1].any()
    assert torch.allclose(pre[:, ::2, -1], fused[:, 0:4:2, 7] * angles.sin()[:, -1:])
    assert not torch.equal(none[:, ::2, 7], pre[:, ::2, 7])


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_padding_gives_finite_numbers_and_no_tokens_give_none(backend: str) -> None:
    with on(backend) as device:
        for tokens in (0, 2):
            q = torch.randn(tokens, 4, 16, device=device)
            tables = torch.rand(3, 8, device=device)
            q_out, k_out, decisions = prefill_rope(
                q, q[:, :2], positions=torch.full((tokens,), -1, dtype=torch.int32, device=device), cos=tables,
                sin=tables, decision=_DECISION, zero_borrowed="none",
            )  # fmt: skip
            assert (q_out.shape, k_out.shape, decisions.shape) == (q.shape, (tokens, 2, 16), (tokens, 2))
            assert q_out.isfinite().all()
            assert k_out.isfinite().all()


def test_bad_input_is_named() -> None:
    q, k = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
    good = {
        "positions": torch.zeros(2, dtype=torch.int32), "cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8),
        "decision": _DECISION, "zero_borrowed": "none",
    }  # fmt: skip
    for change, message in (
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions"),
        ({"zero_borrowed": "all"}, "zero_borrowed"),
        ({"q_norm": torch.ones(16)}, "q_norm"),
        ({"cos": torch.zeros(4, 16)}, "cos"),
        ({"sin": torch.zeros(4, 8, dtype=torch.float64)}, "sin"),
        ({"alpha": torch.zeros(2, 4)}, "alpha"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_rope(q, k, **{**good, **change})  # type: ignore[arg-type]
    for bad_q, bad_k, message in (
        (q[0], k, "q"),
        (q, k[:1], "q and k"),
        (torch.zeros(2, 3, 16), k, "heads"),
        (torch.zeros(2, 4, 15), torch.zeros(2, 2, 15), "head_dim"),
        (torch.zeros(2, 16, 4).transpose(1, 2), k, "stride"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_rope(bad_q, bad_k, **good)  # type: ignore[arg-type]
