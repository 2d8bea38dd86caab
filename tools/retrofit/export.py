"""Checkpoint folders in the public DMS layouts, which other runtimes read too.

What each layout is told by (``fastdms.checkpoint.dms`` reads it back):

========  =====================================================================================================
adapter   ``dms_separate_alpha`` in config.json, and the ``dms_proj_alpha`` tensors
nvidia    the ``dms_`` keys of config.json; for another family than Qwen3 also dms_metadata.json, as below
shisa     dms_metadata.json, and the ``dms_`` keys of config.json
========  =====================================================================================================

The published NVIDIA and Model-Optimizer folders also have an ``auto_map`` in config.json, which names Python files
that lie beside it. Those files aren't ours to ship, and an ``auto_map`` without them breaks
``from_pretrained(..., trust_remote_code=True)``; so none is written. Their model classes, made for models without
attention biases, find the keys they ask for; without them transformers reads the plain model. Where the keys of
config.json alone don't say which rule was trained, dms_metadata.json says it in full, with ``shift`` and
``zero_borrowed``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.dms import LAYOUTS, Layout
from fastdms.checkpoint.dms_keys import config_keys, whole_if_integral
from fastdms.config import DMSConfig
from fastdms.tools.checkpoint_folder import new_folder, write_json, write_weights

__all__ = ["write_checkpoint"]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template*", "generation_config.json"),
)


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config_values: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dms: DMSConfig,
    layout: Layout,
    tokenizer_path: Path | None,
    training: Mapping[str, Any],
) -> Path:
    """Write a model with the rule ``dms`` as a checkpoint folder, which appears only once it is whole.

    config_values: the base's configuration, as in its config.json. tensors: all weights by their transformers names,
    those of an adapter included; taken one by one, so that no more than one file of weights is in memory.
    layout: whose form the folder has. tokenizer_path: a folder to copy tokenizer, chat template and generation
    settings from. training: what training.json says about how the weights came to be; any JSON object.

    Returns ``folder``. Raises ValueError for a folder that isn't empty, for a rule that the layout can't declare, for
    tensors that make no checkpoint, and, with nothing left behind, when the disk is full or can't be written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be adapter, nvidia or shisa, got {layout!r}")
    if (layout == "adapter") != (dms.source == "adapter"):
        raise ValueError(f"the layout {layout} can't declare a rule with source {dms.source!r}")
    if tokenizer_path is not None and not tokenizer_path.is_dir():
        raise ValueError(f"tokenizer_path must be a folder, got {tokenizer_path}")
    with new_folder(folder) as new:
        write_json(new / "config.json", _config(config_values, dms))
        metadata = _metadata(config_values, dms, layout)
        if metadata is not None:
            write_json(new / "dms_metadata.json", metadata)
        write_json(new / "training.json", training)
        _copy_tokenizer(tokenizer_path, new)
        write_weights(new, tensors)
        declared = open_checkpoint(new).dms
        if declared != dms:
            raise ValueError(f"the layout {layout} can't declare {dms}: it would be read as {declared}")
    return Path(folder)


def _config(base: Mapping[str, Any], dms: DMSConfig) -> dict[str, Any]:
    """The base's configuration with the rule's keys, and without what tells of other code or of another rule."""
    values = {key: value for key, value in base.items() if key != "auto_map" and not key.startswith("dms_")}
    return values | config_keys(dms)


def _metadata(base: Mapping[str, Any], dms: DMSConfig, layout: Layout) -> dict[str, Any] | None:
    """What dms_metadata.json has to say; None where config.json and tensors say it all."""
    plain = (dms.shift, dms.zero_borrowed) == (LAYOUTS[layout].shift, LAYOUTS[layout].zero_borrowed)
    if plain and (layout == "adapter" or (layout == "nvidia" and base.get("model_type") == "qwen3")):
        return None
    values: dict[str, Any] = {
        "window_size": dms.window_tokens,
        "alpha_scale": float(dms.alpha_scale),
        "alpha_offset": float(dms.alpha_offset),
        "target_cr": None if dms.target_compression is None else whole_if_integral(dms.target_compression),
        "context_len": base.get("max_position_embeddings"),
        "compression_mode": "uniform",
    }
    if not plain or layout == "nvidia":
        values |= {"shift": dms.shift, "zero_borrowed": dms.zero_borrowed}
    return values


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES if source is not None else ():
        assert source is not None
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
