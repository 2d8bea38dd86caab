"""A model in a GGUF file, in one part or several, dequantised tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastdms.checkpoint.gguf_config import ROPE_FACTORS, parse_gguf_config, transformers_name
from fastdms.checkpoint.gguf_header import GGUFHeader, GGUFTensor, read_header
from fastdms.config import ModelConfig

__all__ = ["GGUFFile"]

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class _Blocks:
    """One tensor's bytes, as rows of whole blocks, and how to read them."""

    tensor: GGUFTensor
    kind: Any
    rows: npt.NDArray[np.uint8]


class GGUFFile:
    """The model in a GGUF file and, of a split one, its other parts (any of them may be named).

    config: the model; ``weight_dtype`` is float32 or float16 where all matrices are stored so, bfloat16 otherwise.
    first_part: the file that holds the metadata and the tokenizer.

    Raises ValueError, with file and tensor, for a missing or truncated part, a block type that can't be read and
    whatever ``parse_gguf_config`` refuses; ImportError without the ``gguf`` package.
    """

    def __init__(self, path: Path) -> None:
        gguf = _gguf()
        self.first_part, headers = _read_parts(path)
        self._blocks = _all_blocks(headers, gguf)
        factors = self._blocks.pop(ROPE_FACTORS, None)
        try:
            self.config: ModelConfig = parse_gguf_config(
                headers[0].metadata,
                {name: blocks.tensor.shape for name, blocks in self._blocks.items()},
                () if factors is None else tuple(_dequantise(factors, gguf).flatten().tolist()),
                _weight_dtype([blocks for blocks in self._blocks.values() if len(blocks.tensor.shape) > 1]),
            )
        except ValueError as error:
            raise ValueError(f"{self.first_part}: {error}") from error
        self._names = {name: transformers_name(blocks.tensor, self.config) for name, blocks in self._blocks.items()}
        for blocks in self._blocks.values():
            _interleaved_heads(blocks.tensor, self.config)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor in turn under its transformers name, float32, rows of q and k in transformers' order."""
        gguf = _gguf()
        for name, blocks in self._blocks.items():
            values = _dequantise(blocks, gguf)
            heads = _interleaved_heads(blocks.tensor, self.config)
            yield self._names[name], torch.from_numpy(_split_halves(values, heads) if heads else values)


def _gguf() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError('reading GGUF files needs the gguf package: pip install "fastdms[gguf]"') from error
    module: ModuleType = gguf
    return module


def _read_parts(path: Path) -> tuple[Path, list[GGUFHeader]]:
    """The first part's path, and the headers of all parts in order."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return path, [header]
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(f"{path} is one of {count!r} parts and must be named like NAME-00001-of-00002.gguf")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]
    headers = []
    for number, part in enumerate(paths):
        if not part.is_file():
            raise ValueError(f"{part} is missing: {path.name} is one of {count} parts")
        headers.append(read_header(part))
        found = headers[-1].metadata.get("split.no"), headers[-1].metadata.get("split.count")
        if found != (number, count):
            raise ValueError(f"{part} must be part {number} of {count}, but calls itself part {found[0]} of {found[1]}")
    declared, present = headers[0].metadata.get("split.tensors.count"), sum(len(part.tensors) for part in headers)
    if declared is not None and declared != present:
        raise ValueError(f"{paths[0]}: the parts hold {present} tensors, but split.tensors.count is {declared!r}")
    return paths[0], headers


def _all_blocks(headers: list[GGUFHeader], gguf: ModuleType) -> dict[str, _Blocks]:
    found: dict[str, _Blocks] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in found:
                raise ValueError(f"{tensor.path}: tensor {tensor.name} is in an earlier part too")
            found[tensor.name] = _blocks(tensor, header.data, gguf)
    return found


def _blocks(tensor: GGUFTensor, data: npt.NDArray[np.uint8], gguf: ModuleType) -> _Blocks:
    where = f"{tensor.path}: tensor {tensor.name}"
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    label = f"{names.get(tensor.type_number, 'unknown')} ({tensor.type_number})"
    try:
        kind = gguf.GGMLQuantizationType(tensor.type_number)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        # Not every type that has a name and a size can be decoded.
        gguf.quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{where} has block type {label}, which can't be read") from error
    if tensor.shape[-1] % block_size:
        raise ValueError(f"{where} has rows of {tensor.shape[-1]}, no multiple of {kind.name}'s block of {block_size}")
    row_bytes = tensor.shape[-1] // block_size * block_bytes
    num_rows = math.prod(tensor.shape[:-1])
    if tensor.start + num_rows * row_bytes > len(data):
        raise ValueError(f"{where} goes past the end of the file, which is truncated or damaged")
    rows = data[tensor.start : tensor.start + num_rows * row_bytes].reshape(num_rows, row_bytes)
    return _Blocks(tensor, kind, rows)


def _dequantise(blocks: _Blocks, gguf: ModuleType) -> npt.NDArray[np.float32]:
    values = gguf.quants.dequantize(blocks.rows, blocks.kind).reshape(blocks.tensor.shape)
    # float32 comes back as a view of the read-only file, which torch wouldn't take.
    return np.array(values, dtype=np.float32, copy=None if values.flags.writeable else True)


def _weight_dtype(matrices: list[_Blocks]) -> torch.dtype:
    kinds = {blocks.kind.name for blocks in matrices}
    if kinds <= {"F32"}:
        return torch.float32
    return torch.float16 if kinds <= {"F32", "F16"} else torch.bfloat16


def _interleaved_heads(tensor: GGUFTensor, config: ModelConfig) -> int:
    """Heads of a q or k projection whose rotation pairs are neighbouring rows (only llama's are); 0 for the others."""
    if config.family != "llama":
        return 0
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", tensor.name)
    if match is None:
        return 0
    heads = config.num_heads if match[1] == "q" else config.num_kv_heads
    if tensor.shape[0] != heads * config.head_dim:
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name} has {tensor.shape[0]} rows, but the model has {heads} heads of "
            f"{config.head_dim}"
        )
    return heads


def _split_halves(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows (head, pair, member) to (head, member, pair): in transformers' order a pair lies half a head apart."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
