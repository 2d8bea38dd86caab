"""Triton backend of dequantise: one program per ROWS pieces of BLOCK weights, each of another row."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
# mypy: disable-error-code="var-annotated, unreachable"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdms.ops.decode_linear.int4_kernel import int4_numbers
from fastdms.ops.int4 import INT4, PER_WORD

_WARPS = 4
_BLOCK = 8 * 32 * _WARPS  # eight of a row's weights a thread: 16-bit results leave as 16 bytes, without gaps
_ROWS = 4
_PER_WORD = tl.constexpr(PER_WORD)


@triton.jit
def _place(K, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The first row and the first column of a program; most of its neighbours work on the same rows."""
    blocks = tl.cdiv(K, BLOCK)
    return tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _dequantise_fp8_kernel(weight_ptr, scale_ptr, out_ptr, N, K, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[n, k] = weight[n, k] * scale[n], the product in fp32."""
    row, column = _place(K, BLOCK, ROWS)
    o_k = column + tl.arange(0, BLOCK)
    weights, scales = (), ()
    for i in tl.static_range(ROWS):  # all of them are under way before the first is needed
        m_k = o_k < tl.where(row + i < N, K, 0)
        p_row = weight_ptr + (row + i).to(tl.int64) * K
        weights += (tl.load(p_row + o_k, mask=m_k, other=0.0, eviction_policy="evict_first"),)
        scales += (tl.load(scale_ptr + row + i, mask=row + i < N, other=0.0),)
    for i in tl.static_range(ROWS):
        b_out = weights[i].to(tl.float32) * scales[i]
        p_out = out_ptr + (row + i).to(tl.int64) * K
        tl.store(p_out + o_k, b_out.to(out_ptr.dtype.element_ty), mask=o_k < tl.where(row + i < N, K, 0))


@triton.jit
def _dequantise_int4_kernel(
    weight_ptr, scale_ptr, out_ptr, N, K, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """out[n, k] = q[n, k] * scale[n, k // GROUP], the product in fp32."""
    WORDS: tl.constexpr = BLOCK // _PER_WORD
    row, column = _place(K, BLOCK, ROWS)
    o_w = column // _PER_WORD + tl.arange(0, WORDS)
    o_out = o_w[:, None] * _PER_WORD + tl.arange(0, _PER_WORD)[None, :]
    words, scales = (), ()
    for i in tl.static_range(ROWS):
        m_w = o_w < tl.where(row + i < N, K // _PER_WORD, 0)
        i_n = (row + i).to(tl.int64)
        p_w = weight_ptr + i_n * (K // _PER_WORD) + o_w
        words += (tl.load(p_w, mask=m_w, other=0, eviction_policy="evict_first"),)
        p_scale = scale_ptr + i_n * (K // GROUP) + o_w // (GROUP // _PER_WORD)
        scales += (tl.load(p_scale, mask=m_w, other=0.0),)
    for i in tl.static_range(ROWS):
        m_w = o_w < tl.where(row + i < N, K // _PER_WORD, 0)
        q = int4_numbers(words[i], False)
        # Pairs of pairs of pairs, which stay in the thread that has the word.
        b_even = tl.join(tl.join(q[0], q[4]), tl.join(q[2], q[6]))
        b_odd = tl.join(tl.join(q[1], q[5]), tl.join(q[3], q[7]))
        b_q = tl.reshape(tl.join(b_even, b_odd), [WORDS, _PER_WORD])
        b_out = b_q * scales[i].to(tl.float32)[:, None]
        p_out = out_ptr + (row + i).to(tl.int64) * K
        tl.store(p_out + o_out, b_out.to(out_ptr.dtype.element_ty), mask=m_w[:, None])


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = weight.shape
    packed = weight.dtype == INT4
    columns *= PER_WORD if packed else 1
    out = weight.new_empty((rows, columns), dtype=dtype)
    grid = (triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _BLOCK),)
    shared = {"BLOCK": _BLOCK, "ROWS": _ROWS, "num_warps": _WARPS}
    if packed:
        group = columns // scale.shape[1]
        _dequantise_int4_kernel[grid](weight, scale, out, rows, columns, GROUP=group, **shared)
    else:
        _dequantise_fp8_kernel[grid](weight, scale, out, rows, columns, **shared)
    return out
