"""A transformers model in memory as a source of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["ModelObject"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class ModelObject:
    """The parameters of a causal language model, one at a time and without copying those that lie on the CPU.

    An output head that shares its memory with the embedding is left out, as in a saved folder.

    Raises ValueError for a model without token embedding, with tensors on the meta device, or of an unsupported dtype.
    """

    def __init__(self, model: Any) -> None:
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        name = type(model).__name__
        embedding = self._state.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{name} is not a causal language model: it has no tensor model.embed_tokens.weight")
        head = self._state.get("lm_head.weight")
        if head is not None and not head.is_meta and head.data_ptr() == embedding.data_ptr():
            del self._state["lm_head.weight"]
        for key, tensor in self._state.items():
            if tensor.is_meta:
                raise ValueError(f"{name}: tensor {key} is on the meta device and has no data")
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name}: tensor {key} is {tensor.dtype}; supported are float32, float16, bfloat16")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype of every tensor that ``tensors`` yields."""
        return {name: tensor.dtype for name, tensor in self._state.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor in turn, on the CPU."""
        for name, tensor in self._state.items():
            yield name, tensor.detach().cpu()


def origin_folder(model: Any) -> Path | None:
    """The local folder that the model was loaded from, if it was."""
    name = getattr(model, "name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


def tokenizer_folder(model: Any) -> Path | None:
    """The folder that the model was loaded from, if it has a tokenizer."""
    folder = origin_folder(model)
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return folder
