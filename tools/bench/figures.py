"""The arithmetic of the figures: spreads, tokens per second, floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["bucket_name", "decode_figures", "decode_rates", "dtype_name", "floor_ms", "rate", "spread"]


def dtype_name(dtype: torch.dtype) -> str:
    """As rows have it: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def bucket_name(row: Mapping[str, Any]) -> str:
    """What a measurement of a decode bucket is called: model, rows, context."""
    return f"{row['model']}, {row['rows']} rows x {row['context']:,}"


def spread(samples: Sequence[float], digits: int = 6) -> dict[str, float]:
    """The 20th, 50th and 80th percentiles, interpolated between samples."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), digits)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def decode_rates(rows: int, new_tokens: int, first_s: Sequence[float], whole_s: Sequence[float]) -> dict[str, Any]:
    """Tokens per second of decoding: ``B (O - 1) / (t_O - t_1)``.

    rows: B. new_tokens: O. first_s, whole_s: seconds for one token and for O tokens of every row, prefill included,
    one of each per repeat. Best: of the smallest of either; median: of their medians. A figure is None where the
    clock's noise left no time between the two.
    """
    steps = new_tokens - 1
    best_s = min(whole_s) - min(first_s)
    median_s = spread(whole_s)["p50"] - spread(first_s)["p50"]
    each = [(whole - first) / steps * 1e3 for first, whole in zip(first_s, whole_s, strict=True)]
    return {
        "decode_tok_s": rate(rows * steps, best_s),
        "decode_tok_s_median": rate(rows * steps, median_s),
        "step_ms": round(best_s / steps * 1e3, 6) if best_s > 0 else None,
        "step_ms_spread": spread(each),
    }


def decode_figures(
    rows: int, new_tokens: int, first_s: Sequence[float], whole_s: Sequence[float], floor: float
) -> dict[str, Any]:
    """``decode_rates``, and the share that ``floor``, ms of a step, is of the best."""
    rates = decode_rates(rows, new_tokens, first_s, whole_s)
    best = rates["step_ms"]
    return {
        **rates,
        "floor_ms": round(floor, 6),
        "floor_share": None if best is None else round(floor / best, 4),
    }


def rate(count: float, seconds: float) -> float | None:
    """Per second; None for no time."""
    return round(count / seconds, 3) if seconds > 0 else None


def floor_ms(num_bytes: float, bandwidth_tb_s: float) -> float:
    """Milliseconds to move ``num_bytes``."""
    return num_bytes / (bandwidth_tb_s * 1e12) * 1e3
