"""What the checkpoint tests share: editing JSON files, comparing tensors, damaging bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdms.checkpoint import Checkpoint


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Set and remove keys of the object in a JSON file, which may be new."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values.update(changes)
    for key in remove:
        del values[key]
    path.write_text(json.dumps(values))


def assert_same_tensors(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint yields exactly these names, once each, with the same dtype and bits."""
    names = [name for name, _ in checkpoint.tensors()]
    assert sorted(names) == sorted(expected)
    for name, tensor in checkpoint.tensors():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def flip_byte(path: Path, position: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
