"""``python -m fastdms.tools.fuzz`` is ``fastdms fuzz``."""

from __future__ import annotations

import sys

from fastdms.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main(["fuzz", *sys.argv[1:]]))
