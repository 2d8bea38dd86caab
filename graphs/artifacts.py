"""What the compiler made, kept on disk, so that the next process with the same keys starts warm.

A file is one line of JSON, which holds the keys and the sha256 of the rest; then follow the bytes that
``torch.compiler.save_cache_artifacts`` gave. Whatever was made for other keys or is damaged is made again, and no
fault of the folder stops a start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.compiler._cache import CacheArtifactManager

from fastdms.graphs.key import GraphKey

__all__ = ["ARTIFACTS", "MAX_FILES", "Artifacts", "artifacts_path"]

ARTIFACTS = Path("~/.cache/fastdms/artifacts")
FORMAT = 1
MAX_FILES = 64  # the oldest go first

# What torch records is one list for the process, swapped while a model compiles.
_recording = threading.Lock()


def artifacts_path(folder: Path, keys: Sequence[GraphKey]) -> Path:
    """The file for ``keys``: any other key has another name."""
    return folder.expanduser() / f"{hashlib.sha256(_describe(keys).encode()).hexdigest()[:32]}.artifacts"


class Artifacts:
    """The artifacts of one graph cache.

    folder: shared by all models and processes; None keeps nothing.
    state: ``"off"``, ``"loaded"`` (nothing had to be compiled), ``"saved"`` (compiled, and kept for the next start) or
        ``"not saved"`` (there was nothing to keep, or it could not be written).
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.state = "off" if folder is None else "not saved"

    @contextmanager
    def around(self, keys: Sequence[GraphKey]) -> Iterator[None]:
        """Compile inside: what is on disk for ``keys`` is loaded before, and what was missing is saved after."""
        if self._folder is None:
            yield
            return
        from torch._dynamo.utils import counters  # not above: it takes seconds, which "eager" does without

        loaded = self._load(keys)
        with _recording, CacheArtifactManager.with_fresh_cache():
            misses = counters["inductor"]["fxgraph_cache_miss"]
            yield
            if loaded and counters["inductor"]["fxgraph_cache_miss"] == misses:
                self.state = "loaded"
            else:
                self._save(keys)

    def _load(self, keys: Sequence[GraphKey]) -> bool:
        assert self._folder is not None
        try:
            payload = _read(artifacts_path(self._folder, keys), keys)
            return torch.compiler.load_cache_artifacts(payload) is not None
        except FileNotFoundError:
            return False
        except Exception as error:  # the payload is unpickled: there is no telling what a bad one raises
            _warn(f"compiling anew, as the artifacts in {self._folder} can't be used: {error}")
            return False

    def _save(self, keys: Sequence[GraphKey]) -> None:
        assert self._folder is not None
        try:
            made = torch.compiler.save_cache_artifacts()
            if made is not None:
                _write(artifacts_path(self._folder, keys), keys, made[0])
                self.state = "saved"
        except Exception as error:  # no home directory, a full disk, or whatever the compiler's own code raises
            _warn(f"the next start will compile again, as artifacts can't be written to {self._folder}: {error}")


def _describe(keys: Sequence[GraphKey]) -> str:
    return repr((FORMAT, *keys))


def _read(path: Path, keys: Sequence[GraphKey]) -> bytes:
    header_line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(header_line)
    if header["keys"] != _describe(keys):
        raise ValueError(f"{path.name} was made for something else")
    if header["sha256"] != hashlib.sha256(payload).hexdigest():
        raise ValueError(f"{path.name} is damaged")
    return payload


def _write(path: Path, keys: Sequence[GraphKey], payload: bytes) -> None:
    """Whole or not at all. Only the holder of the folder's lock may write there, or clear up."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    header = {"keys": _describe(keys), "sha256": hashlib.sha256(payload).hexdigest()}
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in path.parent.glob("*.part"):
            left_over.unlink()
        descriptor, part = tempfile.mkstemp(suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + payload)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(path)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise
        files = sorted(path.parent.glob("*.artifacts"), key=lambda file: file.stat().st_mtime)
        for oldest in files[:-MAX_FILES]:
            oldest.unlink()


def _warn(message: str) -> None:
    print(f"fastdms: {message}", file=sys.stderr)
