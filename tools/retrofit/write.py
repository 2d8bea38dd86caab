"""The result of a run, as checkpoints that this loader and other people's read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdms.checkpoint import Checkpoint
from fastdms.checkpoint.adapter_file import write_adapter
from fastdms.checkpoint.json_file import read_json_object
from fastdms.tools.retrofit.base import folder_of
from fastdms.tools.retrofit.export import write_checkpoint
from fastdms.tools.retrofit.run_folder import RunFolder
from fastdms.tools.retrofit.trainer import Trainer

__all__ = ["base_sha256", "write_result"]


def write_result(folder: RunFolder, checkpoint: Checkpoint, trainer: Trainer, training: dict[str, Any]) -> Path:
    """Write ``final/`` in the layout trained for and, for an adapter, ``adapter.safetensors`` beside it.

    training: ``config``, what the run began with, its base's digest included, and what came of it.
    """
    source = folder_of(checkpoint)
    rule = trainer.settings.rule
    if trainer.adapter:
        adapter = {name: p.detach().float().cpu() for name, p in trainer.trained.items()}
        write_adapter(
            folder.path / "adapter.safetensors",
            adapter,
            dms=rule,
            base_sha256=training["config"]["base_sha256"],
            training=training,
        )
    return write_checkpoint(
        folder.checkpoint,
        config_values=read_json_object(source / "config.json"),
        tensors=_tensors(checkpoint, trainer),
        dms=rule,
        layout=trainer.settings.layout,
        tokenizer_path=source,
        training=training,
    )


def _tensors(checkpoint: Checkpoint, trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors as stored, with those that were trained in their place or added."""
    trained: dict[str, torch.Tensor] = dict(trainer.trained)
    if trainer.tied and "model.embed_tokens.weight" in trained:
        # Some checkpoints store the head although it is the embedding.
        trained["lm_head.weight"] = trained["model.embed_tokens.weight"].clone()
    for name, tensor in checkpoint.tensors():
        new = trained.pop(name, None)
        yield name, tensor if new is None else new.detach().to("cpu", tensor.dtype)
    if trainer.tied:
        trained.pop("lm_head.weight", None)
    for name, parameter in trained.items():
        yield name, parameter.detach().float().cpu()


def base_sha256(source: Path) -> str:
    """Which base an adapter belongs to: the file that the default model was made from, else a digest of the weights."""
    marker = source / "fastdms.json"
    if marker.is_file():
        made_from = read_json_object(marker).get("source_sha256")
        if isinstance(made_from, str):
            return made_from
    digest = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
