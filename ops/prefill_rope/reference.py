"""The definition of prefill_rope in plain PyTorch, fp32."""

from __future__ import annotations

import torch

from fastdms.ops.rope_decide import rope_and_decide


def prefill_rope(
    q: torch.Tensor, k: torch.Tensor, *args: torch.Tensor | float | int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_rot, k_rot, decisions = rope_and_decide(q, k, *args)  # type: ignore[arg-type]
    return q_rot.to(q.dtype), k_rot.to(k.dtype), decisions
