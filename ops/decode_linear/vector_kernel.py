"""Triton backend of decode_linear for one row: a matrix times a vector, without the matrix units.

Programs are small and many, so that several share a multiprocessor: while some wait, others load. Each asks for its
first weights before it waits for the kernel ahead. A thread loads four words of 32 bits at a time, adds up what lies in
them for every channel, and only these sums meet in the end.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.decode_linear.int4_kernel import fixed_dot, fixed_point, int4_numbers
from fastdms.ops.int4 import INT4, PER_WORD
from fastdms.ops.triton_common import dependent_launch

_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    INT4: tl.int32,
}
_FP8_TO_FP32 = tl.constexpr("""{
.reg .b16 l, h, a, b;
.reg .b32 p, q;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 p, l;
cvt.rn.f16x2.e4m3x2 q, h;
mov.b32 {a, b}, p;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
mov.b32 {a, b}, q;
cvt.f32.f16 $2, a;
cvt.f32.f16 $3, b;
}""")


class Tile(NamedTuple):
    """Output channels of a program (twice as many rows of weights with swiglu), its warps, and how many loads of four
    words from each row a thread has under way."""

    channels: int
    warps: int
    loads: int = 1


def tile(n: int, k: int, bits: int, swiglu: bool) -> Tile:
    """The cut for ``n`` output channels of ``k`` weights, ``bits`` each, that measured best (``docs/lab-notes.md``):
    where a row of weights is long or channels are few, more warps share a row."""
    if bits == 4:
        if n >= 2**13:
            return Tile(channels=8, warps=1)
        if k > 2**11:
            return Tile(channels=4, warps=4, loads=1 if swiglu else 2)
        return Tile(channels=4 if n > 2**11 else 2, warps=2)
    if swiglu:
        return Tile(channels=4, warps=1) if bits == 8 else Tile(channels=2, warps=2, loads=4)
    if n >= 2**13:
        return Tile(channels=4, warps=1) if bits == 8 else Tile(channels=4, warps=1, loads=2)
    if k >= 2**13:
        return Tile(channels=2 if bits == 8 else 1, warps=4, loads=2)
    if bits == 8:
        return Tile(channels=4, warps=4)
    return Tile(channels=2, warps=4, loads=2 if n <= 2**11 else 1)


@triton.jit
def _halves(parts, WIDTH: tl.constexpr):
    """Each of ``parts``, ``[.., WIDTH]``, as the two of its even and its odd columns, ``[.., WIDTH / 2]``."""
    halves = ()
    for i in tl.static_range(len(parts)):
        part = parts[i]
        if WIDTH > 2:
            part = tl.reshape(part, part.shape[:-1] + [WIDTH // 2, 2])  # noqa: RUF005  (Triton has no star)
        even, odd = tl.split(part)
        halves += (even, odd)
    return halves


@triton.jit
def _numbers(word, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """The one, two, four or eight numbers of each 32-bit word, in fp32."""
    if tl.float32 == DTYPE:
        return (word.to(tl.float32, bitcast=True),)
    elif tl.bfloat16 == DTYPE:  # the upper half of the fp32 of its value
        return ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    elif tl.float16 == DTYPE:
        lower, upper = word.to(tl.int16), (word >> 16).to(tl.int16)
        return (lower.to(tl.float16, bitcast=True).to(tl.float32), upper.to(tl.float16, bitcast=True).to(tl.float32))
    elif tl.int32 == DTYPE:
        return int4_numbers(word, BY_HAND)
    else:
        return tl.inline_asm_elementwise(
            _FP8_TO_FP32, "=f,=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _four(words):
    """Words ``[.., W]`` as four of ``[.., W / 4]``; a thread has its own."""
    shape: tl.constexpr = words.shape
    quads = tl.reshape(words, shape[:-1] + [shape[-1] // 4, 4])  # noqa: RUF005
    parts = _halves(_halves((quads,), 4), 2)
    return parts[0], parts[2], parts[1], parts[3]


@triton.jit
def _by_column(words, DTYPE: tl.constexpr, BY_HAND: tl.constexpr = True):
    """Words ``[.., W]`` as fp32 tensors ``[.., W / 4]``, one for each number in four words; a thread has its own."""
    four = _four(words)
    columns = ()
    for i in tl.static_range(4):
        columns += _numbers(four[i], DTYPE, BY_HAND)
    return columns


@triton.jit
def _load_pieces(ptr, first, words, BLOCK: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr):
    """What of x or norm goes with the weights in the BLOCK words from ``first`` on; zero past ``words`` words.

    A number here takes PIECES times the bytes of a weight, and each thread as many loads.
    """
    o_w = tl.arange(0, BLOCK)
    pieces = ()
    for i in tl.static_range(PIECES):
        at = first * PIECES + o_w // 4 * (4 * PIECES) + 4 * i + o_w % 4
        pieces += (tl.load(ptr + at) if EVEN else tl.load(ptr + at, mask=at < words * PIECES, other=0),)
    return pieces


@triton.jit
def _columns_of(pieces, DTYPE: tl.constexpr):
    """The numbers in ``pieces``, in the order of the weights' columns."""
    columns = ()
    for i in tl.static_range(len(pieces)):
        columns += _by_column(pieces[i], DTYPE)
    return columns


@triton.jit
def _load_scales(scale_ptr, o_n, first, words, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """``[BLOCK_N, BLOCK / 4]``, as stored: scales of the int4 weights in every four words from ``first`` on."""
    o_w = first + 4 * tl.arange(0, BLOCK // 4)
    p_scale = scale_ptr + o_n.to(tl.int64)[:, None] * (words * 8 // GROUP) + (o_w * 8 // GROUP)[None, :]
    return tl.load(p_scale, mask=(o_w < words)[None, :], other=0.0)


@triton.jit
def load_scale_and_bias(
    scale_ptr, bias_ptr, o_n, N, SWIGLU: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Scales and biases of the output channels ``o_n``, and with SWIGLU of those N further on, as stored; 1 and 0 where
    there are none."""
    b_scale, b_bias = 1.0, 0.0
    if HAS_SCALE:
        b_scale = tl.load(scale_ptr + o_n)
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_n)
    b_scale_up, b_bias_up = b_scale, b_bias
    if SWIGLU and HAS_SCALE:
        b_scale_up = tl.load(scale_ptr + (o_n + N))
    if SWIGLU and HAS_BIAS:
        b_bias_up = tl.load(bias_ptr + (o_n + N))
    return b_scale, b_bias, b_scale_up, b_bias_up


@triton.jit
def scale_and_bias(acc, b_scale, b_bias, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``acc`` has the output channels in its last dim."""
    if HAS_SCALE:
        acc *= b_scale
    if HAS_BIAS:
        acc += b_bias.to(tl.float32)
    return acc


@triton.jit
def _decode_vector_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    N,
    K,
    words,
    norm_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PIECES: tl.constexpr,
    EVEN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    GROUP: tl.constexpr,
    FIXED: tl.constexpr,
    BY_HAND: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = act(inverse * weight (x * norm) * scale + bias) + residual, inverse = 1 / sqrt(mean(x^2) + eps).

    words: of 32 bits, that a row of K weights takes; x, weight and norm are read so. GROUP: of int4 weights, in each of
    which a thread's four words lie whole; 0 for others. FIXED: these are multiplied as whole numbers.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    o_out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tl.minimum(o_out, N - 1)
    o_w = tl.arange(0, BLOCK_W)
    p_w = weight_ptr + o_n.to(tl.int64)[:, None] * words + o_w[None, :]
    p_up = weight_ptr + (o_n.to(tl.int64) + N)[:, None] * words + o_w[None, :]
    b_w = tl.load(p_w, mask=(o_w < words)[None, :], other=0, eviction_policy="evict_first")
    b_up = b_w
    if SWIGLU:
        b_up = tl.load(p_up, mask=(o_w < words)[None, :], other=0, eviction_policy="evict_first")
    b_group, b_group_up = 0.0, 0.0
    if GROUP > 0:
        b_group = _load_scales(scale_ptr, o_n, 0, words, BLOCK_W, GROUP)
        b_group_up = b_group
        if SWIGLU:
            b_group_up = _load_scales(scale_ptr, o_n + N, 0, words, BLOCK_W, GROUP)
    norms = ()
    if HAS_NORM:
        norms = _load_pieces(norm_ptr, 0, words, BLOCK_W, PIECES, False)
    # What follows the sums is on its way before them, too.
    b_scale, b_bias, b_scale_up, b_bias_up = load_scale_and_bias(
        scale_ptr, bias_ptr, o_n, N, SWIGLU, HAS_SCALE, HAS_BIAS
    )
    if DEPENDENT:  # all programs wait: that this kernel has ended says that those before it have
        gdc_wait()
    if HAS_RESIDUAL:
        b_residual = tl.load(residual_ptr + o_n)
    b_sum = tl.zeros([BLOCK_N, BLOCK_W // 4], tl.float32)
    b_sum_up = tl.zeros([BLOCK_N, BLOCK_W // 4], tl.float32)
    b_squares = tl.zeros([BLOCK_W // 4], tl.float32)
    for first in range(0, words, BLOCK_W):
        columns = _four(b_w) if FIXED else _by_column(b_w, W_DTYPE, BY_HAND)
        columns_up = columns
        m_next = (first + BLOCK_W + o_w < words)[None, :]
        b_w = tl.load(p_w + first + BLOCK_W, mask=m_next, other=0, eviction_policy="evict_first")
        if SWIGLU:
            columns_up = _four(b_up) if FIXED else _by_column(b_up, W_DTYPE, BY_HAND)
            b_up = tl.load(p_up + first + BLOCK_W, mask=m_next, other=0, eviction_policy="evict_first")
        scales, scales_up = b_group, b_group_up
        if GROUP > 0:
            b_group = _load_scales(scale_ptr, o_n, first + BLOCK_W, words, BLOCK_W, GROUP)
            if SWIGLU:
                b_group_up = _load_scales(scale_ptr, o_n + N, first + BLOCK_W, words, BLOCK_W, GROUP)
        x = _columns_of(_load_pieces(x_ptr, first, words, BLOCK_W, PIECES, EVEN), X_DTYPE)
        norm = x
        if HAS_NORM:
            norm = _columns_of(norms, X_DTYPE)
            norms = _load_pieces(norm_ptr, first + BLOCK_W, words, BLOCK_W, PIECES, False)
        b_part, b_part_up = b_sum, b_sum_up
        if GROUP > 0:
            b_part, b_part_up = tl.zeros_like(b_sum), tl.zeros_like(b_sum)
        factors = ()
        for i in tl.static_range(len(x)):
            b_x = x[i]
            if HAS_NORM:
                b_squares += b_x * b_x
                b_x *= norm[i]
            if FIXED:
                factors += (b_x,)
            else:
                b_part += columns[i] * b_x[None, :]
                if SWIGLU:
                    b_part_up += columns_up[i] * b_x[None, :]
        if FIXED:
            whole, step = fixed_point(factors, BY_HAND)
            b_part = fixed_dot(columns, whole, BY_HAND) * step[None, :]
            if SWIGLU:
                b_part_up = fixed_dot(columns_up, whole, BY_HAND) * step[None, :]
        if GROUP > 0:
            b_sum += b_part * scales.to(tl.float32)
            if SWIGLU:
                b_sum_up += b_part_up * scales_up.to(tl.float32)
        else:
            b_sum, b_sum_up = b_part, b_part_up
    y = tl.sum(b_sum, 1)
    y_up = tl.sum(b_sum_up, 1)
    if HAS_NORM:
        inverse = 1.0 / tl.sqrt_rn(tl.sum(b_squares, 0) / K + norm_eps)
        y *= inverse
        y_up *= inverse
    y = scale_and_bias(y, b_scale, b_bias, HAS_SCALE, HAS_BIAS)
    if SWIGLU:
        y_up = scale_and_bias(y_up, b_scale_up, b_bias_up, HAS_SCALE, HAS_BIAS)
        y = y / (1.0 + tl.exp(-y)) * y_up
    if HAS_RESIDUAL:
        y += b_residual.to(tl.float32)
    tl.store(out_ptr + o_out, y.to(out_ptr.dtype.element_ty), mask=o_out < N)


def fits(*tensors: torch.Tensor | None) -> bool:
    """Whether rows of these can be read in words of 32 bits."""
    return all(
        size * x.element_size() % 4 == 0 for x in tensors if x is not None for size in (x.shape[-1], x.storage_offset())
    ) and all(x.data_ptr() % 4 == 0 for x in tensors if x is not None)


def decode_vector(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    swiglu: bool,
) -> None:
    """decode_linear of one row, into ``out``; x, weight and norm must be what ``fits``."""
    n, k = out.shape[1], x.shape[1]
    group, bits = group_and_bits(weight, scale, x)
    cut = tile(n, k, bits, swiglu)
    words, block = k * bits // 32, 128 * cut.warps * cut.loads
    _decode_vector_kernel[(triton.cdiv(n, cut.channels),)](
        _words(x), _words(weight), scale, bias, None if norm is None else _words(norm), residual, out, n, k, words,
        norm_eps, BLOCK_N=cut.channels, BLOCK_W=block, PIECES=8 * x.element_size() // bits,
        EVEN=words % block == 0, X_DTYPE=_DTYPES[x.dtype], W_DTYPE=_DTYPES[weight.dtype],
        HAS_SCALE=scale is not None and not group, HAS_BIAS=bias is not None, HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None, SWIGLU=swiglu, GROUP=group, BY_HAND=x.is_cuda,
        FIXED=group > 0 and out.element_size() == 2,  # what is rounded to 16 bits hides the rounding of x
        num_warps=cut.warps, **dependent_launch(x.device),
    )  # fmt: skip


def group_and_bits(weight: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor) -> tuple[int, int]:
    """Weights that share a scale within a row, 0 but for int4, and the bits of each."""
    if weight.dtype != INT4:
        return 0, 8 * weight.element_size()
    assert scale is not None
    return x.shape[1] // scale.shape[1], 32 // PER_WORD


def _words(x: torch.Tensor) -> torch.Tensor:
    """The same memory; ``[1, K]`` may have any stride between its rows."""
    return (x if x.dim() == 1 or x.shape[0] > 1 else x[0]).view(torch.int32)
