"""Model weights and their description, from a folder, a hub id, a GGUF file or a transformers model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from fastdms.checkpoint.dms import read_dms
from fastdms.checkpoint.gguf_file import GGUFFile
from fastdms.checkpoint.hf_config import FAMILIES, parse_config
from fastdms.checkpoint.hub import download_folder, is_hub_id
from fastdms.checkpoint.int4_config import int4_layers, read_group
from fastdms.checkpoint.json_file import read_json_object
from fastdms.checkpoint.model_object import ModelObject, origin_folder, tokenizer_folder
from fastdms.checkpoint.safetensors_folder import SafetensorsFolder
from fastdms.config import DMSConfig, ModelConfig

__all__ = ["Checkpoint", "open_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that is described but not yet read.

    name: what the user wrote, for messages. dms: as the checkpoint declares it, None when it has no (active) eviction.
    tokenizer_path: a folder or a .gguf file; None for a model object that wasn't loaded from a folder with a tokenizer.
    """

    name: str
    config: ModelConfig
    dms: DMSConfig | None
    tokenizer_path: Path | None
    source: Callable[[], Iterator[tuple[str, torch.Tensor]]] = field(repr=False, compare=False)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight in turn under its transformers name, on the CPU and in transformers' row order.

        Exactly the tensors that the checkpoint assigns to the model, those of a DMS adapter included; float32 from a
        GGUF file, as stored otherwise: a layer of ``config.int4`` is three tensors. A tied output head is left out.
        Each call starts anew.
        """
        return self.source()


def open_checkpoint(
    model: str | os.PathLike[str] | transformers.PreTrainedModel, *, read_metadata: bool = True
) -> Checkpoint:
    """Reads a model's description and checks that its files are whole; weights are read by ``Checkpoint.tensors``.

    model: a folder with config.json and safetensors, a .gguf file (any part of a split one), a hub id ``owner/name``,
        or a transformers model in memory.
    read_metadata: False leaves DMS metadata unread, and ``Checkpoint.dms`` None.

    Raises ValueError that names the file and what is wrong with it, or what isn't supported, and ImportError for a GGUF
    file without the ``gguf`` package.
    """
    if not isinstance(model, str | os.PathLike):
        if isinstance(model, transformers.PreTrainedModel):
            return _from_object(model, read_metadata)
        raise ValueError(f"model must be a path, a hub id or a transformers model, got {type(model).__name__}")
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_dir() and name:
        return _from_folder(name, path, read_metadata)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is neither a folder nor a .gguf file; give the folder that holds the model")
        return _from_gguf(name, path)
    if path.suffix == ".gguf" or not is_hub_id(name):
        raise ValueError(f"{name!r} is no existing folder or .gguf file, and no hub id of the form owner/name")
    return _from_folder(name, download_folder(name), read_metadata)


def _from_folder(name: str, folder: Path, read_metadata: bool) -> Checkpoint:
    config_path, generation_path = folder / "config.json", folder / "generation_config.json"
    if not config_path.exists():
        raise ValueError(f"{config_path} is missing")
    values = read_json_object(config_path)
    generation = read_json_object(generation_path) if generation_path.exists() else {}
    # An unsupported model should be refused as such before its weights are looked at.
    try:
        group = read_group(values)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    described = values if group is None else {key: values[key] for key in values if key != "quantization_config"}
    config = parse_config(described, generation, str(config_path), torch.float32)
    weights = SafetensorsFolder(folder)
    config = _as_stored(config, weights.dtypes)
    if group is not None:
        config = replace(config, int4=int4_layers(group, weights.dtypes))
    dms = read_dms(values, str(config_path), folder, weights.dtypes, config) if read_metadata else None
    return Checkpoint(name=name, config=config, dms=dms, tokenizer_path=folder, source=weights.tensors)


def _from_object(model: Any, read_metadata: bool) -> Checkpoint:
    name = model.name_or_path or type(model).__name__
    where = f"the configuration of {type(model).__name__}"
    bases = [base.__name__ for base in type(model).__mro__]
    # A fresh configuration names no class; the object's own is what counts.
    architecture = next((name for name in FAMILIES.values() if name in bases), type(model).__name__)
    values = {**model.config.to_dict(), "architectures": [architecture]}
    generation = model.generation_config.to_dict() if getattr(model, "generation_config", None) else {}
    config = parse_config(values, generation, where, torch.float32)
    weights = ModelObject(model)
    config = _as_stored(config, weights.dtypes)
    dms = read_dms(values, where, origin_folder(model), weights.dtypes, config) if read_metadata else None
    return Checkpoint(name=name, config=config, dms=dms, tokenizer_path=tokenizer_folder(model), source=weights.tensors)


def _from_gguf(name: str, path: Path) -> Checkpoint:
    file = GGUFFile(path)
    return Checkpoint(name=name, config=file.config, dms=None, tokenizer_path=file.first_part, source=file.tensors)


def _as_stored(config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> ModelConfig:
    """What the tensors say overrides the configuration: their dtype, and an output head of its own if there is one."""
    has_head = "lm_head.weight" in dtypes or "lm_head.weight_packed" in dtypes
    return replace(
        config,
        weight_dtype=dtypes.get("model.embed_tokens.weight", config.weight_dtype),
        tie_word_embeddings=config.tie_word_embeddings and not has_head,
    )
