"""The draw of sample: programs that share a row find what top-k, top-p and min-p keep, and what the noise picks of it.

Each has a part of the vocabulary. They meet where they need what the others have: a counter in memory, which the kernel
before has set to zero, counts who has arrived. Sums are over 16 parts in their order, however many programs there are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined, assignment"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.sample.counts import MOST_COUNTED
from fastdms.ops.sample.reference import LARGEST_UNIFORM
from fastdms.ops.sample.schema import NOT_FINITE

PARTS = tl.constexpr(16)  # of the vocabulary
WAYS = tl.constexpr(16)  # that a search branches at once
_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_EXPONENT_BITS = tl.constexpr(1 << 23)  # from one power of two to the next
_FIRST_BITS = tl.constexpr(117 << 23)  # of 2^-10
_SUM_ERROR = tl.constexpr(2.0**-17)  # no sum of some twenty roundings is off by this part of all of them


@triton.jit
def _meet(meeting_ptr, meetings, PROGRAMS: tl.constexpr):
    """Wait until all programs of the row are here for the ``meetings``-th time: what they wrote before can be read."""
    tl.debug_barrier()
    if PROGRAMS > 1:
        tl.atomic_add(meeting_ptr, 1)
        while tl.atomic_add(meeting_ptr, 0) < meetings * PROGRAMS:
            pass
        tl.debug_barrier()


@triton.jit
def _halved(parts, HALF: tl.constexpr):
    """Half as many tensors: the i-th joined with that HALF after it."""
    joined = ()
    for i in tl.static_range(HALF):
        joined += (tl.join(parts[i], parts[i + HALF]),)
    return joined


@triton.jit
def _stacked(parts):
    """``[B, WAYS]`` of as many ``[B]``: a thread keeps what it has."""
    (whole,) = _halved(_halved(_halved(_halved(parts, 8), 4), 2), 1)
    return tl.reshape(whole, [whole.shape[0], WAYS])


@triton.jit
def _sums_within(
    scratch_ptr,
    sums_ptr,
    meeting_ptr,
    meetings,
    low,
    step,
    limit,
    first_part,
    part_size,
    vocab,
    COUNT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``[WAYS]``: number (COUNT) or unnormalised probability of the row's tokens whose distance has fewer bits than
    ``low + step``, ``low + 2 step`` and so on, and at most ``limit``; and ``meetings``, one more than before."""
    o_w = tl.arange(0, WAYS)
    o_p = tl.arange(0, PARTS)
    sums_ptr += meetings % 2 * (PARTS * WAYS)  # the last ones may be read still
    for part in range(first_part, first_part + PARTS // PROGRAMS):
        b_sums = ()
        for _ in tl.static_range(WAYS):
            b_sums += (tl.zeros([BLOCK], tl.float32),)
        for first in range(part * part_size, tl.minimum((part + 1) * part_size, vocab), BLOCK):
            o_v = first + tl.arange(0, BLOCK)
            distance = tl.load(scratch_ptr + o_v, mask=o_v < vocab, other=float("inf"))
            key = distance.to(tl.int32, bitcast=True)
            weight = tl.exp(-distance)
            if COUNT:
                weight = tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where((key <= limit) & (o_v < vocab), weight, 0.0)
            b_next = ()
            for i in tl.static_range(WAYS):
                b_next += (b_sums[i] + tl.where(key < low + (i + 1) * step, weight, 0.0),)
            b_sums = b_next
        tl.store(sums_ptr + part * WAYS + o_w, tl.sum(_stacked(b_sums), 0))
    meetings += 1
    _meet(meeting_ptr, meetings, PROGRAMS)
    return tl.sum(tl.load(sums_ptr + o_p[:, None] * WAYS + o_w[None, :]), 0), meetings


@triton.jit
def _smallest_within(
    scratch_ptr,
    sums_ptr,
    meeting_ptr,
    meetings,
    wanted,
    limit,
    first_part,
    part_size,
    vocab,
    COUNT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A bit pattern up to which there are the same tokens as up to the smallest whose tokens reach ``wanted``:
    non-negative floats are ordered as their bits are. The search ends where no more than one token is left to it."""
    o_w = tl.arange(0, WAYS)
    low = limit * 0
    high = limit
    below = wanted * 0.0  # what the tokens below low make
    # First by exponents: most searches end between 2^-9 and 2^6.
    base = low + _FIRST_BITS
    step = low + _EXPONENT_BITS
    while low < high:
        sums, meetings = _sums_within(
            scratch_ptr, sums_ptr, meeting_ptr, meetings, base, step, limit, first_part, part_size, vocab, COUNT,
            PROGRAMS, BLOCK,
        )  # fmt: skip
        way = tl.min(tl.where((sums >= wanted) | (base + (o_w + 1) * step > high), o_w, WAYS), 0)
        reached = tl.sum(tl.where(o_w == way, sums, 0.0), 0)
        below = tl.where(way > 0, tl.sum(tl.where(o_w == way - 1, sums, 0.0), 0), below)
        low = tl.where(way > 0, base + way * step, low)
        high = tl.where(way < WAYS, tl.minimum(base + (way + 1) * step - 1, high), high)
        if COUNT:
            is_decided = (reached - below <= 1.0) | (reached == wanted)
        else:
            two = 2.0 * tl.exp(-high.to(tl.float32, bitcast=True))  # tokens make this at least
            is_decided = reached - below + tl.max(sums, 0) * _SUM_ERROR < two
        low = tl.where(is_decided & (way < WAYS), high, low)
        base = low
        step = (high - low) // WAYS + 1
    return high, meetings


@triton.jit
def _draw_kernel(
    largest_ptr,
    best_ptr,
    tokens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    end_ids_ptr,
    banned_until_ptr,
    count_rows_ptr,
    counts_ptr,
    scratch_ptr,
    meetings_ptr,
    sums_ptr,
    drawn_ptr,
    drawn_tokens_ptr,
    out_ptr,
    ends_ptr,
    vocab,
    num_slices,
    num_end_ids,
    SLICES: tl.constexpr,
    END_IDS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """argmax_i log p_i - log e_i over the kept i; scratch's x_i become the distances (max - x_i) / temperature.

    Top-k, top-p and min-p each bound the distance; min-p by -log(min_p), for near the maximum exp rounds to 1.
    The token is counted where its row's tokens are, and ends the row if it is one of the ids that do; out is NOT_FINITE
    in its place if the largest logit is infinite.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(0).to(tl.int64)
    i_p = tl.program_id(1)
    scratch_ptr += i_b * vocab
    meetings_ptr += i_b
    sums_ptr += i_b * (2 * PARTS * WAYS)
    o_block = tl.arange(0, BLOCK)
    o_s = tl.arange(0, SLICES)
    m_s = o_s < num_slices
    slice_largest = tl.load(largest_ptr + i_b * num_slices + o_s, mask=m_s, other=-float("inf"))
    slice_best = tl.load(best_ptr + i_b * num_slices + o_s, mask=m_s, other=-float("inf"))
    slice_token = tl.load(tokens_ptr + i_b * num_slices + o_s, mask=m_s, other=0)
    o_e = tl.arange(0, END_IDS)
    end_ids = tl.load(end_ids_ptr + i_b * num_end_ids + o_e, mask=o_e < num_end_ids, other=-1)
    banned_until = tl.load(banned_until_ptr + i_b)
    count_row = tl.load(count_rows_ptr + i_b).to(tl.int64)
    position = tl.load(positions_ptr + i_b)
    temperature = tl.load(temperature_ptr + i_b)
    best = tl.max(slice_best, 0)
    token = tl.min(tl.where(slice_best == best, slice_token, vocab), 0)

    if temperature > 0.0:
        first_part = i_p * (PARTS // PROGRAMS)
        part_size = tl.cdiv(vocab, PARTS * BLOCK) * BLOCK
        begin = first_part * part_size
        end = tl.minimum(begin + PARTS // PROGRAMS * part_size, vocab)
        for first in range(begin, end, BLOCK):
            m_v = first + o_block < vocab
            x = tl.load(scratch_ptr + first + o_block, mask=m_v, other=0.0)
            tl.store(scratch_ptr + first + o_block, tl.abs(tl.div_rn(x - best, temperature)), mask=m_v)
        tl.debug_barrier()
        meetings = position * 0
        limit = meetings + _INFINITY_BITS
        top_k = tl.load(top_k_ptr + i_b)
        if (top_k > 0) & (top_k < vocab):
            limit, meetings = _smallest_within(
                scratch_ptr, sums_ptr, meetings_ptr, meetings, top_k.to(tl.float32), limit, first_part, part_size,
                vocab, True, PROGRAMS, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + i_b)
        if top_p < 1.0:
            total, meetings = _sums_within(
                scratch_ptr, sums_ptr, meetings_ptr, meetings, limit, 1, limit, first_part, part_size, vocab, False,
                PROGRAMS, BLOCK,
            )  # fmt: skip
            limit, meetings = _smallest_within(
                scratch_ptr, sums_ptr, meetings_ptr, meetings, top_p * tl.max(total, 0), limit, first_part, part_size,
                vocab, False, PROGRAMS, BLOCK,
            )  # fmt: skip
        min_p = tl.load(min_p_ptr + i_b)
        if min_p > 0.0:
            limit = tl.minimum(limit, tl.abs(tl.log(min_p)).to(tl.int32, bitcast=True))
        seed = tl.load(seeds_ptr + i_b)

        best = -float("inf")
        token = vocab
        for first in range(begin, end, BLOCK):
            o_v = first + o_block
            distance = tl.load(scratch_ptr + o_v, mask=o_v < vocab, other=float("inf"))
            zero = o_v * 0
            bits, _, _, _ = tl.philox(seed, o_v, zero + position, zero, zero)
            u = bits.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
            u = tl.minimum(u, _LARGEST_UNIFORM)
            series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
            noise = tl.where(u < 0.015625, series, -tl.log(1.0 - u))
            keep = (distance.to(tl.int32, bitcast=True) <= limit) & (o_v < vocab)
            score = tl.where(keep, -distance - tl.log(noise), -float("inf"))
            block_best, block_token = tl.max(score, 0, return_indices=True)
            token = tl.where(block_best > best, first + block_token, token)
            best = tl.maximum(best, block_best)
        if PROGRAMS > 1:
            tl.store(drawn_ptr + i_b * PROGRAMS + i_p, best)
            tl.store(drawn_tokens_ptr + i_b * PROGRAMS + i_p, token)
            _meet(meetings_ptr, meetings + 1, PROGRAMS)
            o_p = tl.arange(0, PROGRAMS)
            scores = tl.load(drawn_ptr + i_b * PROGRAMS + o_p)
            tokens = tl.load(drawn_tokens_ptr + i_b * PROGRAMS + o_p)
            token = tl.min(tl.where(scores == tl.max(scores, 0), tokens, vocab), 0)
        token = tl.where(token < vocab, token, 0)  # all scores are -inf or NaN
    if i_p == 0:
        is_finite = tl.abs(tl.max(slice_largest, 0)) < float("inf")
        tl.store(out_ptr + i_b, tl.where(is_finite, token, _NOT_FINITE).to(tl.int64))
        is_end_id = tl.max((end_ids == token).to(tl.int32), 0) > 0
        tl.store(ends_ptr + i_b, is_end_id & (position + 1 >= banned_until))
        if count_row >= 0:
            count_ptr = counts_ptr + count_row * vocab + token
            count = tl.load(count_ptr).to(tl.int32)
            tl.store(count_ptr, tl.where((count & _MOST_COUNTED) < _MOST_COUNTED, count + 1, count).to(tl.int16))
