"""Triton backend of decode_linear: for several rows a kernel whose programs share the output channels.

No sum is split over programs, so that a row's result hangs on nothing but the row. Their norm is a kernel of its own,
beside which the weights are on their way already. A single row has another, and on Hopper normed rows of many channels.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.decode_linear.int4_kernel import even_and_odd, int4_dot, int4_scales
from fastdms.ops.decode_linear.vector_kernel import (
    decode_vector,
    fits,
    group_and_bits,
    load_scale_and_bias,
    scale_and_bias,
)
from fastdms.ops.triton_common import dependent_launch, dot_dtype, on_hopper, power_of_two

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


def tile(n: int, k: int, bits: int, swiglu: bool, group: int = 0) -> Tile:
    """The cut for ``n`` output channels of ``k`` weights of ``bits`` that measured best (``docs/lab-notes.md``): where
    channels are few, as many programs as a card has multiprocessors.

    bits: 32 also for fp32 rows. group: of int4 weights; each warp's share of the columns is one.
    """
    if bits == 32:
        return Tile(channels=16, depth=4 * group or 64, warps=4, stages=2)
    if bits == 4:
        if swiglu:
            return Tile(channels=16, depth=4 * group, warps=4, stages=2)
        if n > 2**12:
            return Tile(channels=32, depth=8 * group, warps=8, stages=3)
        if k > 2**12:
            return Tile(channels=16, depth=8 * group, warps=8, stages=7)
        if n > 2**11:
            return Tile(channels=16, depth=4 * group, warps=4, stages=4)
        return Tile(channels=16, depth=8 * group, warps=8, stages=3)
    most = max(64, triton.next_power_of_2(k))
    if swiglu and bits == 16:
        return Tile(channels=32, depth=min(256, most), warps=4, stages=4)
    if swiglu or n >= 2**14:
        return Tile(channels=32, depth=min(512, most), warps=4, stages=3)
    if n > 2**12:
        return Tile(channels=64, depth=min(256, most), warps=4, stages=4)
    if n > 2**11:
        return Tile(channels=32, depth=min(512, most), warps=4, stages=4 if bits == 16 else 6)
    if bits == 16:
        return Tile(channels=16, depth=min(1024, most), warps=4, stages=4)
    return Tile(channels=16, depth=min(512, most), warps=4, stages=9 if k > 2**12 else 6)


def _stages(cut: Tile, column_bits: int, device: torch.device) -> int:
    """As many stages of ``cut`` as fit the shared memory of ``device``, which holds all but one of them."""
    if device.type != "cuda":
        return cut.stages
    memory: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return min(cut.stages, 8 * memory // (cut.depth * column_bits) + 1)


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
def _load_rows(x_ptr, stride_x_row, o_r, o_k, k, K, EVEN_K: tl.constexpr):
    """``[WARPS, PART_K, ROWS]``: columns ``k + o_k`` of the rows ``o_r`` of x; zero past K."""
    at = x_ptr + o_r.to(tl.int64)[None, None, :] * stride_x_row + (k + o_k)[:, :, None]
    return tl.load(at) if EVEN_K else tl.load(at, mask=(k + o_k < K)[:, :, None], other=0.0)


@triton.jit
def _to_dot(b_w, DOT: tl.constexpr):
    """Weights as the matrix units take them; fp8 must be no NaN. The compiler's own conversion to bf16 is slow."""
    if b_w.dtype == tl.float8e4nv and tl.bfloat16 == DOT:
        b_bits = b_w.to(tl.uint8, bitcast=True)
        return tl.inline_asm_elementwise(_FP8_TO_BF16, "=r,=r,r", [b_bits], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return b_w.to(DOT)


@triton.jit(do_not_specialize=["B"])
def _decode_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    power_ptr,
    out_ptr,
    stride_x_row,
    stride_residual_row,
    B,
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POWER: tl.constexpr,
    SWIGLU: tl.constexpr,
    GROUP: tl.constexpr,
    BY_HAND: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """out = act(power x weight^T * scale + bias) + residual; channels go down and rows across.

    GROUP: of int4 weights, which are read as bytes; 0 for others.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_N
    if PREFETCH > 0:
        _prefetch_weights(
            weight_ptr, first, N - 1, N, K * (4 if GROUP else weight_ptr.dtype.element_ty.primitive_bitwidth) // 8,
            2 * BLOCK_N if SWIGLU else BLOCK_N, PREFETCH, 32 * WARPS, SWIGLU,
        )  # fmt: skip
    PART_K: tl.constexpr = BLOCK_K // WARPS
    o_r = tl.arange(0, ROWS)
    o_k = tl.arange(0, WARPS)[:, None] * PART_K + tl.arange(0, PART_K)[None, :]  # [WARPS, PART_K]
    m_r = o_r < B
    o_r = tl.minimum(o_r, B - 1)
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_n = tl.minimum(o_n, N - 1)
    m_out = m_r[:, None] & m_n[None, :]
    # A group's scales are on their way a step ahead, and what follows the sums before them.
    b_group, b_group_up = 0.0, 0.0
    if GROUP > 0:
        b_group = int4_scales(scale_ptr, o_n, 0, K, WARPS, GROUP)
        if SWIGLU:
            b_group_up = int4_scales(scale_ptr, o_n + N, 0, K, WARPS, GROUP)
    b_scale, b_bias, b_scale_up, b_bias_up = load_scale_and_bias(
        scale_ptr, bias_ptr, o_n, N, SWIGLU, HAS_SCALE, HAS_BIAS
    )
    if DEPENDENT:  # all programs wait: that this kernel has ended says that those before it have
        gdc_wait()
    if HAS_POWER:
        b_power = tl.load(power_ptr + o_r)[:, None]
    if HAS_RESIDUAL:
        p_residual = residual_ptr + o_r.to(tl.int64)[:, None] * stride_residual_row + o_n[None, :]
        b_residual = tl.load(p_residual, mask=m_out, other=0.0)
    acc = tl.zeros([WARPS, BLOCK_N, ROWS], tl.float32)
    acc_up = tl.zeros([WARPS, BLOCK_N, ROWS], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = _load_rows(x_ptr, stride_x_row, o_r, o_k, k, K, EVEN_K).to(DOT)
        if GROUP > 0:
            b_even, b_odd = even_and_odd(b_x)
            acc = int4_dot(acc, weight_ptr, b_group, o_n, b_even, b_odd, k, K, GROUP, EVEN_K, DOT, BY_HAND)
            b_group = int4_scales(scale_ptr, o_n, k + BLOCK_K, K, WARPS, GROUP)
            if SWIGLU:
                acc_up = int4_dot(
                    acc_up, weight_ptr, b_group_up, o_n + N, b_even, b_odd, k, K, GROUP, EVEN_K, DOT, BY_HAND
                )  # fmt: skip
                b_group_up = int4_scales(scale_ptr, o_n + N, k + BLOCK_K, K, WARPS, GROUP)
        else:
            b_w = _to_dot(_load_weights(weight_ptr, o_n, o_k, k, K, EVEN_K), DOT)
            acc = tl.dot(b_w, b_x, acc, input_precision="ieee")
            if SWIGLU:
                b_up = _to_dot(_load_weights(weight_ptr, o_n + N, o_k, k, K, EVEN_K), DOT)
                acc_up = tl.dot(b_up, b_x, acc_up, input_precision="ieee")
    acc = tl.trans(tl.sum(acc, 0))  # [ROWS, BLOCK_N]
    acc_up = tl.trans(tl.sum(acc_up, 0))
    if HAS_POWER:
        acc *= b_power
        acc_up *= b_power
    acc = scale_and_bias(acc, b_scale, b_bias, HAS_SCALE, HAS_BIAS)
    if SWIGLU:
        acc_up = scale_and_bias(acc_up, b_scale_up, b_bias_up, HAS_SCALE, HAS_BIAS)
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if HAS_RESIDUAL:
        acc += b_residual.to(tl.float32)
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _norm_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    power_ptr,
    stride_x_row,
    K,
    norm_eps,
    low,
    BLOCK_K: tl.constexpr,
    FORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = x / sqrt(mean(x^2) + eps) * norm / power, a program for each row.

    FORM: "plain", power is 1; "fp16", it is a power of two after which none of the row's numbers is above one; "parts",
    after which none is above 256, and out is their e4m3: four significant bits of each, and in the row ``low`` rows
    below 16 times what they leave over.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_norm = tl.load(norm_ptr + o_k, mask=m_k, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    b_x = tl.load(x_ptr + row * stride_x_row + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_x *= 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / K + norm_eps)
    b_x *= b_norm
    if FORM != "plain":
        power = power_of_two(tl.max(tl.abs(b_x), 0))
        b_x /= power
        tl.store(power_ptr + row, power / 256.0 if FORM == "parts" else power)
    p_out = out_ptr + row * K + o_k
    if FORM == "parts":
        b_x *= 256.0
        b_bits = (b_x.to(tl.int32, bitcast=True) + (1 << 19)) & -(1 << 20)
        b_high = b_bits.to(tl.float32, bitcast=True)
        # Below 2^-6 e4m3 has multiples of 2^-9, as fp32 has around 2^14.
        b_high = tl.where(tl.abs(b_x) < 0.015625, (b_x + 24576.0) - 24576.0, b_high)
        tl.store(p_out, b_high.to(tl.float8e4nv), mask=m_k)
        tl.store(p_out + low * K, ((b_x - b_high) * 16.0).to(tl.float8e4nv), mask=m_k)
    else:
        tl.store(p_out, b_x.to(out_ptr.dtype.element_ty), mask=m_k)


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
    dependent = dependent_launch(x.device)
    power = None
    if norm is not None:
        hopper = _hopper_kernel(x, weight, residual)
        form, dtype, low = "plain", x.dtype, 0
        if x.dtype == torch.bfloat16 and weight.dtype == torch.float8_e4m3fn:
            # fp8 becomes fp16 in one instruction, and bf16 in five; but fp16 can't hold every bf16.
            form, dtype, power = "fp16", torch.float16, x.new_empty(rows, dtype=torch.float32)
            if hopper:
                form, dtype, low = "parts", torch.float8_e4m3fn, hopper.padded_rows(rows)
        normed = x.new_empty((2 * low or rows, k), dtype=dtype)
        _norm_kernel[(rows,)](
            x, norm, normed, power, x.stride(0), k, norm_eps, low, BLOCK_K=triton.next_power_of_2(k), FORM=form,
            num_warps=min(16, triton.next_power_of_2(triton.cdiv(k, 512))), **dependent,
        )  # fmt: skip
        if hopper:
            hopper.decode_hopper(normed, power, weight, scale, bias, out, swiglu)
            return out
        x = normed
    group, bits = group_and_bits(weight, scale, x)
    cut = tile(n, k, 32 if x.dtype == torch.float32 else bits, swiglu, group)
    padded = max(8, triton.next_power_of_2(rows))
    column_bits = cut.channels * (2 if swiglu else 1) * bits + padded * 8 * x.element_size()
    _decode_linear_kernel[(triton.cdiv(n, cut.channels),)](
        x, weight.view(torch.uint8) if group else weight, scale, bias, residual, power, out, x.stride(0),
        n if residual is None else residual.stride(0),
        rows, n, k, ROWS=padded, BLOCK_N=cut.channels, BLOCK_K=cut.depth, WARPS=cut.warps,
        EVEN_K=k % cut.depth == 0, DOT=dot_dtype(x.dtype, weight.dtype), HAS_SCALE=scale is not None and not group,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_POWER=power is not None, SWIGLU=swiglu,
        GROUP=group, BY_HAND=x.is_cuda, PREFETCH=prefetch_bytes(weight, cut, swiglu) if dependent["DEPENDENT"] else 0,
        num_warps=cut.warps, num_stages=_stages(cut, column_bits, x.device), **dependent,
    )  # fmt: skip
    return out


def _hopper_kernel(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> ModuleType | None:
    """The module of the kernel for normed rows and many channels, where it fits."""
    if residual is not None or not on_hopper(x.device):
        return None
    from fastdms.ops.decode_linear import hopper_kernel  # Gluon only where it is used

    return hopper_kernel if hopper_kernel.is_supported(x, weight) else None


def prefetch_bytes(weight: torch.Tensor, cut: Tile, swiglu: bool) -> int:
    """What each thread of a program asks L2 for: whole vectors within a row of the weight; 0 where rows aren't any."""
    row_bytes = weight.shape[1] * weight.element_size()
    if row_bytes % _VECTOR_BYTES or weight.data_ptr() % _VECTOR_BYTES:
        return 0
    threads, rows = 32 * cut.warps, cut.channels * (2 if swiglu else 1)
    vectors: int = triton.cdiv(row_bytes * rows // threads, _VECTOR_BYTES)
    return min(_PREFETCH_BYTES // threads, vectors * _VECTOR_BYTES)
