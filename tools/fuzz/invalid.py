"""Calls that are wrong on purpose: each must raise ValueError, and leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastdms.ops import SpanCache
from fastdms.tools.fuzz.budget import WrongAnswer
from fastdms.tools.fuzz.calls import Call, kernels, same_bytes, views

__all__ = ["check_rejected"]

Change = Callable[[torch.Tensor], torch.Tensor]

_ANY_STRIDE = "a last stride of 2"  # heads may lie anyhow, but for their channels
_HEADS: dict[str, Change] = {
    "integers": lambda x: x.to(torch.int32),
    "one dimension more": lambda x: x.unsqueeze(0),
    "one channel less": lambda x: x[..., :-1],
    "one token more": lambda x: torch.cat((x, x.new_zeros((1, *x.shape[1:])))),
    _ANY_STRIDE: lambda x: torch.stack((x, x), -1)[..., 0],
}
_INTS: dict[str, Change] = {
    "int64": lambda x: x.long(),
    "floats": lambda x: x.float(),
    "one dimension more": lambda x: x.unsqueeze(0),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}
_LONGER: dict[str, Change] = {"one more": lambda x: torch.cat((x, x[:1])) if x.numel() else x.new_zeros(1)}
_ALPHA: dict[str, Change] = {
    "one head more": lambda x: torch.cat((x, x[:, :1]), 1) if x.numel() else x.new_zeros(7, 7),
    "one dimension less": lambda x: x.flatten(),
}
_TABLE: dict[str, Change] = {
    "fp64": lambda x: x.double(),
    "one channel more": lambda x: torch.cat((x, x[:, :1]), 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}
_PAGES: dict[str, Change] = {
    "fp64": lambda x: torch.zeros(x.shape, dtype=torch.float64, device=x.device),
    "bytes": lambda x: x.view(torch.uint8),
    "one page less": lambda x: x[:-1],
    "strided": lambda x: torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)[..., 0],
}
_SCALES: dict[str, Change] = {"some more": lambda x: x.new_zeros((x.shape[0] + 1, *x.shape[1:]))}
_STATE: dict[str, dict[str, Change]] = {
    "k_pages": _PAGES, "v_pages": _PAGES, "k_scales": _SCALES, "v_scales": _SCALES,
    "page_table": {**_INTS, "one row less": lambda x: x[:-1]}, "ring": {**_INTS, "one row less": lambda x: x[:-1]},
    "live_len": {**_INTS, "one row less": lambda x: x[:-1]}, "free_pages": {**_INTS, **_LONGER}, "num_free": _INTS,
    "starved": {**_INTS, **_LONGER},
}  # fmt: skip
_RELEASED: dict[str, dict[str, Change]] = {
    "page_table": {**_INTS, "one row less": lambda x: x[:, :-1]}, "free_pages": _INTS, "num_free": _INTS,
    "live_len": {**_INTS, "one row less": lambda x: x[:, :-1]}, "starved": {**_INTS, **_LONGER},
}  # fmt: skip
_NORM: dict[str, Change] = {"one channel more": lambda x: torch.cat((x, x[:1])), "two": lambda x: torch.stack((x, x))}
_TOKENS: dict[str, dict[str, Change]] = {
    "q": _HEADS, "k": _HEADS, "v": _HEADS, "alpha": _ALPHA, "cos": _TABLE, "sin": _TABLE, "q_norm": _NORM,
    "k_norm": _NORM, "positions": {**_INTS, **_LONGER},
}  # fmt: skip
_DECISIONS: dict[str, Change] = {"integers": lambda x: x.int(), "one dimension less": lambda x: x[:, 0]}
_SHIFTS = {"shift": (-1, 2, 7)}
_ZERO_MODES = {"zero_borrowed": ("both", "", "PRE_ROPE")}
_CHUNK: dict[str, dict[str, Change]] = {
    **{name: _TOKENS[name] for name in ("k", "v", "positions")}, "decisions": _DECISIONS,
    "rows": {**_INTS, **_LONGER}, "chunk_indptr": {**_INTS, **_LONGER},
}  # fmt: skip
_ROW = {"int64": lambda x: x.long() if x.dtype != torch.int64 else x.int(), **_LONGER}
_SOFT: dict[str, Change] = {
    **{name: _HEADS[name] for name in ("integers", "one dimension more", "one channel less", _ANY_STRIDE)},
    "another dtype": lambda x: x.double(),
    "one token less": lambda x: x[:, :, :-1],
}
_ROWS: dict[str, Change] = {
    **{name: _HEADS[name] for name in ("integers", "one dimension more", "one channel less", _ANY_STRIDE)},
    "fp64": lambda x: x.double(),
    "17 rows": lambda x: x.new_zeros(17, x.shape[1]),
}
_VECTOR: dict[str, Change] = {"fp64": lambda x: x.double(), "one dimension more": lambda x: x.unsqueeze(0), **_LONGER}
# What makes a valid call invalid, by op: changes of inputs, and bad values of options.
_INPUTS: dict[str, dict[str, dict[str, Change]]] = {
    "decode_append": {**_TOKENS, "rows": {**_INTS, **_LONGER}},
    "decode_attention": {"q": _HEADS, "rows": {**_INTS, **_LONGER}, "positions": {**_INTS, **_LONGER}},
    "decode_linear": {
        "x": _ROWS, "residual": _ROWS, **dict.fromkeys(("scale", "bias", "norm"), _VECTOR),
        "weight": {
            "none": lambda x: x[:0], "one channel less": lambda x: x[:, :-1],
            **{name: _PAGES[name] for name in ("fp64", "bytes", "strided")},
        },
    },
    "prefill_rope": {name: changes for name, changes in _TOKENS.items() if name != "v"},
    "prefill_append": _CHUNK,
    "prefill_attention": {**_CHUNK, "q": _HEADS},
    "dense_attention": {
        **{name: _TOKENS[name] for name in ("q", "k", "v")},
        **{name: {key: _PAGES[key] for key in ("fp64", "one page less", "strided")} for name in ("k_history",)},
    },
    "dequantise": {
        "weight": {
            "none": lambda x: x[:0], "16 bits": lambda x: x.to(torch.int16),
            "one dimension less": lambda x: x.flatten(), "strided": lambda x: torch.cat((x, x), 1)[:, ::2],
        },
        "scale": {"fp64": lambda x: x.double(), "one dimension more": lambda x: x.unsqueeze(0), **_LONGER},
    },
    "release": {"rows": _INTS},
    "sample": {
        "logits": {"fp64": lambda x: x.double(), "one dimension less": lambda x: x.flatten()},
        **dict.fromkeys(
            ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "banned_until", "count_rows"), _ROW
        ),
        "end_ids": {"int64": lambda x: x.long(), **_LONGER},
        "penalties": {"fp64": lambda x: x.double(), "two": lambda x: x[:, :2].contiguous(), **_LONGER},
        "counts": {"int32": lambda x: x.int(), "one id less": lambda x: x[:, 1:].contiguous()},
    },
    "soft_attention": {
        "q": _SOFT, "k": _SOFT, "v": _SOFT,
        "log_keep": {"fp64": lambda x: x.double(), "one token less": lambda x: x[..., :-1]},
    },
}  # fmt: skip
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "decode_append": {**_SHIFTS, **_ZERO_MODES},
    "dense_attention": {"start": (-1, 2**31, 2**62)},
    "dequantise": {"dtype": (torch.float64, torch.int32, torch.float8_e4m3fn)},
    "prefill_rope": _ZERO_MODES,
    "prefill_append": _SHIFTS,
    "prefill_attention": _SHIFTS,
    "soft_attention": {"window_tokens": (-1, -7)},
}


def check_rejected(
    call: Call, rng: np.random.Generator, device: torch.device, cache: SpanCache | None,
    state: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """Make ``call`` invalid in one way drawn at random, and raise WrongAnswer unless it is refused without a trace.

    cache, state: what the op would change, on ``device``.
    """
    op = call.op
    placed = call.place(device)
    inputs = views(placed)
    kinds = [(name, key) for name, changes in _INPUTS[op].items() if inputs[name] is not None for key in changes]
    kinds += [(name, key) for name in _OPTIONS.get(op, {}) for key in ("value",)]
    held = state or (cache._asdict() if cache is not None else {})
    of_state = _RELEASED if state else _STATE
    kinds += [(name, key) for name in held for key in of_state.get(name, {})]
    name, key, bad = _draw(op, rng, kinds, inputs, held, of_state)
    options: dict[str, Any] = dict(state)
    if name in inputs:
        inputs[name] = bad
    elif name in held:
        held = {**held, name: bad}
        cache, options = (None, held) if state else (SpanCache(**held), {})
    else:
        options[name] = bad
    before = {field: x.clone() for field, x in held.items()}
    message = f"{name} ({key}) is invalid, and the call"
    with kernels(device, op):
        try:
            call.run(inputs, cache, **options)
        except ValueError:
            pass
        except Exception as error:
            raise WrongAnswer(op, f"{message} raised {type(error).__name__} for a ValueError: {error}") from error
        else:
            raise WrongAnswer(op, f"{message} was not refused")
    if any(x is not None and x.changed for x in placed.values()) or any(
        not same_bytes(x.contiguous(), before[field].contiguous()) for field, x in held.items()
    ):
        raise WrongAnswer(op, f"{message}, though refused, wrote to its tensors")


def _draw(
    op: str, rng: np.random.Generator, kinds: list[tuple[str, str]], inputs: dict[str, torch.Tensor | None],
    held: dict[str, torch.Tensor], of_state: dict[str, dict[str, Change]],
) -> tuple[str, str, Any]:  # fmt: skip
    """What to replace, in words how, and by what."""
    while True:
        name, key = kinds[int(rng.integers(len(kinds)))]
        if name in _OPTIONS.get(op, {}):
            bad = _OPTIONS[op][name][int(rng.integers(len(_OPTIONS[op][name])))]
            return name, repr(bad), bad
        good = inputs[name] if name in inputs else held[name]
        assert good is not None
        changed = (_INPUTS[op] if name in inputs else of_state)[name][key](good)
        # Of nothing there is not one less, and a single element lies as one stride says as well as another.
        if (
            (changed.shape, changed.dtype) != (good.shape, good.dtype)
            or not changed.is_contiguous()
            or key == _ANY_STRIDE
        ):
            return name, key, changed
