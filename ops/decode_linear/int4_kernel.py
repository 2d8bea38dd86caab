"""What the kernels of decode_linear do with int4 weights, as ``fastdms.ops.int4`` packs them.

A weight becomes the whole number ``q`` exactly; scales meet the sums of a group's products. For one row, where
unpacking costs more than memory does, the numbers of x become whole ones, too: each 32 that a thread has as multiples
of 2^-13 of the power of two below their largest.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

import triton
import triton.language as tl

# Four bytes, each two weights, to 16-bit floats: q + 8 goes into the lowest bits of a number whose steps are one there
# (128 in bf16, 1024 in fp16), from which that number and 8 are taken. Two bytes are spread over two halves at first.
_SPREAD = """{
.reg .b32 a, b, c, d, m, o, z;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
"""
_TAKE = """mov.b32 m, {magic};
mov.b32 o, {one};
mov.b32 z, {minus};
lop3.b32 a, a, 0x000f000f, m, 0xea;
lop3.b32 b, b, 0x000f000f, m, 0xea;
lop3.b32 c, c, 0x000f000f, m, 0xea;
lop3.b32 d, d, 0x000f000f, m, 0xea;
fma.rn.{kind} $0, a, o, z;
fma.rn.{kind} $1, b, o, z;
fma.rn.{kind} $2, c, o, z;
fma.rn.{kind} $3, d, o, z;
}}"""
_TO_BF16 = tl.constexpr(_SPREAD + _TAKE.format(magic="0x43004300", one="0x3f803f80", minus="0xc308c308", kind="bf16x2"))
_TO_FP16 = tl.constexpr(_SPREAD + _TAKE.format(magic="0x64006400", one="0x3c003c00", minus="0xe408e408", kind="f16x2"))


@triton.jit
def int4_numbers(word, BY_HAND: tl.constexpr):
    """The eight weights of each 32-bit word, whole numbers in fp32."""
    numbers = ()
    for i in tl.static_range(8):
        numbers += (_number(word if i < 5 else word >> 20, i % 5, BY_HAND),)
    return numbers


@triton.jit
def _number(word, PLACE: tl.constexpr, BY_HAND: tl.constexpr):
    """The weight in bits ``4 PLACE`` to ``4 PLACE + 3``: where they stand they are those of 2^23 + (q + 8) 16^PLACE."""
    MASK: tl.constexpr = 15 << 4 * PLACE
    if BY_HAND:  # the compiler makes two instructions of it
        large = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,n,r", [word, MASK, 0x4B000000], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        large = (word & MASK) | 0x4B000000
    return large.to(tl.float32, bitcast=True) * (1.0 / 16**PLACE) - (2.0**23 / 16**PLACE + 8.0)


# Eight numbers of fp32 as whole ones times a power of two, in two signed digits of base 256: those at even and at odd
# places as the four bytes of a word each. What is added to a number leaves it, and 128 more, in the lowest 16 bits.
_TO_DIGITS = tl.constexpr("""{
.reg .f32 f<8>, c;
.reg .b32 t<8>, p, q;
mov.f32 c, 0f4B400080;
fma.rn.f32 f0, $4, $12, c;
fma.rn.f32 f1, $5, $12, c;
fma.rn.f32 f2, $6, $12, c;
fma.rn.f32 f3, $7, $12, c;
fma.rn.f32 f4, $8, $12, c;
fma.rn.f32 f5, $9, $12, c;
fma.rn.f32 f6, $10, $12, c;
fma.rn.f32 f7, $11, $12, c;
mov.b32 t0, f0;
mov.b32 t1, f1;
mov.b32 t2, f2;
mov.b32 t3, f3;
mov.b32 t4, f4;
mov.b32 t5, f5;
mov.b32 t6, f6;
mov.b32 t7, f7;
prmt.b32 p, t0, t2, 0x5410;
prmt.b32 q, t4, t6, 0x5410;
prmt.b32 $0, p, q, 0x7531;
prmt.b32 $2, p, q, 0x6420;
xor.b32 $2, $2, 0x80808080;
prmt.b32 p, t1, t3, 0x5410;
prmt.b32 q, t5, t7, 0x5410;
prmt.b32 $1, p, q, 0x7531;
prmt.b32 $3, p, q, 0x6420;
xor.b32 $3, $3, 0x80808080;
}""")
# The eight weights of a word, each 8 too large, by such digits, added to what the high and low ones have summed up to.
_DIGITS_DOT = tl.constexpr("""{
.reg .b32 e, o, h, l;
and.b32 e, $2, 0x0f0f0f0f;
shr.u32 o, $2, 4;
and.b32 o, o, 0x0f0f0f0f;
dp4a.u32.s32 h, e, $3, $7;
dp4a.u32.s32 l, e, $5, $8;
dp4a.u32.s32 $0, o, $4, h;
dp4a.u32.s32 $1, o, $6, l;
}""")


@triton.jit
def fixed_point(x, BY_HAND: tl.constexpr):
    """(whole, step): ``x``, 32 tensors of fp32, as whole numbers of at most 2^14 times the same power of two.

    step: NaN where one of the 32 is not finite. whole: as ``fixed_dot`` takes them, 32 tensors of numbers, or of the
    words that they are in, 16 (BY_HAND).
    """
    largest = tl.abs(x[0])
    for i in tl.static_range(1, 32):
        largest = tl.maximum(largest, tl.abs(x[i]), propagate_nan=tl.PropagateNan.ALL)
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 15 << 23)
    step = (bits - (13 << 23)).to(tl.float32, bitcast=True)  # 2^(e - 13), e the exponent of the largest
    per_step = ((254 << 23) - (bits - (13 << 23))).to(tl.float32, bitcast=True)
    step = tl.where(bits == 0x7F800000, float("nan"), step)
    whole = ()
    if BY_HAND:
        for i in tl.static_range(0, 32, 8):
            whole += tl.inline_asm_elementwise(
                _TO_DIGITS, "=r,=r,=r,=r,f,f,f,f,f,f,f,f,f",
                [x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7], per_step],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        for i in tl.static_range(32):
            shifted = x[i] * per_step + 12582912.0
            whole += ((shifted - 12582912.0).to(tl.int32),)
    return whole, step


@triton.jit
def fixed_dot(words, whole, BY_HAND: tl.constexpr):
    """Sum of the weights in ``words``, four tensors ``[N, W]``, times ``whole``, of ``[W]`` each: ``[N, W]`` fp32."""
    if BY_HAND:
        high, low = tl.zeros_like(whole[0]), tl.zeros_like(whole[0])
        eights = tl.full(high.shape, -0x77777778, tl.int32)  # 0x88888888
        for i in tl.static_range(4):
            high, low = _add_digits_dot(high, low, eights, whole, i)
        high = tl.zeros_like(words[0]) - high[None, :]
        low = tl.zeros_like(words[0]) - low[None, :]
        for i in tl.static_range(4):
            high, low = _add_digits_dot(high, low, words[i], whole, i)
        return (high * 256 + low).to(tl.float32)
    else:
        total = tl.zeros_like(words[0])
        for i in tl.static_range(32):
            total += ((words[i // 8] >> 4 * (i % 8) & 15) - 8) * whole[i][None, :]
        return total.to(tl.float32)


@triton.jit
def _add_digits_dot(high, low, word, whole, i: tl.constexpr):
    """``whole``: of the words before and after the ``i``-th, too; ``[W]``, for words ``[W]`` or ``[N, W]``."""
    even_high, odd_high, even_low, odd_low = whole[4 * i], whole[4 * i + 1], whole[4 * i + 2], whole[4 * i + 3]
    if len(word.shape) == 2:
        even_high, odd_high = even_high[None, :], odd_high[None, :]
        even_low, odd_low = even_low[None, :], odd_low[None, :]
    return tl.inline_asm_elementwise(
        _DIGITS_DOT, "=&r,=r,r,r,r,r,r,r,r", [word, even_high, odd_high, even_low, odd_low, high, low],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _halves_of_bytes(b_w, DOT: tl.constexpr, BY_HAND: tl.constexpr):
    """The first and the second weight of each byte, as the matrix units take them."""
    if BY_HAND and tl.bfloat16 == DOT:
        return tl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,=r,=r,r", [b_w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif BY_HAND and tl.float16 == DOT:
        return tl.inline_asm_elementwise(
            _TO_FP16, "=r,=r,=r,=r,r", [b_w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return ((b_w & 15).to(tl.float32) - 8.0).to(DOT), ((b_w >> 4).to(tl.float32) - 8.0).to(DOT)


@triton.jit
def int4_scales(scale_ptr, o_n, k, K, WARPS: tl.constexpr, GROUP: tl.constexpr):
    """``[WARPS, BLOCK_N]``, as stored: of each warp's group of columns from ``k`` on; zero past K."""
    o_g = k // GROUP + tl.arange(0, WARPS)
    p_scale = scale_ptr + o_n.to(tl.int64)[None, :] * (K // GROUP) + o_g[:, None]
    return tl.load(p_scale, mask=(o_g < K // GROUP)[:, None], other=0.0)


@triton.jit
def int4_dot(
    acc, weight_ptr, b_scale, o_n, b_even, b_odd, k, K,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """``acc [WARPS, BLOCK_N, ROWS]`` and the product of each warp's own group of columns from ``k`` on.

    weight_ptr: bytes. b_scale: of ``int4_scales``. b_even, b_odd: of x, ``[WARPS, GROUP / 2, ROWS]``, zero past K.
    """
    o_w = tl.arange(0, acc.shape[0])
    o_b = k // 2 + o_w[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    p_w = weight_ptr + o_n.to(tl.int64)[None, :, None] * (K // 2) + o_b[:, None, :]
    if EVEN_K:
        b_w = tl.load(p_w, eviction_policy="evict_first")
    else:
        b_w = tl.load(p_w, mask=(o_b < K // 2)[:, None, :], other=0, eviction_policy="evict_first")
    b_first, b_second = _halves_of_bytes(b_w, DOT, BY_HAND)
    b_sum = tl.dot(b_first, b_even, input_precision="ieee")
    b_sum = tl.dot(b_second, b_odd, b_sum, input_precision="ieee")
    return acc + b_sum * b_scale.to(tl.float32)[:, :, None]


@triton.jit
def even_and_odd(b_x):
    """``[WARPS, C, ROWS]`` as two of ``[WARPS, C / 2, ROWS]``."""
    WARPS: tl.constexpr = b_x.shape[0]
    PAIRS: tl.constexpr = b_x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(b_x, [WARPS, PAIRS, 2, b_x.shape[2]]), [0, 1, 3, 2]))
