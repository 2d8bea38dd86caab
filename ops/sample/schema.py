"""``fastdms::sample``: schema, check and fake. Imports torch only."""

from __future__ import annotations

import torch

from fastdms.ops.registry import register
from fastdms.ops.span_cache import check

NOT_FINITE = -2  # in place of a token

SCHEMA = (
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions, Tensor end_ids, Tensor banned_until, Tensor penalties, Tensor count_rows, Tensor(a!) counts) "
    "-> (Tensor, Tensor)"
)


def _check(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, positions: torch.Tensor, end_ids: torch.Tensor, banned_until: torch.Tensor,
    penalties: torch.Tensor, count_rows: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    check(
        logits.dim() == 2 and logits.dtype == torch.float32,
        f"logits must be fp32 [B, V], got {logits.dtype} {tuple(logits.shape)}",
    )
    batch = logits.shape[0]
    expected = {
        torch.float32: (temperature, top_p, min_p),
        torch.int32: (top_k, positions, banned_until, count_rows),
        torch.int64: (seeds,),
    }
    for dtype, tensors in expected.items():
        for t in tensors:
            check(
                t.dtype == dtype and t.shape == (batch,) and t.is_contiguous(),
                f"sampling tensors must be {dtype} [{batch}] here, got {t.dtype} {tuple(t.shape)}",
            )
    check(
        end_ids.dtype == torch.int32 and end_ids.dim() == 2 and end_ids.shape[0] == batch,
        f"end_ids must be torch.int32 [{batch}, K] here, got {end_ids.dtype} {tuple(end_ids.shape)}",
    )
    check(
        penalties.dtype == torch.float32 and penalties.shape == (batch, 3) and penalties.is_contiguous(),
        f"penalties must be torch.float32 [{batch}, 3] here, got {penalties.dtype} {tuple(penalties.shape)}",
    )
    check(
        counts.dtype == torch.int16 and counts.shape[1:] == logits.shape[1:] and counts.is_contiguous(),
        f"counts must be torch.int16 [R, {logits.shape[1]}] here, got {counts.dtype} {tuple(counts.shape)}",
    )


def _fake(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.bool)


register(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference="fastdms.ops.sample.reference:sample",
    kernel="fastdms.ops.sample.kernel:sample",
)
