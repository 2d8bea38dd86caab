"""Two attentions over disjoint keys become one over both."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_R = 16


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    a_ptr,
    a_lse_ptr,
    b_ptr,
    b_lse_ptr,
    out_ptr,
    rows,
    stride_lse_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = (e^la a + e^lb b) / (e^la + e^lb) for each row, which is a token and head, token by token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = row < rows
    at = row[:, None] * D + o_d[None, :]
    m = m_r[:, None] & (o_d < D)[None, :]
    p_lse = row % H * stride_lse_head + row // H
    a_lse = tl.load(a_lse_ptr + p_lse, mask=m_r, other=0.0)
    b_lse = tl.load(b_lse_ptr + p_lse, mask=m_r, other=0.0)
    largest = tl.maximum(a_lse, b_lse)
    a_weight, b_weight = tl.exp(a_lse - largest), tl.exp(b_lse - largest)
    b_a = tl.load(a_ptr + at, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b_ptr + at, mask=m, other=0.0).to(tl.float32)
    b_out = (a_weight[:, None] * b_a + b_weight[:, None] * b_b) / (a_weight + b_weight)[:, None]
    tl.store(out_ptr + at, b_out.to(out_ptr.dtype.element_ty), mask=m)


def merge(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor) -> torch.Tensor:
    """Outputs ``[T, H, D]`` with their log-sum-exps ``[H, T]`` fp32, all contiguous -> ``[T, H, D]``."""
    tokens, heads, head_dim = a.shape
    out = torch.empty_like(a)
    rows = tokens * heads
    _merge_kernel[(triton.cdiv(rows, _BLOCK_R),)](
        a, a_lse, b, b_lse, out, rows, tokens,
        H=heads, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_R=_BLOCK_R, num_warps=4,
    )  # fmt: skip
    return out
