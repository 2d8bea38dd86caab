"""Triton backend of decode_linear: one kernel for several rows, whose programs share the output channels.

Rows are padded to 16 and no sum is split over programs, so that a row's result hangs on nothing but the row. A single
row has a kernel of its own.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.decode_linear.schema import MOST_ROWS
from fastdms.ops.decode_linear.vector_kernel import decode_vector, fits, scale_and_bias
from fastdms.ops.triton_common import dependent_launch, dot_dtype

_PREFETCH_BYTES = 32768  # of its weights that a program asks for while earlier kernels still run
_VECTOR_BYTES = 16
# Four fp8 numbers to bf16: with its bits moved to their places there each is itself times 2^-120, subnormals too.
# Adding -0 changes nothing, but the product alone has no instruction before sm_90.
_FP8_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, s, t, p, z;
mov.b32 p, 0x7b807b80;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 s, a, 4;
shr.b32 t, b, 4;
and.b32 s, s, 0x07f007f0;
and.b32 t, t, 0x07f007f0;
lop3.b32 a, a, z, s, 0xea;
lop3.b32 b, b, z, t, 0xea;
fma.rn.bf16x2 $0, a, p, z;
fma.rn.bf16x2 $1, b, p, z;
}""")


class Tile(NamedTuple):
    """Output channels of a program (twice as many rows of weights with swiglu), columns of a tile, warps, stages.

    Each warp multiplies its own share of the columns, at least 16 of them, and the warps' sums are added in the end.
    """

    channels: int
    depth: int
    warps: int
    stages: int


def tile(n: int, k: int, element_bytes: int, swiglu: bool) -> Tile:
    """The cut for ``n`` output channels of ``k`` weights, ``element_bytes`` each: near the best that was tried
    (``docs/lab-notes.md``), within the shared memory of every card."""
    if element_bytes == 4:
        return Tile(channels=16, depth=64, warps=4, stages=2)
    most = max(64, triton.next_power_of_2(k))
    if swiglu:
        return Tile(channels=32, depth=min(256, most), warps=4, stages=3 if element_bytes == 2 else 4)
    if n >= 2**14:
        return Tile(channels=32, depth=min(256, most), warps=4, stages=4)
    return Tile(channels=16, depth=min(512, most), warps=4, stages=3)


@triton.jit
def _prefetch_weights(
    weight_ptr,
    first,
    last,
    far,
    row_bytes,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    THREADS: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Asks L2 for the first columns of a program's rows of weights, BYTES by each thread; each thread asks once.

    first, last: rows; past ``last`` it is asked for again. far: how many rows lie between gate and up.
    """
    PER_ROW: tl.constexpr = THREADS // ROWS
    o_t = tl.arange(0, THREADS)
    i_row = o_t // PER_ROW
    if SWIGLU:
        row = tl.minimum(first + i_row % (ROWS // 2), last) + i_row // (ROWS // 2) * far
    else:
        row = tl.minimum(first + i_row, last)
    column = tl.minimum(o_t % PER_ROW * BYTES, row_bytes - BYTES)
    address = weight_ptr.to(tl.int64) + row.to(tl.int64) * row_bytes + column
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, tl.full([THREADS], BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_weights(weight_ptr, o_n, o_k, k, K, EVEN_K: tl.constexpr):
    """``[WARPS, BLOCK_N, PART_K]``: columns ``k + o_k`` of the rows ``o_n``; zero past K."""
    at = weight_ptr + o_n.to(tl.int64)[None, :, None] * K + (k + o_k)[:, None, :]
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(k + o_k < K)[:, None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _to_dot(b_w, DOT: tl.constexpr):
    """Weights as the matrix units take them; fp8 must be no NaN. The compiler's own conversion to bf16 is slow."""
    if b_w.dtype == tl.float8e4nv and tl.bfloat16 == DOT:
        b_bits = b_w.to(tl.uint8, bitcast=True)
        return tl.inline_asm_elementwise(_FP8_TO_BF16, "=r,=r,r", [b_bits], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return b_w.to(DOT)


@triton.jit
def _load_rows(x_ptr, stride_x_row, o_r, m_r, o_k, k, K, EVEN_K: tl.constexpr):
    """``[WARPS, ROWS, PART_K]``: columns ``k + o_k`` of x; zero past the last row and past K."""
    at = x_ptr + o_r.to(tl.int64)[None, :, None] * stride_x_row + (k + o_k)[:, None, :]
    if EVEN_K:
        return tl.load(at, mask=m_r[None, :, None], other=0.0)
    else:
        return tl.load(at, mask=m_r[None, :, None] & (k + o_k < K)[:, None, :], other=0.0)


@triton.jit(do_not_specialize=["B"])
def _decode_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    stride_x_row,
    stride_residual_row,
    B,
    N,
    K,
    norm_eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """out = act(inverse * (x * norm) weight^T * scale + bias) + residual, inverse = 1 / sqrt(mean(x^2) + eps)."""
    if DEPENDENT:
        gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_N
    if PREFETCH > 0:
        _prefetch_weights(
            weight_ptr, first, N - 1, N, K * weight_ptr.dtype.element_ty.primitive_bitwidth // 8,
            2 * BLOCK_N if SWIGLU else BLOCK_N, PREFETCH, 32 * WARPS, SWIGLU,
        )  # fmt: skip
    if DEPENDENT:  # all programs wait: that this kernel has ended says that those before it have
        gdc_wait()
    PART_K: tl.constexpr = BLOCK_K // WARPS
    o_r = tl.arange(0, ROWS)
    o_k = tl.arange(0, WARPS)[:, None] * PART_K + tl.arange(0, PART_K)[None, :]  # [WARPS, PART_K]
    m_r = o_r < B
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_n = tl.minimum(o_n, N - 1)
    b_inverse = tl.full([ROWS], 1.0, tl.float32)
    # fp16 can't hold every x * norm whose normalised value it holds, so there the rows are normalised first.
    NORM_FIRST: tl.constexpr = HAS_NORM and tl.float16 == DOT
    b_squares = tl.zeros([WARPS, ROWS, PART_K], tl.float32)
    if NORM_FIRST:
        for k in range(0, K, BLOCK_K):
            b_x = _load_rows(x_ptr, stride_x_row, o_r, m_r, o_k, k, K, EVEN_K).to(tl.float32)
            b_squares += b_x * b_x
        b_inverse = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(b_squares, 2), 0) / K + norm_eps)
    acc = tl.zeros([WARPS, ROWS, BLOCK_N], tl.float32)
    acc_up = tl.zeros([WARPS, ROWS, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = _load_rows(x_ptr, stride_x_row, o_r, m_r, o_k, k, K, EVEN_K)
        if HAS_NORM:
            b_norm = tl.load(norm_ptr + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
            b_x = b_x.to(tl.float32)
            if NORM_FIRST:
                b_x *= b_inverse[None, :, None]
            else:
                b_squares += b_x * b_x
            b_x = (b_x * b_norm[:, None, :]).to(DOT)
        b_w = _to_dot(_load_weights(weight_ptr, o_n, o_k, k, K, EVEN_K), DOT)
        acc = tl.dot(b_x, tl.permute(b_w, (0, 2, 1)), acc, input_precision="ieee")
        if SWIGLU:
            b_up = _to_dot(_load_weights(weight_ptr, o_n + N, o_k, k, K, EVEN_K), DOT)
            acc_up = tl.dot(b_x, tl.permute(b_up, (0, 2, 1)), acc_up, input_precision="ieee")
    acc = tl.sum(acc, 0)
    acc_up = tl.sum(acc_up, 0)
    if HAS_NORM and not NORM_FIRST:
        b_inverse = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(b_squares, 2), 0) / K + norm_eps)
        acc *= b_inverse[:, None]
        acc_up *= b_inverse[:, None]
    acc = scale_and_bias(acc, scale_ptr, bias_ptr, o_n, HAS_SCALE, HAS_BIAS)
    if SWIGLU:
        acc_up = scale_and_bias(acc_up, scale_ptr, bias_ptr, o_n + N, HAS_SCALE, HAS_BIAS)
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    m_out = m_r[:, None] & m_n[None, :]
    if HAS_RESIDUAL:
        p_residual = residual_ptr + o_r.to(tl.int64)[:, None] * stride_residual_row + o_n[None, :]
        acc += tl.load(p_residual, mask=m_out, other=0.0).to(tl.float32)
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_eps: float,
    residual: torch.Tensor | None,
    swiglu: bool,
    fp32_out: bool,
) -> torch.Tensor:
    rows, k = x.shape
    n = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = x.new_empty((rows, n), dtype=torch.float32 if fp32_out else x.dtype)
    if rows == 0:
        return out
    if rows == 1 and fits(x, weight, norm):
        decode_vector(x, weight, scale, bias, norm, norm_eps, residual, out, swiglu)
        return out
    cut = tile(n, k, 4 if x.dtype == torch.float32 else weight.element_size(), swiglu)
    dependent = dependent_launch(x.device)
    _decode_linear_kernel[(triton.cdiv(n, cut.channels),)](
        x, weight, scale, bias, norm, residual, out, x.stride(0), n if residual is None else residual.stride(0),
        rows, n, k, norm_eps, ROWS=MOST_ROWS, BLOCK_N=cut.channels, BLOCK_K=cut.depth, WARPS=cut.warps,
        EVEN_K=k % cut.depth == 0, DOT=dot_dtype(x.dtype, weight.dtype), HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None, HAS_NORM=norm is not None, HAS_RESIDUAL=residual is not None, SWIGLU=swiglu,
        PREFETCH=prefetch_bytes(weight, cut, swiglu) if dependent["DEPENDENT"] else 0,
        num_warps=cut.warps, num_stages=cut.stages, **dependent,
    )  # fmt: skip
    return out


def prefetch_bytes(weight: torch.Tensor, cut: Tile, swiglu: bool) -> int:
    """What each thread of a program asks L2 for: whole vectors within a row of the weight; 0 where rows aren't any."""
    row_bytes = weight.shape[1] * weight.element_size()
    if row_bytes % _VECTOR_BYTES or weight.data_ptr() % _VECTOR_BYTES:
        return 0
    threads, rows = 32 * cut.warps, cut.channels * (2 if swiglu else 1)
    vectors: int = triton.cdiv(row_bytes * rows // threads, _VECTOR_BYTES)
    return min(_PREFETCH_BYTES // threads, vectors * _VECTOR_BYTES)
