"""Calls of sample for its tests: settings by name, one number for all rows or one for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastdms.ops import sample
from tests.ops.harness import on

_DTYPES = {
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
    "seeds": torch.int64, "positions": torch.int32, "banned_until": torch.int32, "count_rows": torch.int32,
}  # fmt: skip
DEFAULTS = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "positions": 0, "banned_until": 0,
    "count_rows": -1,
}  # fmt: skip
NEUTRAL = (0.0, 0.0, 1.0)  # penalties


class Sampled(NamedTuple):
    """What a call returned, and ``counts [R, V]`` after it; all on the CPU."""

    tokens: list[int]
    ends: list[bool]
    counts: torch.Tensor


def make_settings(batch: int, vocab: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Tensors of each setting; without ``counts`` there are none."""
    out = {}
    for name, dtype in _DTYPES.items():
        value = changes.get(name, DEFAULTS[name])
        out[name] = torch.tensor(value if isinstance(value, list) else [value] * batch, dtype=dtype)
    end_ids = torch.tensor(changes.get("end_ids", [[-1, -1]] * batch), dtype=torch.int32)
    out["end_ids"] = end_ids.view(batch, end_ids.shape[-1])
    out["penalties"] = torch.tensor(changes.get("penalties", [NEUTRAL] * batch), dtype=torch.float32).view(batch, 3)
    out["counts"] = changes.get("counts", torch.zeros(0, vocab, dtype=torch.int16))
    return out


def run_sample(backend: str, logits: torch.Tensor, **changes: Any) -> Sampled:
    """One call, on copies of what it mutates."""
    given = make_settings(*logits.shape, **changes)
    with on(backend) as device:
        placed = {name: value.to(device, copy=True) for name, value in given.items()}
        tokens, ends = sample(logits.to(device), **placed)
    assert (tokens.dtype, ends.dtype) == (torch.int64, torch.bool)
    assert tokens.shape == ends.shape == logits.shape[:1]
    return Sampled(tokens.tolist(), ends.tolist(), placed["counts"].cpu())
