"""``fastdms bench kernels``: each op alone, beside the floor of what it moves and beside other libraries."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastdms.ops import dense_kernel
from fastdms.options import resolve_device
from fastdms.tools.bench.cases import build, launch, restorer
from fastdms.tools.bench.check import check_op
from fastdms.tools.bench.figures import floor_ms, spread
from fastdms.tools.bench.peers import (
    FlashAttention,
    Peer,
    decode_peers,
    find_flash_attention,
    linear_peers,
    prefill_peers,
)
from fastdms.tools.bench.settings import KEPT, KernelSettings
from fastdms.tools.bench.spec import DTYPE, Case, Spec
from fastdms.tools.bench.timing import time_launches

__all__ = ["measure_kernels", "specs", "table"]

_MOST_CPU_TOKENS = 4096  # the references write the whole mask out
_DEPENDS_ON = {
    "decode_attention": ("head_dim", "kv_dtype", "rows", "live", "spans", "kept"),  # kept: for the own dense run alone
    "decode_linear": ("linear", "weights", "rows"),
    "dequantise": ("linear", "weights"),
    "decode_append": ("head_dim", "kv_dtype", "rows", "kept"),
    "decode_layer": ("head_dim", "kv_dtype", "rows", "live", "spans", "kept"),  # append, then attention
    "release": ("rows", "live", "spans"),
    "prefill_attention": ("head_dim", "kv_dtype", "length", "chunk", "kept"),
    "prefill_append": ("head_dim", "kv_dtype", "length", "chunk", "kept"),
    "dense_attention": ("head_dim", "length", "chunk"),
    "soft_attention": ("head_dim", "length", "kept"),
}
_VARIED = ("head_dim", "kv_dtype", "rows", "live", "spans", "length", "chunk", "linear", "weights")
_PLURALS = {
    "head_dim": "head_dims",
    "kv_dtype": "kv_dtypes",
    "length": "lengths",
    "chunk": "chunks",
    "linear": "linears",
}


def measure_kernels(settings: KernelSettings) -> Iterator[dict[str, Any]]:
    """One row for each case. ValueError, before anything is timed, if an op differs from its reference."""
    device = resolve_device(settings.device)
    cases = specs(settings)
    if device.type != "cuda" and (longest := max(spec.length for spec in cases)) > _MOST_CPU_TOKENS:
        raise ValueError(
            f"--length {longest}: the CPU runs the plain references, at most {_MOST_CPU_TOKENS} tokens (see --quick)"
        )
    flash = find_flash_attention(settings.peer)
    if settings.check:
        checked = {(spec.op, spec.head_dim, spec.kv_dtype, spec.linear, spec.weights): spec for spec in cases}
        for spec in checked.values():
            check_op(spec, device)
    else:
        print("fastdms: the figures are unchecked: no kernel was held against its reference", file=sys.stderr)
    for spec in cases:
        yield _measure(spec, settings, flash, device)


def specs(settings: KernelSettings) -> list[Spec]:
    """Every case: each op with all combinations of what it depends on."""
    shared = {
        "kv_heads": settings.kv_heads, "group": settings.group, "page_size": settings.page_size,
        "window_tokens": settings.window_tokens, "head_dim": settings.head_dims[0], "kv_dtype": settings.kv_dtypes[0],
    }  # fmt: skip
    found = []
    for op in settings.ops:
        names = _DEPENDS_ON[op]
        for values in itertools.product(*(_values(settings, op, name) for name in names)):
            fields: dict[str, Any] = shared | dict(zip(names, values, strict=True))
            spec = Spec(op=op, **fields)
            if op == "prefill_attention" and not spec.start:
                spec = replace(spec, kv_dtype=settings.kv_dtypes[0])  # there is nothing in the pages
            found.append(spec)
    return list(dict.fromkeys(found))


def _values(settings: KernelSettings, op: str, name: str) -> tuple[Any, ...]:
    if name == "kept" and settings.kept is None:
        return (1.0,) if op == "decode_attention" else KEPT
    if name == "weights" and op == "dequantise":
        return tuple(weights for weights in settings.weights if weights != "bf16")
    values: tuple[Any, ...] = getattr(settings, _PLURALS.get(name, name))
    return values


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of all rows, one line each."""
    head = ("op", "D", "KV", "case", "kept", "us p20", "p50", "p80", "GB/s", "floor", "TFLOP/s", "against peers")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        parts: tuple[Any, ...] = (
            row["linear"],
            row["weights"],
            row["rows"] and f"{row['rows']} rows",
            row["live"] and f"{row['live']:,} live",
            row["spans"],
        )
        if row["length"]:
            parts = (f"{row['length']:,} tokens", row["chunk"] and f"last {row['chunk']:,}")
        lines.append((
            f"{row['op']} ({row['dense_kernel']})" if row["dense_kernel"] else row["op"],
            str(row["head_dim"] or ""),
            row["kv_dtype"] or "",
            ", ".join(part for part in parts if part),
            "" if row["kept"] is None else f"{row['kept']:.3f}",
            *(f"{row['us'][name]:,.1f}" for name in ("p20", "p50", "p80")),
            f"{row['gb_s']:,.3g}" if row["gb_s"] < 100 else f"{row['gb_s']:,.0f}",
            f"{row['floor_share']:.1%}",
            "" if row["tflop_s"] is None else f"{row['tflop_s']:.3g}",
            ", ".join(_against(row)),
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    unchecked = "" if all(row["checked"] for row in rows) else "UNCHECKED: no kernel was held against its reference\n"
    return unchecked + "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _measure(spec: Spec, settings: KernelSettings, flash: FlashAttention, device: torch.device) -> dict[str, Any]:
    case, us = _time(spec, settings, device)
    seconds = us["p50"] / 1e6
    floor_us = floor_ms(case.num_bytes, settings.bandwidth_tb_s) * 1e3
    depends = _DEPENDS_ON[spec.op]
    return {
        "op": spec.op,
        **{name: getattr(spec, name) if name in depends else None for name in _VARIED},
        **{name: getattr(spec, name) for name in ("kv_heads", "group", "page_size")},
        "dense_kernel": dense_kernel(DTYPE, spec.head_dim, spec.group, device)
        if spec.op == "dense_attention"
        else None,
        "window": spec.window_tokens,
        "longest": case.longest,
        "kept_asked": spec.kept if "kept" in depends else None,
        "kept": None if case.kept is None else round(case.kept, 4),
        "input_sets": len(case.sets),
        "repeats": settings.repeats,
        "checked": settings.check,
        "us": us,
        "bytes": case.num_bytes,
        "gb_s": round(case.num_bytes / seconds / 1e9, 3),
        "bandwidth_tb_s": settings.bandwidth_tb_s,
        "floor_us": round(floor_us, 4),
        "floor_share": round(floor_us / us["p50"], 6),
        "tflop_s": None if case.flops is None else round(case.flops / seconds / 1e12, 4),
        "dense_tflop_s": None if case.dense_flops is None else round(case.dense_flops / seconds / 1e12, 4),
        **_beside(case, us["p50"], settings, flash, device),
        "own_dense": _own_dense(spec, case, us["p50"], settings, device),
    }


def _against(row: dict[str, Any]) -> Iterator[str]:
    for name, peer in row["peers"].items():
        yield f"{name}: failed" if "error" in peer else f"{name}: {peer['times_faster']:.2f}x"
    if dense := row["own_dense"]:
        yield f"own dense: {dense['times_faster']:.2f}x, {dense['of_compression']:.0%} of {dense['compression']:.2f}x"


def _time(spec: Spec, settings: KernelSettings, device: torch.device) -> tuple[Case, dict[str, float]]:
    """The case, and the spread of its microseconds."""
    try:
        case = build(spec, device)
        launches = [
            functools.partial(launch, case.spec, tensors, case.cache, index) for index, tensors in enumerate(case.sets)
        ]
        return case, spread(time_launches(launches, restorer(case.cache), device, settings.repeats), 3)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"no memory on {device} for {spec}: {error}") from error


def _own_dense(
    spec: Spec, case: Case, our_us: float, settings: KernelSettings, device: torch.device
) -> dict[str, Any] | None:
    """decode_attention over spans that have kept all of the tokens that the case's are left of.

    compression: bytes that it moves, over the case's. of_compression: the share of it that becomes speed. None for
    other ops, and where nothing was evicted.
    """
    if spec.op != "decode_attention" or spec.logical == spec.live:
        return None
    dense, us = _time(replace(spec, live=spec.logical, kept=1.0, spans="uniform"), settings, device)
    faster, compression = us["p50"] / our_us, dense.num_bytes / case.num_bytes
    return {
        "tokens": spec.logical,
        "us": us,
        "bytes": dense.num_bytes,
        "gb_s": round(dense.num_bytes / us["p50"] / 1e3, 3),
        "times_faster": round(faster, 4),
        "compression": round(compression, 4),
        "of_compression": round(faster / compression, 4),
    }


def _beside(
    case: Case, our_us: float, settings: KernelSettings, flash: FlashAttention, device: torch.device
) -> dict[str, Any]:
    """The same by other libraries, and how many times faster the op is than each and than the fastest."""
    if case.spec.op == "decode_attention":
        found = decode_peers(case, flash, device)
    elif case.spec.op == "decode_linear":
        found = linear_peers(case)
    elif case.spec.op in ("prefill_attention", "dense_attention"):
        found = prefill_peers(case, flash, device)
    else:
        return {"peers": {}, "times_faster_than_best_peer": None}
    peers: dict[str, dict[str, Any]] = {}
    if flash.missing and case.spec.op != "decode_linear":
        peers[flash.name] = {"error": flash.missing}
    for peer in found:
        peers[peer.name] = _time_peer(peer, case, our_us, settings, device)
    times = [peer["times_faster"] for peer in peers.values() if "error" not in peer]
    return {"peers": peers, "times_faster_than_best_peer": min(times, default=None)}


def _time_peer(peer: Peer, case: Case, our_us: float, settings: KernelSettings, device: torch.device) -> dict[str, Any]:
    try:
        us = spread(time_launches(peer.launches, lambda: None, device, settings.repeats), 3)
    except Exception as error:  # a foreign kernel may refuse a shape in any way
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {
        "us": us,
        "bytes": peer.num_bytes,
        "gb_s": round(peer.num_bytes / us["p50"] / 1e3, 3),
        "dense_tflop_s": None if case.dense_flops is None else round(case.dense_flops / us["p50"] / 1e6, 4),
        "times_faster": round(us["p50"] / our_us, 4),
    }
