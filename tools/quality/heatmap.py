"""A picture of what is kept: one cell for each layer and KV head."""

from __future__ import annotations

import os
import textwrap
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["new_figure", "save_heatmap"]

_MOST_LABELLED_CELLS = 400


def save_heatmap(path: str | os.PathLike[str], share: npt.ArrayLike, title: str) -> None:
    """Write a PNG of ``share``, float ``[L, Hkv]`` in 0..1: layers across, KV heads downwards.

    The share stands in each cell as a percentage where there are few enough cells to read it.
    Raises ValueError for another shape or range, ImportError without matplotlib.
    """
    values = np.asarray(share, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a heat map needs a share for each layer and KV head, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"a heat map's shares must lie in 0..1, got {values.min()} to {values.max()}")
    layers, heads = values.shape
    width = max(5.0, 1.8 + 0.36 * layers)
    figure = new_figure((width, 1.7 + 0.36 * heads))
    axes = figure.add_subplot()
    image = axes.imshow(values.T, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set(xlabel="layer", ylabel="KV head", yticks=range(heads), xticks=range(0, layers, 1 + layers // 40))
    axes.set_title("\n".join(textwrap.wrap(title, int(11 * width))), fontsize=9)
    figure.colorbar(image, ax=axes, label="share kept")
    if values.size <= _MOST_LABELLED_CELLS:
        _label(axes, values)
    figure.savefig(path, format="png")


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure of that width and height; ImportError that says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'fastdms[plots]'") from error
    return Figure(figsize=inches, dpi=150, layout="constrained")


def _label(axes: Any, values: npt.NDArray[np.float64]) -> None:
    for (layer, head), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 else "white"
        axes.text(layer, head, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=6)
