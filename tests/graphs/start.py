"""A process's start: an empty compiler cache, and a small step compiled for two buckets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from fastdms.graphs import GraphCache
from tests.graphs.toys import rows, sorting_step

__all__ = ["start"]


def start(folder: Path | None, **given: Any) -> tuple[str, int]:
    """(state of the artifacts, graphs that inductor had to compile)."""
    with fresh_cache():
        options: dict[str, Any] = {"mode": "compile", "buckets": (1, 2), "device": torch.device("cpu")} | given
        graphs = GraphCache(sorting_step, artifacts=folder, **options)
        misses = counters["inductor"]["fxgraph_cache_miss"]
        graphs.warm_up()
        misses = counters["inductor"]["fxgraph_cache_miss"] - misses
        assert graphs.run(rows(2, token=5))[0].tolist() == [5, 6]
        stats = graphs.stats()
        assert stats["compiles"] == 2
        assert stats["recompiles"] == 0
        return stats["artifacts"], misses


if __name__ == "__main__":
    print(*start(Path(sys.argv[1])))
