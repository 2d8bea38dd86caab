"""Progress bars for what takes long: on stderr, and only for somebody who watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["progress"]


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    show: bool | None = None,
) -> Any:
    """A tqdm bar around ``iterable``, or, without one, a bar for ``with`` and ``update`` up to ``total``.

    show: None shows it where stderr is a terminal. It appears after half a second and is wiped when done.
    """
    from tqdm import tqdm

    stream = sys.stderr
    shown = (stream is not None and stream.isatty()) if show is None else show
    return tqdm(
        iterable, desc=desc, total=total, unit=unit, disable=not shown, leave=False, delay=0.5, file=stream,
        dynamic_ncols=True,
    )  # fmt: skip
