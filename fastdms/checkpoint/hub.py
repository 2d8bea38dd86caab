"""Model folders from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

__all__ = ["download_folder", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything that loading reads, and no second copy of the weights in another format.
_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "model*.safetensors"]


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def download_folder(hub_id: str) -> Path:
    """The folder with the model's newest files, or with those in the local cache when the hub can't be reached.

    Raises ValueError that says what could not be had and what to do instead.
    """
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES))
    # Beside the hub's own errors, any of its transport's can come through.
    except Exception as error:
        try:
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
        except Exception:
            raise ValueError(_explanation(hub_id, error)) from error


def _explanation(hub_id: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"the hub gives {hub_id} only to accounts that accepted its terms: accept them, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no model {hub_id}, or only for those who log in: check the name, or run `hf auth login`"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{hub_id} could not be fetched from the hub and the local cache has no complete copy ({reason}); "
        "connect once, or give the path of a folder that holds the model"
    )
