"""What a graph depends on: the key of a cache entry, and of the compiler's artifacts on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch

import fastdms.ops
from fastdms.graphs.buffers import StepBuffers

__all__ = ["GraphKey", "MachineKey", "fingerprint", "machine_key", "step_inputs"]

StepInputs = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineKey:
    """Software and device that a graph was made with.

    capability: of a GPU, as in ``"9.0"``; of a CPU, its vector instructions.
    ops_sha256: over the source of ``fastdms.ops``: the compiler's own key sees an op's schema, and nothing behind it.
    """

    device_name: str
    capability: str
    torch: str
    triton: str
    cuda: str
    ops_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """One decode step for one batch size.

    inputs: name, shape and dtype of each static buffer.
    kv_dtype: of the compact cache's pages.
    model: the ``fingerprint`` of all that the step is built from.
    """

    bucket: int
    inputs: StepInputs
    kv_dtype: str
    mode: str
    backend: str
    model: str
    machine: MachineKey


def fingerprint(*parts: object) -> str:
    """sha256 over the ``repr`` of ``parts``, which must say all that matters and no address."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def step_inputs(buffers: StepBuffers) -> StepInputs:
    """The buffers as a key names them."""
    return tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in buffers._asdict().items())


def machine_key(device: torch.device) -> MachineKey:
    """The key of this process and ``device``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        name, capability = device.type, torch.backends.cpu.get_cpu_capability()
    return MachineKey(
        device_name=name,
        capability=capability,
        torch=str(torch.__version__),
        triton=_triton_version(),
        cuda=str(torch.version.cuda),
        ops_sha256=_ops_sha256(),
    )


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _ops_sha256() -> str:
    folder = Path(fastdms.ops.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
