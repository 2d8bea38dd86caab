"""The header of one GGUF file: its metadata, and where each tensor's bytes lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["GGUFArray", "GGUFHeader", "GGUFTensor", "Scalar", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """Stands for an array in the metadata, which no part of a model's description is."""

    length: int


Scalar: TypeAlias = int | float | str | GGUFArray


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor list. shape: slowest axis first, as in torch. start: byte offset in the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type_number: int
    start: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """One file's header. data: the whole file as bytes, mapped read-only."""

    metadata: dict[str, Scalar]
    tensors: tuple[GGUFTensor, ...]
    data: npt.NDArray[np.uint8]


def read_header(path: Path) -> GGUFHeader:
    """Reads the header of a little-endian GGUF file of version 2 or 3.

    Raises ValueError, with the file's name, for anything else, for a file that ends early, and for names that repeat.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    cursor = _Cursor(path, np.asarray(data))
    if cursor.take(4) != _MAGIC:
        raise ValueError(f"{path} is no GGUF file")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"{path}: GGUF version {version} is not supported; supported are little-endian 2 and 3")
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Scalar] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{path}: metadata key {key} repeats")
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = {}
    for _ in range(num_tensors):
        name, shape, type_number, offset = cursor.tensor_entry()
        if name in entries:
            raise ValueError(f"{path}: tensor {name} repeats")
        entries[name] = (shape, type_number, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment must be a positive integer, got {alignment!r}")
    base = -(-cursor.position // alignment) * alignment
    tensors = tuple(
        GGUFTensor(path, name, shape, type_number, base + offset)
        for name, (shape, type_number, offset) in entries.items()
    )
    return GGUFHeader(metadata, tensors, np.asarray(data))


class _Cursor:
    """Reads forward through a file's bytes; whatever would go past the end is a ValueError."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self._path = path
        self._bytes = data.data
        self.position = 0

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._bytes) - self.position:
            raise ValueError(f"{self._path} is truncated or damaged: its header goes past its end")
        self.position += num_bytes
        return self._bytes[self.position - num_bytes : self.position]

    def scalar(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def string(self) -> str:
        try:
            return bytes(self.take(self.scalar("Q"))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: text in the header is not UTF-8: {error}") from error

    def value(self, kind: int) -> Scalar:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{self._path}: metadata type {kind} is unknown")
        item_kind, length = self.scalar("I"), self.scalar("Q")
        if item_kind in _SCALARS:
            self.take(length * struct.calcsize("<" + _SCALARS[item_kind]))
        elif item_kind == _STRING:
            # Token texts need not be UTF-8, and nobody reads them here.
            for _ in range(length):
                self.take(self.scalar("Q"))
        else:
            raise ValueError(f"{self._path}: metadata arrays of type {item_kind} are not supported")
        return GGUFArray(length)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dims = self.scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"{self._path}: tensor {name} has {num_dims} dimensions; allowed are 1 to {_MAX_DIMS}")
        shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
        if prod(shape) == 0:
            raise ValueError(f"{self._path}: tensor {name} has an empty shape {shape}")
        return name, shape, self.scalar("I"), self.scalar("Q")
