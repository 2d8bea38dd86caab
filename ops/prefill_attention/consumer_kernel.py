"""The warps of ``specialised_kernel`` that multiply: 64 rows of queries times grouped heads, with a ring of tiles."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from fastdms.ops.gluon_common import barrier
from fastdms.ops.prefill_attention.hopper_block_kernel import FOREVER, keys_of, lasts_of, load_until, tiles_of

NOTES = gl.constexpr(8)  # numbers about a block, from the fetching warp; the last of the first: how many blocks
ROWS = gl.constexpr(64)  # of each consumer
_WARPS = gl.constexpr(4)
# By how much a row's scores may outgrow its maximum before that follows: weights up to 2^8 are as exact as others. That
# of the maximum itself is rounded then, too.
_SLACK = gl.constexpr(8.0)

# Gives registers back and ends these warps. A worker that returned would go through Triton's dispatch loop, and ptxas,
# which sees registers given back and taken in a loop, would have each product waited for as soon as it is started.
LEAVE = gl.constexpr("setmaxnreg.dec.sync.aligned.u32 24; exit; // $0")
# $0 to $31 are a thread's sums, of two rows, before and after; $64 and $66 what each row's shrink by. Nothing is
# multiplied if no row of the warp does.
RESCALE = gl.constexpr(
    "{.reg .pred p, q; setp.neu.f32 p, $64, 0f3F800000; setp.neu.f32 q, $66, 0f3F800000; or.pred p, p, q;"
    + " vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni DONE; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${i + 64};" for i in range(32))
    + " DONE: }"
)
_RESCALE_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))
# A score where low <= high, else -inf: one by one, or the compiler keeps all comparisons before it uses any.
KEEP = gl.constexpr("{.reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p;}")
# Two neighbours of a row before a limit, else 0.
CUT = gl.constexpr("{.reg .pred p; setp.lt.s32 p, $2, $4; selp.b32 $0, $1, 0, p;}")


@gluon.jit
def _leave():
    gl.inline_asm_elementwise(LEAVE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _keep(b_x, b_low, b_high):
    return gl.inline_asm_elementwise(KEEP, "=f,f,r,r", [b_x, b_low, b_high], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _cut(b_values, o_n, limit):
    return gl.inline_asm_elementwise(
        CUT, "=r,r,r,r,r,r", [b_values, o_n, o_n * 0 + limit], dtype=b_values.dtype, is_pure=True, pack=2
    )


@gluon.jit
def stage_of(tile, STAGES: gl.constexpr):
    """Where in the ring a tile lies; STAGES: a power of two."""
    return tile & (STAGES - 1)


@gluon.jit
def phase_of(tile, STAGES: gl.constexpr):
    """The parity of a tile's turn at its stage."""
    return (tile & STAGES) // STAGES


@gluon.jit
def _scores(tile, b_q, k_ring, X: gl.constexpr, STAGES: gl.constexpr):
    """Start q k^T of a tile."""
    b_k = k_ring.index(stage_of(tile, STAGES))
    nothing = gl.full([ROWS, b_k.shape[0]], 0.0, gl.float32, X)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _softmax(b_x, b_max, b_sum, scale_log2):
    """Weights of the scores ``[ROWS, N]``, in fp32; what they are relative to, the new sum, what old ones shrink by."""
    b_new = gl.maximum(b_max, gl.max(b_x, 1) * scale_log2)
    b_new = gl.where(b_new > b_max + _SLACK, b_new, b_max)
    b_w = gl.exp2(b_x * scale_log2 - b_new[:, None])
    b_old = gl.exp2(b_max - b_new)
    return b_w, b_new, b_sum * b_old + gl.sum(b_w, 1), b_old


@gluon.jit
def _operand(b_w, DTYPE: gl.constexpr, ACC: gl.constexpr):
    """Weights as the matrix units read them. Not before the wait for the product ahead: ptxas puts them into registers
    that that product still reads. And not behind the next scores' start, of which then too many are taken."""
    return gl.convert_layout(b_w.to(DTYPE), gl.DotOperandLayout(0, ACC, 2))


@gluon.jit
def _accumulate(tile, b_w, b_old, b_acc, v_ring, ACC: gl.constexpr, STAGES: gl.constexpr):
    """Start acc * old + w v; w as ``_operand`` gives it."""
    b_v = v_ring.index(stage_of(tile, STAGES))
    b_old = gl.convert_layout(b_old, gl.SliceLayout(1, ACC))[:, None]
    b_acc = gl.inline_asm_elementwise(
        RESCALE, _RESCALE_OPERANDS, [b_acc, b_old], dtype=gl.float32, is_pure=True, pack=32
    )
    return warpgroup_mma(b_w, b_v, b_acc, is_async=True)


@gluon.jit
def _wait(tile, here, STAGES: gl.constexpr):
    """Until a tile, counted from the program's first, is there."""
    mbarrier.wait(here.index(stage_of(tile, STAGES)), phase_of(tile, STAGES))


@gluon.jit
def _release(tile, free, STAGES: gl.constexpr, is_there):
    """A tile that no warp of this consumer needs any more, if it ``is_there``."""
    barrier()
    mbarrier.arrive(free.index(stage_of(tile, STAGES)), count=1, pred=is_there)


@gluon.jit
def note(notes, at, FLAT: gl.constexpr):
    """From shared memory, by which the compiler knows that it is the same in all threads."""
    return gl.sum(notes.index(at).load(FLAT), 0)


@gluon.jit
def consume(
    given, rings, part: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, WINDOW: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """The ``part``-th of the consumers: its rows of each of the program's blocks, ordered by heads of the group.

    q_rows: ``[2 * CONSUMERS, ROWS, D]``, for two blocks; k_ring, v_ring: ``[STAGES, BLOCK_N, D]``.

    While a tile's weights are computed, the tensor cores have the values of the tile before, and behind a block's last
    tile the keys of the next block's first.
    """
    tokens, scale_log2, lists_ptr, until_ptr, out_ptr, q_rows = given
    k_ring, v_ring, notes, q_here, q_free, here, free = rings
    QUERIES: gl.constexpr = ROWS // G
    BLOCK_M: gl.constexpr = QUERIES * CONSUMERS
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    gl.static_assert(D == 64)  # of which a thread has the 32 sums that are rescaled at once
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, D, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, X)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [_WARPS], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [_WARPS, 1], [1, 0])
    o_n = gl.arange(0, BLOCK_N, FLAT)
    o_u = gl.arange(0, BLOCK_N, gl.SliceLayout(1, WIDE))[:, None]
    o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))[None, :]
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    mine = note(notes, NOTES - 1, FLAT)
    b_x = gl.zeros([ROWS, BLOCK_N], gl.float32, X)
    if mine > 0:
        mbarrier.wait(q_here.index(0), 0)
        _wait(0, here, STAGES)
        b_x = warpgroup_mma_wait(0, [_scores(0, q_rows.index(part), k_ring, X, STAGES)])
    n = 0  # tiles before the block
    for i in range(0, mine):
        slot = i & 1
        begin = note(notes, slot * NOTES, FLAT)
        end = note(notes, slot * NOTES + 1, FLAT)
        first_query = note(notes, slot * NOTES + 2, FLAT)
        num_packed = note(notes, slot * NOTES + 3, FLAT)
        num_late = note(notes, slot * NOTES + 4, FLAT)
        i_b = note(notes, slot * NOTES + 5, FLAT)
        i_h = note(notes, slot * NOTES + 6, FLAT)
        band, stop, packed, late, flagged, clear, total = tiles_of(
            first_query, end - begin, num_packed, num_late, WINDOW, BLOCK_M, BLOCK_N
        )
        if DENSE:
            whole = gl.minimum(clear, total - 1)  # the block's last tile is for the loop that goes on to the next block
            b_until = o_n
        else:
            whole = num_packed // BLOCK_N
            lasts = lasts_of(
                lists_ptr, until_ptr, i_b, i_h, begin, tokens, packed, late, flagged, num_late, band, stop, HKV, WINDOW
            )  # fmt: skip
            b_until = load_until(whole, lasts, o_n)

        b_max = gl.full([ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, X))
        b_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, X))
        b_acc = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, ACC))
        b_q = q_rows.index(slot * CONSUMERS + part)
        for tile in range(0, whole):
            b_w, b_max, b_sum, b_old = _softmax(b_x, b_max, b_sum, scale_log2)
            b_acc = warpgroup_mma_wait(0, [b_acc])
            b_w = _operand(b_w, k_ring.dtype, ACC)
            _release(n + tile - 1, free, STAGES, tile > 0)
            _wait(n + tile + 1, here, STAGES)
            b_next = _scores(n + tile + 1, b_q, k_ring, X, STAGES)
            b_acc = _accumulate(n + tile, b_w, b_old, b_acc, v_ring, ACC, STAGES)
            b_x = warpgroup_mma_wait(1, [b_next])

        query = first_query + part * QUERIES + gl.arange(0, ROWS, gl.SliceLayout(1, X)) % QUERIES
        for tile in range(whole, total):
            # Behind the last block's last tile the same once more, for nobody.
            is_last, has_next = tile + 1 == total, i + 1 < mine
            after = gl.where(is_last & (i + 1 == mine), n + tile, n + tile + 1)
            next_slot = gl.where(is_last & has_next, slot ^ 1, slot)
            mbarrier.wait(q_here.index(next_slot), ((i + 1) >> 1) & 1, pred=is_last & has_next)
            if not DENSE:
                b_ahead = load_until(tile + 1, lasts, o_n)
            first, num_keys = keys_of(tile, packed, late, num_packed, num_late, end - begin - band, BLOCK_N)
            if tile < flagged:
                b_last = b_until
                if tile < packed:
                    b_last = gl.where(o_n < num_keys, FOREVER, -1)
                b_x = _keep(b_x, query[:, None], gl.convert_layout(b_last, COLUMNS)[None, :])
            if tile >= clear:
                b_from = gl.convert_layout(first + band + o_n, COLUMNS)
                b_x = _keep(b_x, b_from[None, :], query[:, None])
            if not DENSE:
                b_until = b_ahead
            b_w, b_max, b_sum, b_old = _softmax(b_x, b_max, b_sum, scale_log2)
            b_acc = warpgroup_mma_wait(0, [b_acc])
            b_w = _operand(b_w, k_ring.dtype, ACC)
            _release(n + tile - 1, free, STAGES, tile > 0)
            # Rows after these keys are someone else's or nobody's, and a weight of zero leaves a NaN. Each consumer
            # stores the same.
            if num_keys < BLOCK_N:
                b_v = v_ring.index(stage_of(n + tile, STAGES))
                b_v.store(_cut(b_v.load(WIDE), o_u, num_keys))
                fence_async_shared()
                barrier()
            _wait(after, here, STAGES)
            b_next = _scores(after, q_rows.index(next_slot * CONSUMERS + part), k_ring, X, STAGES)
            b_acc = _accumulate(n + tile, b_w, b_old, b_acc, v_ring, ACC, STAGES)
            b_x = warpgroup_mma_wait(1, [b_next])
        b_acc = warpgroup_mma_wait(0, [b_acc])
        n += total
        b_out = b_acc * gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, ACC))[:, None]
        b_q.store(b_out.to(k_ring.dtype))
        _release(n - 1, free, STAGES, True)
        token = begin + first_query + part * QUERIES + o_r % QUERIES
        head = i_h * G + o_r // QUERIES
        p_out = out_ptr + (token.to(gl.int64) * (HKV * G) + head)[:, None] * D + o_d
        gl.store(p_out, b_q.load(WIDE), mask=(token < end)[:, None])
        fence_async_shared()
        barrier()
        mbarrier.arrive(q_free.index(slot), count=1)
    if part > 0:
        _leave()
