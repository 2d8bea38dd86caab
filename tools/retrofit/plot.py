"""A picture of a training log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdms.tools.quality.heatmap import new_figure

__all__ = ["plot_log"]


def plot_log(path: Path, log: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG: KL divergence above, compression asked for and reached below, over steps.

    Raises ImportError if matplotlib is missing.
    """
    steps = [line["step"] for line in log]
    figure = new_figure((8, 6))
    above, below = figure.subplots(2, 1, sharex=True)
    above.semilogy(steps, [max(line["kl"], 1e-6) for line in log], linewidth=1, color="tab:blue")
    above.set_ylabel("KL from the teacher, nats/token")
    above.set_title(title)
    below.plot(steps, [line["compression_asked"] for line in log], color="tab:gray", label="asked for")
    below.plot(steps, [line["compression"] for line in log], linewidth=1, color="tab:red", label="reached")
    below.set_ylabel("compression")
    below.set_xlabel("step")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
