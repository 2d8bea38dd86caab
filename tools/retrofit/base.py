"""The base of a retrofit: which checkpoints can be trained, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdms.bundled_model import default_model
from fastdms.checkpoint import Checkpoint, open_checkpoint
from fastdms.checkpoint.json_file import read_json_object
from fastdms.tools.reference_model import load_reference
from fastdms.tools.retrofit.settings import RetrofitSettings

__all__ = ["folder_of", "load_base", "open_base"]

_MOST_HEAD_DIM = 256


def open_base(given: str | None, settings: RetrofitSettings) -> Checkpoint:
    """Look at a base before its weights are read. given: a folder or hub id; None: the base of the default model.

    Raises ValueError for a checkpoint that has DMS already, in use or not, is in no folder, has int4 weights,
    or can't be trained so.
    """
    model = str(default_model(adapter=False)) if given is None else given
    checkpoint = open_checkpoint(model)
    if checkpoint.dms is not None:
        raise ValueError(f"{model} already has DMS (window {checkpoint.dms.window_tokens}); give its base model")
    if checkpoint.tokenizer_path is None or not checkpoint.tokenizer_path.is_dir():
        raise ValueError(f"{model} is no folder of safetensors or hub id, which training needs")
    if checkpoint.config.int4 is not None:
        raise ValueError(f"{model} has int4 weights, which training can't read; give the model that they were made of")
    folder = folder_of(checkpoint)
    declared = [key for key in read_json_object(folder / "config.json") if key.startswith("dms_")]
    if declared or (folder / "dms_metadata.json").exists():
        raise ValueError(f"{model} already has DMS, which it declares not to use; give its base model")
    config = checkpoint.config
    if settings.context > config.max_position_embeddings:
        raise ValueError(
            f"context {settings.context:,} exceeds the {config.max_position_embeddings:,} positions of {model}"
        )
    if config.head_dim > _MOST_HEAD_DIM:
        raise ValueError(f"{model} has heads of {config.head_dim} channels; training supports {_MOST_HEAD_DIM} at most")
    return checkpoint


def folder_of(checkpoint: Checkpoint) -> Path:
    """Where the base's files lie."""
    assert checkpoint.tokenizer_path is not None
    return checkpoint.tokenizer_path


def load_base(checkpoint: Checkpoint, settings: RetrofitSettings, device: torch.device) -> Any:
    """The transformers model, on ``device``. Raises ValueError where it can't be loaded or has no room."""
    dtype = torch.float32  # weights that are trained need fp32 masters
    if settings.layout == "adapter" and device.type == "cuda" and checkpoint.config.weight_dtype != torch.float32:
        dtype = torch.bfloat16  # also for fp16, in which gradients would need scaling
    return load_reference(folder_of(checkpoint), dtype, device)
