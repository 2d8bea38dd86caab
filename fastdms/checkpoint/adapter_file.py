"""A DMS adapter alone: one safetensors file, to be merged into the checkpoint that it was trained for.

Tensors, all float32, for each layer N of the model:
    model.layers.N.self_attn.dms_proj_alpha.weight       [Hkv, hidden]
    model.layers.N.self_attn.dms_proj_alpha_norm.weight  [hidden]
The file's metadata are strings: ``format`` (``"fastdms-adapter"``), ``dms`` (the fields of a DMSConfig as JSON),
``base_sha256`` (which base it belongs to) and ``training`` (how it was trained, as JSON).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdms.config import DMSConfig

__all__ = ["Adapter", "read_adapter", "write_adapter"]

FORMAT = "fastdms-adapter"
_METADATA = ("format", "dms", "base_sha256", "training")
_NAME = "model.layers.{}.self_attn.dms_proj_alpha{}.weight"
_PATTERN = re.compile(r"model\.layers\.\d+\.self_attn\.dms_proj_alpha(_norm)?\.weight")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter file holds.

    dms: the rule it was trained for. tensors: by their published names, fp32 on the CPU. base_sha256: 64 hexadecimal
    digits that name the base's weights. training: how it was trained, any JSON object.

    Raises ValueError for a rule that isn't an adapter's, and for tensors that are not two of the right shape and dtype
    for each of some layers 0 to L - 1.
    """

    dms: DMSConfig
    tensors: dict[str, torch.Tensor] = field(repr=False)
    base_sha256: str
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        if (self.dms.source, self.dms.shift, self.dms.prefill) != ("adapter", 1, "masked"):
            raise ValueError(f"an adapter's rule has source 'adapter', shift 1 and masked prefill, got {self.dms}")
        if not isinstance(self.base_sha256, str) or not _SHA256.fullmatch(self.base_sha256):
            raise ValueError(f"base_sha256 must be 64 hexadecimal digits, got {self.base_sha256!r}")
        if not isinstance(self.training, Mapping):
            raise ValueError(f"training must be an object, got {type(self.training).__name__}")
        _check_tensors(self.tensors)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.tensors) // 2

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each layer."""
        return self.tensors[_NAME.format(0, "")].shape[0]


def write_adapter(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    dms: DMSConfig,
    base_sha256: str,
    training: Mapping[str, Any],
) -> Path:
    """Write an adapter, its tensors as float32, in the place of any file at ``path``, which is only replaced once the
    new one is whole.

    Raises ValueError as ``Adapter`` does, and when the file can't be written.
    """
    whole = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    adapter = Adapter(dms=dms, tensors=whole, base_sha256=base_sha256, training=training)
    metadata = {
        "format": FORMAT,
        "dms": json.dumps(asdict(adapter.dms)),
        "base_sha256": base_sha256,
        "training": json.dumps(dict(training)),
    }
    path = Path(path)
    new = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        save_file(whole, new, metadata=metadata)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"can't write {path}: {error}") from error
    finally:
        new.unlink(missing_ok=True)
    return path


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a whole adapter file. Raises ValueError, naming the file, for one that is missing, damaged or another's."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Copied: the file may be replaced while the tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    missing = [key for key in _METADATA if key not in metadata]
    if missing or metadata["format"] != FORMAT:
        raise ValueError(f"{path} is no DMS adapter: its metadata must have {', '.join(_METADATA)}, format {FORMAT!r}")
    try:
        rule, training = _json_object(metadata, "dms"), _json_object(metadata, "training")
        return Adapter(dms=DMSConfig(**rule), tensors=tensors, base_sha256=metadata["base_sha256"], training=training)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata {key!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"metadata {key!r} must be a JSON object, got {type(value).__name__}")
    return value


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    first = tensors.get(_NAME.format(0, ""))
    if first is None or first.dim() != 2:
        raise ValueError(f"an adapter needs a tensor {_NAME.format(0, '')} [Hkv, hidden]")
    shapes = {"": tuple(first.shape), "_norm": (first.shape[1],)}
    num_layers = -(-len(tensors) // 2)
    expected = {_NAME.format(n, suffix): shape for n in range(num_layers) for suffix, shape in shapes.items()}
    for name in tensors:
        if not _PATTERN.fullmatch(name):
            raise ValueError(f"tensor {name} is not one of an adapter")
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"tensor {name} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not torch.float32 {shape}")
