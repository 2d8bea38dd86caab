"""One tile of a span: its keys and values from their pages, and a step of the online softmax.

Tokens go down and query heads across, since the matrix units take 16 rows but as few as 8 columns: few heads leave less
of them idle, and each thread exponentiates fewer numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
# Two fp8 numbers of each of two tokens in fp16: what goes side by side into a product are the tokens.
_FP8_TO_FP16 = tl.constexpr("""{
.reg .b32 p;
.reg .b16 l, h;
prmt.b32 p, $2, 0, 0x3120;
mov.b32 {l, h}, p;
cvt.rn.f16x2.e4m3x2 $0, l;
cvt.rn.f16x2.e4m3x2 $1, h;
}""")


@triton.jit
def _slots(table_ptr, first, live, o_n, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tokens ``first + o_n`` of a span lie in the pool, ``[BLOCK_N]`` int64; 0 for those past ``live``."""
    if BLOCK_N % PAGE == 0 and BLOCK_N // PAGE <= 8:  # unrolled
        slots = (o_n % PAGE).to(tl.int64)
        for i in tl.static_range(BLOCK_N // PAGE):
            page = tl.load(table_ptr + first // PAGE + i, mask=first + i * PAGE < live, other=0).to(tl.int64)
            slots += tl.where(o_n // PAGE == i, page * PAGE, 0)
        return slots
    else:
        token = first + o_n
        page = tl.load(table_ptr + token // PAGE, mask=token < live, other=0).to(tl.int64)
        return page * PAGE + token % PAGE


@triton.jit
def _load(at, m_n, m_d, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """What ``at`` points to; zero past the span's last token (MASKED) and past the head's last channel (PADDED)."""
    if MASKED and PADDED:
        return tl.load(at, mask=m_n & m_d, other=0.0)
    elif MASKED:
        return tl.load(at, mask=m_n, other=0.0)
    elif PADDED:
        return tl.load(at, mask=m_d, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _load_scale_pairs(pairs_ptr, begin, BLOCK_N: tl.constexpr):
    """Scales of BLOCK_N slots from ``begin`` on in fp32, first those of even slots and then of odd ones. Two lie in
    each int32, since the compiler pipelines no load of less than four bytes."""
    pairs = tl.load(pairs_ptr + begin // 2 + tl.arange(0, BLOCK_N // 2))
    lower, upper = pairs << 16, pairs & -65536  # a bf16 is the upper half of the fp32 of its value
    return tl.reshape(tl.trans(tl.join(lower, upper)), [BLOCK_N]).to(tl.float32, bitcast=True)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _channels(b_v, DTYPE: tl.constexpr, PAIRS: tl.constexpr, FAST: tl.constexpr):
    """Values as the product takes them; of pairs of fp8 numbers first the channels 2j and then 2j + 1."""
    if not PAIRS:
        return (b_v.to(DTYPE),)
    elif FAST:
        return tl.inline_asm_elementwise(
            _FP8_TO_FP16, "=r,=r,r", [b_v], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even = b_v.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        return (even, (b_v >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE))


@triton.jit
def tile_step(
    b_q,
    b_max,
    b_sum,
    b_acc,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    first,
    live,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tokens from ``first`` on join ``b_max [BLOCK_G]``, ``b_sum [BLOCK_N, BLOCK_G]`` (spread over the tile still) and
    ``b_acc``, one of ``[BLOCK_D, BLOCK_G]`` or with PAIRS two of ``[BLOCK_D / 2, BLOCK_G]``.

    b_q: ``[BLOCK_D, BLOCK_G]``. v_pages: int16, of two fp8 numbers each, if PAIRS: the hardware turns 16 bits around on
    their way out of shared memory, and not 8. MASKED: where the span ends in the tile. A
    value's scale joins the exponent, x + log2(v_scale), and leaves the sum again: so no weight is above one, which fp16
    needs, and no product has to be scaled. A token of zeros, whose scale is the least, would only be lost from the sum
    beside values of 1e10 and more.
    """
    DTYPE: tl.constexpr = b_q.dtype
    ONE_PAGE: tl.constexpr = PAGE % BLOCK_N == 0
    VD: tl.constexpr = D // 2 if PAIRS else D
    BLOCK_VD: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_VD)
    if ONE_PAGE:
        if HAS_SCALES:  # as _load_scale_pairs has them; the order of tokens carries no meaning
            o_n = o_n % (BLOCK_N // 2) * 2 + o_n // (BLOCK_N // 2)
        begin = tl.load(table_ptr + first // PAGE).to(tl.int64) * PAGE + first % PAGE
        slots = begin + o_n
    else:
        slots = _slots(table_ptr, first, live, o_n, PAGE, BLOCK_N)
    m_n = first + o_n < live
    p_k = k_pages_ptr + slots[:, None] * D + o_d[None, :]
    p_v = v_pages_ptr + slots[None, :] * VD + o_v[:, None]
    b_k = _load(p_k, m_n[:, None], (o_d < D)[None, :], MASKED, D != BLOCK_D)
    b_v = _load(p_v, m_n[None, :], (o_v < VD)[:, None], MASKED, VD != BLOCK_VD)
    b_x = tl.dot(b_k.to(DTYPE), b_q, input_precision="ieee")  # [BLOCK_N, BLOCK_G]
    if HAS_SCALES:
        if ONE_PAGE:
            b_k_scales = _load_scale_pairs(k_scales_ptr, begin, BLOCK_N)
            b_v_scales = _load_scale_pairs(v_scales_ptr, begin, BLOCK_N)
        else:
            b_k_scales = tl.load(k_scales_ptr + slots).to(tl.float32)
            b_v_scales = tl.load(v_scales_ptr + slots).to(tl.float32)
        if MASKED:
            b_k_scales = tl.where(m_n, b_k_scales, 0.0)
            b_v_scales = tl.where(m_n, b_v_scales, 1.0)
        b_log = _log2(b_v_scales, FAST)
        b_x = b_x * (b_k_scales * scale_log2)[:, None] + b_log[:, None]
    else:
        b_x *= scale_log2
    if MASKED:
        b_x = tl.where(m_n[:, None], b_x, LOWEST)
    b_new = tl.maximum(b_max, tl.max(b_x, 0))
    b_old = tl.exp2(b_max - b_new)
    b_w = tl.exp2(b_x - b_new[None, :])
    if MASKED:
        b_w = tl.where(m_n[:, None], b_w, 0.0)
    b_sum = b_sum * b_old[None, :] + (b_w * tl.exp2(-b_log)[:, None] if HAS_SCALES else b_w)
    b_w = b_w.to(DTYPE)
    channels = _channels(b_v, DTYPE, PAIRS, FAST)
    b_next = ()
    for i in tl.static_range(len(channels)):
        b_next += (tl.dot(channels[i], b_w, b_acc[i] * b_old[None, :], input_precision="ieee"),)
    return b_new, b_sum, b_next
