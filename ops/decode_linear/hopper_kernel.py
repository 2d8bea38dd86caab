"""decode_linear on Hopper, in Gluon, of several normed rows and many output channels: weights go by TMA into shared
memory, and from there into the matrix units.

fp8 products have no other operand than fp8, so a row of x is two: its numbers rounded to four significant bits, and 16
times what that left over. Together they hold 8 bits over 14 octaves: what is bf16 exactly, what is fp32 with half of
bf16's rounding error; and below them the multiples of 2^-21 of what the row is scaled to. The matrix units, which keep
some 14 bits of fp8 sums, add up 128 columns; all other sums are fp32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.decode_linear.schema import MOST_ROWS
from fastdms.ops.gluon_common import barrier, load_tile
from fastdms.ops.triton_common import dependent_launch

_M = gl.constexpr(64)  # rows of weights in a tile: what a warpgroup multiplies by
_UNROLL = gl.constexpr(2)  # blocks of columns in a step


@gluon.jit
def _fetch(
    step, total, order, desc, ring, here, N, STEPS: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr
):  # fmt: skip
    """Start the copies of a step's weights into the ring, where the step STAGES before was."""
    first_tile, tile_stride = order
    ROWS: gl.constexpr = desc.block_type.shape[0]
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    NUM_BYTES: gl.constexpr = _M * WIDTH * desc.dtype.primitive_bitwidth // 8 * _UNROLL
    stage = step % STAGES
    wanted = step < total
    row = (first_tile + step // STEPS * tile_stride) * ROWS
    column = step % STEPS * (_UNROLL * WIDTH)
    mbarrier.expect(here.index(stage), NUM_BYTES, pred=wanted)
    for i in gl.static_range(_UNROLL):
        block = ring.index(stage * _UNROLL + i)
        if SWIGLU:
            load_tile(desc, [row, column + i * WIDTH], here.index(stage), block.slice(0, ROWS), pred=wanted)
            load_tile(desc, [N + row, column + i * WIDTH], here.index(stage), block.slice(ROWS, ROWS), pred=wanted)
        else:
            load_tile(desc, [row, column + i * WIDTH], here.index(stage), block, pred=wanted)


@gluon.jit
def _load_scale_and_bias(
    scale_ptr, bias_ptr, o_n, N, SWIGLU: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr
):  # fmt: skip
    """``load_scale_and_bias`` of vector_kernel."""
    b_scale, b_bias = 1.0, 0.0
    if HAS_SCALE:
        b_scale = gl.load(scale_ptr + o_n)
    if HAS_BIAS:
        b_bias = gl.load(bias_ptr + o_n)
    b_scale_up, b_bias_up = b_scale, b_bias
    if SWIGLU and HAS_SCALE:
        b_scale_up = gl.load(scale_ptr + (o_n + N))
    if SWIGLU and HAS_BIAS:
        b_bias_up = gl.load(bias_ptr + (o_n + N))
    return b_scale, b_bias, b_scale_up, b_bias_up


@gluon.jit
def _scale_and_bias(y, b_scale, b_bias, HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """``scale_and_bias`` of vector_kernel, for ``[N, ROWS]``."""
    if HAS_SCALE:
        y *= b_scale[:, None]
    if HAS_BIAS:
        y += b_bias.to(gl.float32)[:, None]
    return y


@gluon.jit(do_not_specialize=["B"])
def _decode_linear_hopper_kernel(
    x_desc,
    power_ptr,
    weight_desc,
    scale_ptr,
    bias_ptr,
    out_ptr,
    B,
    N,
    tiles,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SWIGLU: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What ``_decode_linear_kernel`` does, of rows as ``_norm_kernel`` leaves them.

    A program takes one tile of weights after the other, as many apart as there are programs.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = weight_desc.dtype
    WIDTH: gl.constexpr = weight_desc.block_type.shape[1]
    BLOCKS: gl.constexpr = K // WIDTH
    STEPS: gl.constexpr = BLOCKS // _UNROLL
    NX: gl.constexpr = x_desc.block_type.shape[0]
    HAS_PARTS: gl.constexpr = NX > ROWS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, NX, 256 // DTYPE.primitive_bitwidth])
    OUT: gl.constexpr = gl.BlockedLayout([2, 1], [16 if SWIGLU else 32, 2 if SWIGLU else 1], [1, num_warps], [0, 1])
    CHANNELS: gl.constexpr = _M // 2 if SWIGLU else _M

    first_tile = gl.program_id(0)
    tile_stride = gl.num_programs(0)
    items = gl.cdiv(tiles - first_tile, tile_stride)
    total = items * STEPS
    order = (first_tile, tile_stride)

    ring = gl.allocate_shared_memory(DTYPE, [STAGES * _UNROLL, _M, WIDTH], weight_desc.layout)
    here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_here = gl.allocate_shared_memory(DTYPE, [BLOCKS, NX, WIDTH], x_desc.layout)
    x_came = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(here.index(s), count=1)
    mbarrier.init(x_came, count=1)
    fence_async_shared()
    barrier()
    for ahead in gl.static_range(STAGES):
        _fetch(ahead, total, order, weight_desc, ring, here, N, STEPS, STAGES, SWIGLU)
    mbarrier.expect(x_came, BLOCKS * NX * WIDTH * DTYPE.primitive_bitwidth // 8)

    o_n = gl.arange(0, CHANNELS, gl.SliceLayout(1, OUT))
    o_r = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    b_zero = gl.zeros([_M, NX], gl.float32, ACC)
    if DEPENDENT:  # all programs wait: that this kernel has ended says that those before it have
        gdc_wait()
    for block in gl.static_range(BLOCKS):
        load_tile(x_desc, [0, block * WIDTH], x_came, x_here.index(block))
    if HAS_PARTS:
        b_power = gl.load(power_ptr + gl.minimum(o_r, B - 1))
    mbarrier.wait(x_came, 0)
    for item in range(0, items):
        o_c = (first_tile + item * tile_stride) * CHANNELS + o_n
        m_out = (o_r < B)[None, :] & (o_c < N)[:, None]
        o_c = gl.minimum(o_c, N - 1)
        # What follows the sums is on its way before them.
        b_scale, b_bias, b_scale_up, b_bias_up = _load_scale_and_bias(
            scale_ptr, bias_ptr, o_c, N, SWIGLU, HAS_SCALE, HAS_BIAS
        )
        acc = b_zero
        for i in range(0, STEPS):
            step = item * STEPS + i
            stage = step % STAGES
            mbarrier.wait(here.index(stage), (step // STAGES) & 1)
            sums = ()
            for u in gl.static_range(_UNROLL):
                b_x = x_here.index(i * _UNROLL + u).permute((1, 0))
                sums += (warpgroup_mma(ring.index(stage * _UNROLL + u), b_x, b_zero, use_acc=False, is_async=True),)
            sums = warpgroup_mma_wait(0, sums)
            for u in gl.static_range(_UNROLL):
                acc += sums[u]
            barrier()  # no warp reads the old weights any more
            _fetch(step + STAGES, total, order, weight_desc, ring, here, N, STEPS, STAGES, SWIGLU)

        y = acc
        if HAS_PARTS:
            b_high, b_low = gl.split(gl.permute(gl.reshape(acc, [_M, 2, ROWS]), (0, 2, 1)))
            y = b_high + b_low * 0.0625
        if SWIGLU:
            PAIRS: gl.constexpr = gl.BlockedLayout([2, 1, 2], [16, 2, 1], [1, num_warps, 1], [2, 0, 1])
            pairs = gl.permute(gl.reshape(y, [2, CHANNELS, ROWS]), (1, 2, 0))
            y, y_up = gl.split(gl.convert_layout(pairs, PAIRS))
            y_up = gl.convert_layout(y_up, OUT)
            if HAS_PARTS:
                y_up *= b_power[None, :]
            y_up = _scale_and_bias(y_up, b_scale_up, b_bias_up, HAS_SCALE, HAS_BIAS)
        y = gl.convert_layout(y, OUT)
        if HAS_PARTS:
            y *= b_power[None, :]
        y = _scale_and_bias(y, b_scale, b_bias, HAS_SCALE, HAS_BIAS)
        if SWIGLU:
            y = y / (1.0 + gl.exp(-y)) * y_up
        p_out = out_ptr + o_r.to(gl.int64)[None, :] * N + o_c[:, None]
        gl.store(p_out, y.to(out_ptr.dtype.element_ty), mask=m_out)


# Of rows and weights. Two parts hold bf16 rows, but not the 11 bits of fp16 ones.
_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
)
_WIDTH_BYTES = 128  # of the columns in a block: 64 of 16 bits, or 128
_STEP_BYTES = _M.value * _UNROLL.value * _WIDTH_BYTES  # of weights
_SHARED_BYTES = 222 * 1024  # of a multiprocessor, which the rows of x and the rings of its programs share


class Cut(NamedTuple):
    """programs: on a multiprocessor at once; stages: steps of weights in the ring of each."""

    programs: int
    stages: int


def cut(x_bytes: int) -> Cut:
    """What measured best (``docs/lab-notes.md``): two programs where their rings have room for three steps each."""
    programs = 2 if _SHARED_BYTES // 2 - x_bytes >= 3 * _STEP_BYTES else 1
    return Cut(programs, min(8, (_SHARED_BYTES // programs - x_bytes) // _STEP_BYTES))


def padded_rows(rows: int) -> int:
    """The least that the products take."""
    return 8 if rows <= 8 else 16


def is_supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether shapes and dtypes fit, and there are tiles enough for all multiprocessors."""
    rows, k = x.shape
    if rows == 1 or (x.dtype, weight.dtype) not in _DTYPES:
        return False
    aligned = k * weight.element_size() % (_UNROLL.value * _WIDTH_BYTES) == 0 and weight.data_ptr() % 16 == 0
    many = weight.shape[0] >= _M.value * _multiprocessors(x.device)
    # Whatever rows there are: a batch of several must go the same way as any other.
    return aligned and many and cut(2 * padded_rows(MOST_ROWS) * k).stages >= 2


def decode_hopper(
    x: torch.Tensor,
    power: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    swiglu: bool,
) -> None:
    """decode_linear of what is normed, into ``out``; weights as ``is_supported`` says.

    x: of 16-bit weights ``[B, K]``, of fp8 ones ``[2 padded_rows(B), K]`` e4m3, what is high of each row and then 16
    times what is low, both to be multiplied by power ``[B]`` fp32.
    """
    (rows, n), k = out.shape, x.shape[1]
    padded = padded_rows(rows)
    channels = _M.value // 2 if swiglu else _M.value
    tiles = triton.cdiv(n, channels)
    programs, stages = cut(2 * padded * k)
    _decode_linear_hopper_kernel[(min(tiles, programs * _multiprocessors(x.device)),)](
        _described(x, padded if power is None else 2 * padded), power, _described(weight, channels), scale, bias, out,
        rows, n, tiles, K=k, ROWS=padded, STAGES=stages,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, SWIGLU=swiglu, num_warps=4,
        **dependent_launch(x.device),
    )  # fmt: skip


def _described(x: torch.Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=_WIDTH_BYTES, element_bitwidth=8 * x.element_size(), rank=2)
    block = [rows, _WIDTH_BYTES // x.element_size()]
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block, layout)


def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
