"""New checkpoint folders: safetensors and JSON, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["new_folder", "write_json", "write_weights"]

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which becomes ``folder`` at the end, and vanishes where an error is raised inside.

    Raises ValueError for a folder that isn't empty, and when the disk is full or can't be written.
    """
    place = Path(folder).expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; nothing is overwritten")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            new = work / "new"
            new.mkdir()  # with the permissions that any new folder has, unlike work
            yield new
            new.rename(place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"can't write {folder}: {error}") from error


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """One model.safetensors, or shards of at most ``SHARD_BYTES`` (or one tensor) with an index."""
    shards: list[list[str]] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    total_bytes = pending_bytes = 0

    def flush() -> None:
        shard = folder / _part(len(shards))
        shard.touch()
        mode = shard.stat().st_mode  # that any new file has; safetensors lets only its owner read
        save_file(pending, shard, metadata={"format": "pt"})
        shard.chmod(mode)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in weight_map:
            raise ValueError(f"tensor {name} occurs twice")
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            pending_bytes = 0
        weight_map[name] = len(shards)
        pending[name] = _own(tensor)
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not pending:
        raise ValueError("there are no tensors to write")
    flush()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / _part(i)).rename(folder / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[shard] for name, shard in sorted(weight_map.items())},
    }
    write_json(folder / "model.safetensors.index.json", index)


def _part(index: int) -> str:
    return f"part-{index}.safetensors"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and with no other tensor's data in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
