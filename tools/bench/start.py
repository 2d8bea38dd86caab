"""Seconds to a ready model: in a fresh process with empty compiler caches, and in another one that finds them full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastdms.tools.bench.figures import dtype_name, spread
from fastdms.tools.bench.settings import EngineSettings

__all__ = ["child", "last_words", "measure_starts"]

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # what torch and Triton read
_PROMPT_TOKENS = 16
_CHILD = "from fastdms.tools.bench.start import child; child()"


def measure_starts(settings: EngineSettings) -> Iterator[dict[str, Any]]:
    """For each kept share a cold row, then a warm one; ``repeats`` processes stand behind each, one after the other."""
    from fastdms.tools.bench.engine import kept_shares

    for kept in kept_shares(settings):
        asked = replace(settings, kept=None if settings.model is not None or settings.dms == "off" else (kept or 1.0,))
        with ExitStack() as stack:
            folder = tempfile.TemporaryDirectory
            caches = [Path(stack.enter_context(folder(prefix="fastdms-bench-"))) for _ in range(settings.repeats)]
            for state in ("cold", "warm"):
                found = [_start(asked, each) for each in caches]
                yield {
                    "state": state,
                    **found[-1],
                    "repeats": settings.repeats,
                    **{f"{name}_spread": spread([one[name] for one in found], 3) for name in ("ready_s", "process_s")},
                }


def child() -> None:
    """In the new process: settings and the caches' folder as JSON from stdin; prints one JSON object as last line."""
    given = json.load(sys.stdin)
    caches = Path(given.pop("caches"))
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    settings = EngineSettings(**fields)
    from fastdms import runner
    from fastdms.tools.bench.engine import kept_shares, open_subject

    vars(runner)["ARTIFACTS"] = caches / "artifacts"  # a cold start must not find those of the user's other models
    subject = open_subject(settings, kept_shares(settings)[0])
    with subject.model as model:
        ready = time.perf_counter()
        model([1] * min(_PROMPT_TOKENS, *settings.contexts), max_tokens=2, temperature=0.0, ignore_eos=True)
        served = time.perf_counter()
        stats = model.graphs.stats()
        row = {
            "model": subject.name,
            "kept_asked": subject.kept,
            "rows": max(settings.concurrency),
            "mode": model.options.mode,
            "weights": settings.weights,
            "kv_dtype": dtype_name(model.options.kv_dtype),
            "buckets": list(stats["buckets"]),
            "compiles": stats["compiles"],
            "captures": stats["captures"],
            "artifacts": stats["artifacts"],
            "ready_s": round(subject.start_s, 3),
            **_parts(subject.start_s, stats),
            "first_answer_s": round(served - ready, 3),
        }
    print(json.dumps(row), flush=True)


def _parts(ready_s: float, stats: Mapping[str, Any]) -> dict[str, float]:
    """What ``ready_s`` was spent on. weights_s: weights, cache and all that is no graph; warm_up_s: the first runs of
    decode steps, in which Triton compiles its kernels or loads them."""
    steps_s = sum(stats["seconds"].values())
    chunks_s = stats["chunks"]["seconds"] if stats["chunks"] else 0.0
    known = {name: stats[f"{name}_seconds"] for name in ("trace", "compile", "capture")}
    parts = {"weights": ready_s - steps_s - chunks_s, **known, "warm_up": steps_s - sum(known.values())}
    return {f"{name}_s": round(seconds, 3) for name, seconds in (parts | {"chunks": chunks_s}).items()}


def _start(settings: EngineSettings, caches: Path) -> dict[str, Any]:
    environment = os.environ | {name: str(caches / name.lower()) for name in _CACHES}
    asked = json.dumps(asdict(settings) | {"caches": str(caches)})
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD], input=asked, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise ValueError(f"the process to be timed failed: {last_words(done)}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, "process_s": round(seconds, 3)}


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process wrote to stderr, or its exit code."""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1]
