"""The counts of a graph cache as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["format_report"]

_HEADINGS = ("bucket", "captures", "replays", "padded rows", "MiB kept", "seconds")


def format_report(stats: Mapping[str, Any]) -> str:
    """``GraphCache.stats()`` as a line for each bucket, and two for all of them.

    padded rows: share of the rows computed that were padding. MiB kept: what a held graph keeps beside the shared pool.
    seconds: compiling and capturing. In modes without graphs, replays are runs of the step.
    """
    rows = [_HEADINGS]
    for bucket in stats["buckets"]:
        runs, padded = stats["runs"][bucket], stats["padded_rows"][bucket]
        share = padded / (runs * bucket) if runs else 0.0
        rows.append(
            (
                f"{bucket}",
                f"{stats['bucket_captures'][bucket]}",
                f"{runs:,}",
                f"{share:.1%}",
                f"{stats['bytes'][bucket] / 2**20:.1f}" if bucket in stats["bytes"] else "-",
                f"{stats['seconds'][bucket]:.1f}",
            )
        )
    chunks = stats["chunks"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        (
            *table,
            f"mode {stats['mode']}: {stats['compiles']} compiles, {stats['recompiles']} of them after start; "
            f"artifacts {stats['artifacts']}",
            f"{stats['hits']:,} hits, {stats['misses']} misses, {stats['evictions']} evictions; "
            f"shared pool {stats['pool_bytes'] / 2**20:.1f} MiB",
            *([_chunks_line(chunks)] if chunks else []),
        )
    )


def _chunks_line(chunks: Mapping[str, Any]) -> str:
    runs = ", ".join(f"{count:,} of {size:,} tokens" for size, count in chunks["runs"].items())
    return f"prefill chunks: {runs}; {chunks['bytes'] / 2**20:.1f} MiB, {chunks['seconds']:.1f} s"
