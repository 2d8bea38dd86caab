"""The tensors in a folder of safetensors: one file, or shards with an index that says which tensor lies where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastdms.checkpoint.json_file import read_json_object

__all__ = ["SafetensorsFolder"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INT4_DTYPES = {"weight_packed": {"I32": torch.int32}, "weight_shape": {"I64": torch.int64, "I32": torch.int32}}


class SafetensorsFolder:
    """Which tensors a checkpoint folder holds; their data is only read by ``tensors``.

    Where there is an index, it alone decides: files that it doesn't name and tensors that it assigns to another file
    are left unread. Old rotary buffers (``rotary_emb.inv_freq``) are left out.

    Raises ValueError, with the file's name, for a missing or truncated file, a tensor that isn't in the file the index
    gives, and a dtype other than F32, F16 and BF16 (I32 and I64 in the tensors of int4 layers).
    """

    def __init__(self, folder: Path) -> None:
        self._files = {path: _header(path, names) for path, names in _assignment(folder).items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype as stored, of every tensor that ``tensors`` yields."""
        return {name: dtype for header in self._files.values() for name, dtype in header.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor in turn, on the CPU and backed by its file; one file is open at a time."""
        for path, header in self._files.items():
            with _open(path) as file:
                for name in header:
                    try:
                        tensor = file.get_tensor(name)
                    except (SafetensorError, OSError) as error:
                        raise ValueError(f"{path}: tensor {name} can't be read: {error}") from error
                    yield name, tensor


def _assignment(folder: Path) -> dict[Path, list[str] | None]:
    """File -> the tensors to read from it; None stands for all."""
    index_path, single_path = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index_path.exists():
        if single_path.exists():
            return {single_path: None}
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; convert {others[0]} to safetensors first" if others else ""
        raise ValueError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: weight_map must be a non-empty object")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard == ".." or Path(shard).name != shard:
            raise ValueError(f"{index_path}: {name} must be assigned to a file of this folder, got {shard!r}")
        shards.setdefault(shard, []).append(name)
    return {folder / shard: names for shard, names in shards.items()}


def _header(path: Path, names: list[str] | None) -> dict[str, torch.dtype]:
    """The dtypes of the tensors to read from one file."""
    dtypes: dict[str, torch.dtype] = {}
    with _open(path) as file:
        present = list(file.keys())
        absent = sorted(set(names or ()) - set(present))
        if absent:
            raise ValueError(f"{path}: tensor {absent[0]}, which {INDEX_NAME} assigns to this file, isn't in it")
        for name in present if names is None else names:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            dtype = file.get_slice(name).get_dtype()
            supported = _INT4_DTYPES.get(name.rpartition(".")[2], _DTYPES)
            if dtype not in supported:
                raise ValueError(f"{path}: tensor {name} is {dtype}; supported are {', '.join(supported)}")
            dtypes[name] = supported[dtype]
    return dtypes


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
