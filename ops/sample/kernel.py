"""Triton backend of sample: the largest logit by slices, then the draw."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdms.ops.sample.counts import MOST_COUNTED
from fastdms.ops.sample.draw_kernel import PARTS, WAYS, _draw_kernel
from fastdms.ops.triton_common import dependent_launch

_MOST_COUNTED = tl.constexpr(MOST_COUNTED)


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
    largest_ptr,
    best_ptr,
    tokens_ptr,
    meetings_ptr,
    stride_logits_row,
    vocab,
    num_end_ids,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """best, token = max x_i, argmax x_i over the slice's i; scratch holds x, penalised, and -inf where i is banned.
    largest: of the logits as they are given, inf if one is NaN. Programs of the row have met 0 times.

    For best NaN counts as -inf, so that it equals itself and token is an id whatever the logits.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    o_v = i_s * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < vocab
    logits = tl.load(logits_ptr + i_b * stride_logits_row + o_v, mask=m_v, other=-float("inf"))
    x = logits
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
    largest = tl.max(tl.where(logits == logits, logits, float("inf")), 0)
    tl.store(meetings_ptr + i_b, 0, mask=i_s == 0)
    partial = i_b * tl.num_programs(1) + i_s
    tl.store(largest_ptr + partial, largest)
    tl.store(best_ptr + partial, best)
    tl.store(tokens_ptr + partial, i_s * BLOCK + token)


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
    largest, best = logits.new_empty((batch, slices)), logits.new_empty((batch, slices))
    tokens = logits.new_empty((batch, slices), dtype=torch.int32)
    programs = _draw_programs(batch, logits.device)
    meetings = logits.new_empty(batch, dtype=torch.int32)
    sums = logits.new_empty((batch, 2, PARTS.value, WAYS.value))
    drawn, drawn_tokens = logits.new_empty((batch, programs)), tokens.new_empty((batch, programs))
    dependent = dependent_launch(logits.device)
    _best_kernel[(batch, slices)](
        logits, temperature, positions, end_ids, banned_until, penalties, count_rows, counts, scratch, largest, best,
        tokens, meetings, logits.stride(0), vocab, num_end_ids, BLOCK=block, num_warps=8, enable_fp_fusion=False,
        **dependent,
    )  # fmt: skip
    _draw_kernel[(batch, programs)](
        largest, best, tokens, temperature, top_k, top_p, min_p, seeds, positions, end_ids, banned_until, count_rows,
        counts, scratch, meetings, sums, drawn, drawn_tokens, out, ends, vocab, slices, num_end_ids,
        SLICES=triton.next_power_of_2(slices), END_IDS=triton.next_power_of_2(max(1, num_end_ids)), PROGRAMS=programs,
        BLOCK=min(1024, block), num_warps=8, **dependent,
    )  # fmt: skip
    return out, ends


def _draw_programs(batch: int, device: torch.device) -> int:
    """Programs that share a row's draw: as they wait for each other, no more than run at once, one a multiprocessor.

    Two draws at once, on streams of different priority, could each have half of the multiprocessors and wait for ever.
    The interpreter runs one after the other.
    """
    if device.type != "cuda":
        return 1
    most = torch.cuda.get_device_properties(device).multi_processor_count // batch
    return int(1 << (min(PARTS.value, max(1, most)).bit_length() - 1))
