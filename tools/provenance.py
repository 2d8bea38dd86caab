"""Where, with what and by which command something was measured."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdms
from fastdms.options import resolve_device

__all__ = ["commit", "provenance"]


def provenance(device: str | None, command: str) -> dict[str, Any]:
    """Fields for every row. ``device``: as ``fastdms.compile`` takes it; what can't be found out is None."""
    place = resolve_device(device)
    return {
        "card": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "driver": _driver(place) if place.type == "cuda" else None,
        "fastdms": fastdms.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(Path(fastdms.__file__).resolve().parents[1]),
        "command": command,
    }


def commit(root: Path) -> str | None:
    """The checkout's commit, with ``+dirty`` when files differ from it.

    None outside a checkout: an installed package may lie in some other project's repository.
    """
    if not (root / ".git").exists():
        return None
    head, changes = (
        _output("git", "-C", str(root), "rev-parse", "HEAD"),
        _output("git", "-C", str(root), "status", "--porcelain"),
    )
    if head is None:
        return None
    return head + ("" if changes == "" else "+dirty")


def _driver(place: torch.device) -> str | None:
    uuid = f"GPU-{torch.cuda.get_device_properties(place).uuid}"
    return _output("nvidia-smi", "-i", uuid, "--query-gpu=driver_version", "--format=csv,noheader")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
