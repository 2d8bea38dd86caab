"""Two runs of ``fastdms bench profile`` side by side: which kernels the difference of a step lies in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdms.tools.bench.figures import bucket_name

__all__ = ["Bucket", "compare", "differences", "read_profiles"]

Bucket = tuple[str, int, int]  # model, rows, context
_SETTINGS = ("kept_asked", "window", "dms", "kv_dtype", "dtype", "weights", "mode", "card", "driver", "torch", "commit")
_KEYS = {"model": str, "rows": int, "context": int, "step_us": float, "idle_us": float, "kernels": list}


def compare(a: Path, b: Path) -> str:
    """A table for each bucket of both files, and where they differ in settings, these.

    Raises ValueError for a file without profiles and for two without a bucket in common.
    """
    of_a, of_b = read_profiles(a), read_profiles(b)
    common = [bucket for bucket in of_a if bucket in of_b]
    if not common:
        raise ValueError(
            f"{a} and {b} have no bucket (model, rows, context) in common: {_names(of_a)} in the one, {_names(of_b)} "
            f"in the other; profile the same --shape or --model, --concurrency and --context in both"
        )
    return "\n\n".join(_table(of_a[bucket], of_b[bucket]) for bucket in common)


def read_profiles(file: Path) -> dict[Bucket, dict[str, Any]]:
    """The last profile of each bucket of JSON lines; lines of other benchmarks are passed over.

    Raises ValueError for what isn't JSON lines and for a file without profiles.
    """
    expected = "expected JSON lines that fastdms bench profile --json wrote"
    found: dict[Bucket, dict[str, Any]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} can't be read ({error}); {expected}") from None
    for row in rows:
        if isinstance(row, dict) and row.get("bench") == "profile":
            if not _is_profile(row):
                raise ValueError(f"{file} holds a profile without {', '.join(_KEYS)} as they should be; {expected}")
            found[row["model"], row["rows"], row["context"]] = row
    if not found:
        raise ValueError(f"{file} holds no profile; {expected}")
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, added_us in A, in B, and B less A, of each kernel of either; the largest difference first."""
    of_a, of_b = ({kernel["name"]: float(kernel["added_us"]) for kernel in row["kernels"]} for row in (a, b))
    rows = [(name, of_a.get(name, 0.0), of_b.get(name, 0.0)) for name in of_a | of_b]
    return sorted(((name, x, y, round(y - x, 3)) for name, x, y in rows), key=lambda row: (-abs(row[3]), row[0]))


def _table(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    lines = [bucket_name(a)]
    lines += [f"  {name}: {a.get(name)} in A, {b.get(name)} in B" for name in _SETTINGS if a.get(name) != b.get(name)]
    lines.append(f"{'us in A':>12} {'us in B':>12} {'difference':>12}  kernel")
    lines += [_line(a["step_us"], b["step_us"], "(step)"), _line(a["idle_us"], b["idle_us"], "(idle)")]
    return "\n".join([*lines, *(_line(x, y, name[:80]) for name, x, y, _ in differences(a, b))])


def _line(a: float, b: float, name: str) -> str:
    return f"{a:>12,.1f} {b:>12,.1f} {b - a:>+12,.1f}  {name}"


def _names(buckets: Mapping[Bucket, Any]) -> str:
    return ", ".join(f"{model} {rows} x {context:,}" for model, rows, context in buckets)


def _is_profile(row: Mapping[str, Any]) -> bool:
    if not all(isinstance(row.get(key), (kind, int) if kind is float else kind) for key, kind in _KEYS.items()):
        return False
    return all(
        isinstance(kernel, dict)
        and isinstance(kernel.get("name"), str)
        and isinstance(kernel.get("added_us"), (int, float))
        for kernel in row["kernels"]
    )
