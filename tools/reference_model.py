"""A checkpoint's folder as a transformers model, loaded without its reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_reference"]


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model in ``folder``, in evaluation mode, attending by SDPA. Nothing is fetched.

    Raises ValueError where transformers can't load it or ``device`` has no room.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
            )
        return model.eval().to(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(f"no memory on {device} for the weights in {folder}") from error
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"transformers can't load {folder}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report of an adapter's tensors, which transformers doesn't know."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
