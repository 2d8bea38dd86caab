"""A small run of each op under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["SANITIZERS", "sanitize"]

SANITIZERS = ("memcheck", "racecheck", "initcheck")
_FAILED = 66  # what compute-sanitizer exits with if it found something


def sanitize(ops: Sequence[str], *, cases: int, seed: int) -> list[str]:
    """Run ``cases`` of each op under each tool; returns ``op: tool`` of those that failed, having printed their output.

    Raises ValueError where compute-sanitizer is not on PATH.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise ValueError("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else tensors share one large allocation
    failed = []
    for op in ops:
        for tool in SANITIZERS:
            fuzz = [sys.executable, "-m", "fastdms.tools.fuzz", "--device", "cuda", "--ops", op]
            command = [program, "--tool", tool, "--error-exitcode", str(_FAILED), *fuzz]
            command += ["--cases", str(cases), "--seed", str(seed)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(f"{op:<18} {tool:<10} {'clean' if done.returncode == 0 else 'FAILED'}", flush=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                failed.append(f"{op}: {tool}")
    return failed
