"""Triton backend of sample: the largest logit by slices, then a program per row, with several passes if it draws."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.sample.counts import MOST_COUNTED
from fastdms.ops.sample.reference import LARGEST_UNIFORM
from fastdms.ops.triton_common import dependent_launch

_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)
_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _mass_within(scratch_ptr, bits, limit, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number (COUNT) or unnormalised probability of the tokens whose distance has at most ``bits`` and ``limit``."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        distance = tl.load(scratch_ptr + o_v, mask=o_v < vocab, other=float("inf"))
        key = distance.to(tl.int32, bitcast=True)
        weight = tl.exp(-distance)
        if COUNT:
            weight = tl.full([BLOCK], 1.0, tl.float32)
        total += tl.where((key <= bits) & (key <= limit) & (o_v < vocab), weight, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _smallest_within(scratch_ptr, wanted, limit, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Smallest bit pattern whose tokens reach ``wanted``: non-negative floats are ordered as their bits are."""
    low = limit * 0
    high = limit
    while low < high:
        middle = low + (high - low) // 2
        enough = _mass_within(scratch_ptr, middle, limit, vocab, COUNT, BLOCK) >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def _best_kernel(
    logits_ptr,
    temperature_ptr,
    positions_ptr,
    end_ids_ptr,
    banned_until_ptr,
    penalties_ptr,
    count_rows_ptr,
    counts_ptr,
    scratch_ptr,
    best_ptr,
    tokens_ptr,
    stride_logits_row,
    vocab,
    num_end_ids,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """best, token = max x_i, argmax x_i over the slice's i; scratch holds x, penalised, and -inf where i is banned.

    NaN counts as -inf here, so that best equals itself and token is an id whatever the logits.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    o_v = i_s * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < vocab
    x = tl.load(logits_ptr + i_b * stride_logits_row + o_v, mask=m_v, other=-float("inf"))
    # All before the first branch, so that none waits for another.
    count_row = tl.load(count_rows_ptr + i_b).to(tl.int64)
    position = tl.load(positions_ptr + i_b)
    banned_until = tl.load(banned_until_ptr + i_b)
    temperature = tl.load(temperature_ptr + i_b)
    if count_row >= 0:
        # As many as of x at once: else x changes its layout, for rows without penalties too.
        o_c = tl.max_contiguous(count_row * vocab + o_v, 4)
        count = tl.load(counts_ptr + o_c, mask=m_v, other=0).to(tl.int32)
        times = count & _MOST_COUNTED
        presence = tl.load(penalties_ptr + i_b * 3)
        frequency = tl.load(penalties_ptr + i_b * 3 + 1)
        repetition = tl.load(penalties_ptr + i_b * 3 + 2)
        x = tl.where(count != 0, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
        x -= frequency * times.to(tl.float32) + presence * (times > 0).to(tl.float32)
    if position < banned_until:
        for i in range(num_end_ids):
            x = tl.where(o_v == tl.load(end_ids_ptr + i_b * num_end_ids + i), -float("inf"), x)
    drawn = tl.where(temperature > 0.0, vocab, 0)  # the others are done with the largest
    tl.store(scratch_ptr + i_b * vocab + o_v, x, mask=o_v < drawn)
    best, token = tl.max(tl.where(x == x, x, -float("inf")), 0, return_indices=True)
    partial = i_b * tl.num_programs(1) + i_s
    tl.store(best_ptr + partial, best)
    tl.store(tokens_ptr + partial, i_s * BLOCK + token)


@triton.jit
def _sample_kernel(
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
    out_ptr,
    ends_ptr,
    vocab,
    num_slices,
    num_end_ids,
    SLICES: tl.constexpr,
    END_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """argmax_i log p_i - log e_i over the kept i; scratch's x_i become the distances (max - x_i) / temperature.

    Top-k, top-p and min-p each bound the distance; min-p by -log(min_p), for near the maximum exp rounds to 1.
    The token is counted where its row's tokens are, and ends the row if it is one of the ids that do.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(0).to(tl.int64)
    scratch_ptr += i_b * vocab
    o_block = tl.arange(0, BLOCK)
    o_s = tl.arange(0, SLICES)
    m_s = o_s < num_slices
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
        for first in range(0, vocab, BLOCK):
            m_v = first + o_block < vocab
            x = tl.load(scratch_ptr + first + o_block, mask=m_v, other=0.0)
            tl.store(scratch_ptr + first + o_block, tl.abs(tl.div_rn(x - best, temperature)), mask=m_v)
        tl.debug_barrier()
        limit = position * 0 + _INFINITY_BITS
        top_k = tl.load(top_k_ptr + i_b)
        if (top_k > 0) & (top_k < vocab):
            limit = _smallest_within(scratch_ptr, top_k.to(tl.float32), limit, vocab, True, BLOCK)
        top_p = tl.load(top_p_ptr + i_b)
        if top_p < 1.0:
            total = _mass_within(scratch_ptr, limit, limit, vocab, False, BLOCK)
            limit = _smallest_within(scratch_ptr, top_p * total, limit, vocab, False, BLOCK)
        min_p = tl.load(min_p_ptr + i_b)
        if min_p > 0.0:
            limit = tl.minimum(limit, tl.abs(tl.log(min_p)).to(tl.int32, bitcast=True))
        seed = tl.load(seeds_ptr + i_b)

        best = -float("inf")
        token = 0
        for first in range(0, vocab, BLOCK):
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
    tl.store(out_ptr + i_b, token.to(tl.int64))
    is_end_id = tl.max((end_ids == token).to(tl.int32), 0) > 0
    tl.store(ends_ptr + i_b, is_end_id & (position + 1 >= banned_until))
    if count_row >= 0:
        count_ptr = counts_ptr + count_row * vocab + token
        count = tl.load(count_ptr).to(tl.int32)
        tl.store(count_ptr, tl.where((count & _MOST_COUNTED) < _MOST_COUNTED, count + 1, count).to(tl.int16))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    end_ids: torch.Tensor,
    banned_until: torch.Tensor,
    penalties: torch.Tensor,
    count_rows: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, vocab = logits.shape
    out, ends = logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)
    if batch == 0:
        return out, ends
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    end_ids = end_ids.contiguous()
    num_end_ids = end_ids.shape[1]
    block = min(4096, triton.next_power_of_2(vocab))
    slices = triton.cdiv(vocab, block)
    scratch = logits.new_empty((batch, vocab))
    best, tokens = logits.new_empty((batch, slices)), logits.new_empty((batch, slices), dtype=torch.int32)
    dependent = dependent_launch(logits.device)
    _best_kernel[(batch, slices)](
        logits, temperature, positions, end_ids, banned_until, penalties, count_rows, counts, scratch, best, tokens,
        logits.stride(0), vocab, num_end_ids, BLOCK=block, num_warps=8, enable_fp_fusion=False, **dependent,
    )  # fmt: skip
    _sample_kernel[(batch,)](
        best, tokens, temperature, top_k, top_p, min_p, seeds, positions, end_ids, banned_until, count_rows, counts,
        scratch, out, ends, vocab, slices, num_end_ids, SLICES=triton.next_power_of_2(slices),
        END_IDS=triton.next_power_of_2(max(1, num_end_ids)), BLOCK=block, num_warps=8, **dependent,
    )  # fmt: skip
    return out, ends
