"""How often each token occurs in a row: what penalties read, and sampling counts on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["MOST_COUNTED", "count_tokens"]

MOST_COUNTED = 2**15 - 1


def count_tokens(prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    """``[V]`` int16 on the CPU: times in the output, ``MOST_COUNTED`` at most; the sign bit: it is in the prompt."""
    prompt, output = (torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in (prompt_ids, output_ids))
    counts = output.bincount(minlength=vocab_size).clamp_max(MOST_COUNTED).to(torch.int16)
    counts[prompt] |= -MOST_COUNTED - 1
    return counts
