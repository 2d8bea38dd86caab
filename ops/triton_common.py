"""Device functions that several kernels share. Imported only by kernel modules."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastdms.ops.quantise import FP8_MAX, SMALLEST_SCALE
from fastdms.ops.rope_decide import ZERO_MODES

LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E)
ZERO_BOTH = tl.constexpr(ZERO_MODES.index("pre_and_post_rope"))
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LARGEST_BF16 = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def rms_norm(first, second, w_first, w_second, eps, HALF: tl.constexpr):
    """RMSNorm of a head, ``[BLOCK_HALF]`` halves, or of one head a row, ``[N, BLOCK_HALF]``; all in fp32."""
    AXIS: tl.constexpr = len(first.shape) - 1
    mean_square = (tl.sum(first * first, AXIS) + tl.sum(second * second, AXIS)) / (2 * HALF)
    inverse = 1.0 / tl.sqrt_rn(mean_square + eps)
    if AXIS == 1:
        inverse = inverse[:, None]
    return first * inverse * w_first, second * inverse * w_second


@triton.jit
def power_of_two(largest):
    """The least power of two that is no less than ``largest`` (fp32, 0 counts as 1), as far as it and its inverse are
    normal numbers."""
    exponent = tl.ceil(tl.log2(tl.where(largest > 0.0, largest, 1.0)))
    return tl.exp2(tl.clamp(exponent, -126.0, 126.0))


@triton.jit
def token_scale(largest):
    """What a token with this largest magnitude (fp32) is divided by, bf16."""
    return tl.maximum(tl.div_rn(largest, _FP8_MAX), _SMALLEST_SCALE).to(tl.bfloat16)


@triton.jit
def divide_by_scale(x, scale):
    """fp32 ``x / scale`` as fp8 pages store it, still fp32; ``scale`` of ``token_scale``, broadcast to ``x``.

    As exact as ``div_rn`` wherever fp8 is not zero, but without its branches: a scale has 8 significant bits, so that
    no quotient lies within 2^-33 of the middle between two floats, and one step of Newton's leaves an error of 2^-47.
    """
    divisor = tl.minimum(scale.to(tl.float32), _LARGEST_BF16)  # an infinite token leaves its finite channels finite
    inverse = tl.div_rn(1.0, divisor)
    quotient = x * inverse
    quotient = tl.fma(-tl.fma(quotient, divisor, -x), inverse, quotient)
    return tl.clamp(tl.where(x == 0.0, x, quotient), -_FP8_MAX, _FP8_MAX)  # a zero keeps its sign


@triton.jit
def pop_pages(num_free_ptr, free, count, most):
    """Take ``count`` pages off the stack: their first index in ``free_pages``, or -1 if there are too few.

    free: what ``num_free`` was at some time since the kernel began (it only falls), **the same in all warps**: read by
    one warp, or by an atomic. most: what all pops of the launch may take. While there are as many, none can fail and a
    subtraction will do; then compare-and-swap, which makes programs wait for each other, but by which a failed pop
    never takes pages away from another, even for a moment. Relaxed, since earlier kernels wrote the stack.
    """
    start = free * 0 - 1
    if free >= most:
        start = tl.atomic_add(num_free_ptr, -count, sem="relaxed") - count
    else:
        while free >= count:
            seen = tl.atomic_cas(num_free_ptr, free, free - count, sem="relaxed")
            start = tl.where(seen == free, free - count, start)
            free = tl.where(seen == free, -1, seen)
    return start


# The branches do the same; that there are two makes the wait need the number.
WAIT_KNOWING = tl.constexpr("""{
.reg .pred p;
setp.ge.s32 p, $1, 0;
@p griddepcontrol.wait;
@!p griddepcontrol.wait;
mov.b32 $0, 0;
}""")


@triton.jit
def gdc_wait_knowing(number):
    """``gdc_wait``, but not before ``number`` (int32) is computed: what is used only after a wait the compiler would
    also compute only after it."""
    tl.inline_asm_elementwise(WAIT_KNOWING, "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def ask_l2(pointer):
    """Asks L2 for what lies there, and nothing nearer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options for a kernel with a DEPENDENT flag, which may come up before the one ahead of it has ended.

    Programmatic dependent launch: before ``gdc_wait`` such a kernel writes nothing; it waits in each of its programs,
    so that whoever waits for it has waited for all before it. Of what ops write it reads nothing before, except:

    - decode_attention's merge reads lengths. They are final: the kernel ahead lets it come up only after it has itself
      waited for the one that writes them.
    - decode_append reads a ring entry and a length, and decode_attention's kernel for Hopper lengths and a page's
      number, while they may be written. They are aligned words of 32 bits, so what is read is the old one or the new
      one. It decides what L2 is asked for, at addresses that lie in the tensors either way, and from the lengths the
      Hopper kernel makes a plan, which it keeps only if the final ones give the same. What else is used after the wait
      is read after it.

    All of these reads go past the multiprocessor's cache (".cg"), by which the wait's promise, that what is read after
    it is what was written, need not cover them. L2 is common to all multiprocessors and never behind a write, so that
    it may be asked even for what is being written.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def on_hopper(device: torch.device) -> bool:
    """Whether it has the instructions that Gluon kernels are written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def element_strides(*tensors: torch.Tensor) -> list[int]:
    """(token, head) strides of ``[T, H, D]`` tensors, in order."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def dot_dtype(compute: torch.dtype, stored: torch.dtype) -> tl.dtype:
    """What the matrix units multiply in: fp32 where queries or pages are fp32, else the queries' 16-bit type."""
    if torch.float32 in (compute, stored):
        return tl.float32
    return tl.bfloat16 if compute == torch.bfloat16 else tl.float16


@triton.jit
def find_chunk(block, chunk_indptr_ptr, num_chunks, B: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which row's chunk the ``block``-th block of BLOCK_M tokens lies in: ``(chunk, its block, begin, end)``.

    Chunk ``num_chunks`` means that the block is past the last one.
    """
    o_b = tl.arange(0, B)
    m_b = o_b < num_chunks
    begins = tl.load(chunk_indptr_ptr + o_b, mask=m_b, other=0)
    ends = tl.load(chunk_indptr_ptr + o_b + 1, mask=m_b, other=0)
    blocks = tl.cdiv(ends - begins, BLOCK_M)
    cumulative = tl.cumsum(blocks, 0)
    chunk = tl.sum((m_b & (cumulative <= block)).to(tl.int32), 0)
    own = o_b == chunk
    before = tl.sum(tl.where(own, cumulative - blocks, 0), 0)
    return chunk, block - before, tl.sum(tl.where(own, begins, 0), 0), tl.sum(tl.where(own, ends, 0), 0)
