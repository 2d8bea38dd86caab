"""What the kernels of decode_linear do with int4 weights, as ``fastdms.ops.int4`` packs them.

A weight becomes the whole number ``q`` exactly; scales meet the fp32 sums of a group's products.
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
