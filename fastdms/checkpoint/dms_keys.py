"""The keys of config.json under which the public DMS checkpoints declare their rule."""

from __future__ import annotations

from typing import Any

from fastdms.config import DMSConfig

__all__ = ["config_keys", "whole_if_integral"]


def config_keys(dms: DMSConfig) -> dict[str, Any]:
    """What a checkpoint with the rule ``dms`` adds to its configuration.

    ``shift`` and ``zero_borrowed`` have no key there: they follow from the layout, which ``fastdms.checkpoint.dms``
    tells.
    """
    keys: dict[str, Any] = {
        "dms_window_size": dms.window_tokens,
        "dms_alpha_scale": float(dms.alpha_scale),
        "dms_initial_alpha_offset": float(dms.alpha_offset),
    }
    if dms.target_compression is not None:
        keys["dms_cr"] = whole_if_integral(dms.target_compression)
    if dms.source == "adapter":
        keys |= {"dms_separate_alpha": True, "dms_alpha_per": "head"}
    if dms.shift and dms.window_tokens > 1:
        # Model-Optimizer's own paged inference wants its page (256 tokens unless told) to be smaller than the window.
        keys["dms_paged_attention_block_size"] = min(256, 1 << (dms.window_tokens - 1).bit_length() - 1)
    return keys


def whole_if_integral(number: float) -> int | float:
    """8.0 -> 8, 2.5 -> 2.5: the public checkpoints write a whole ratio without a point."""
    return int(number) if number == int(number) else number
