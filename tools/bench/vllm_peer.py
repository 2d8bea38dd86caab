"""vLLM beside ``fastdms bench decode``: the same shape, KV dtype and protocol, with random weights of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdms.checkpoint.hf_config import published_values
from fastdms.config import ModelConfig
from fastdms.options import Options
from fastdms.tools.bench import vllm_run
from fastdms.tools.bench.figures import decode_rates, dtype_name, rate
from fastdms.tools.bench.settings import EngineSettings
from fastdms.tools.bench.start import last_words

__all__ = ["measure_vllm", "times_faster"]

_KV_DTYPES = {torch.bfloat16: "auto", torch.float8_e4m3fn: "fp8"}
_PATIENCE_S = 1800  # for one process: a peer that hangs must not keep our own figures waiting for ever


def measure_vllm(settings: EngineSettings, config: ModelConfig, options: Options) -> Iterator[dict[str, Any]]:
    """A row for each context and concurrency, as ``fastdms bench decode`` has them; a process for each context.

    config: the shape. options: what ``settings`` come to on this machine. The packages in the folder ``settings.peer``
    go before all others in the process. Whatever fails there is a row with ``error``, in one line.
    Raises ValueError, before anything runs, for what vLLM isn't compared in: weights other than bf16, KV in fp32.
    """
    if options.weights != torch.bfloat16:
        stored = dtype_name(options.weights)
        raise ValueError(f"--peer compares models with weights in bf16 (--weights bf16), got {stored}")
    if options.kv_dtype not in _KV_DTYPES:
        raise ValueError(f"--peer compares KV in bf16 or fp8 (--kv-dtype), got {dtype_name(options.kv_dtype)}")
    for context in settings.contexts:
        found = _run(settings, config, options, context)
        for rows in settings.concurrency:
            yield {
                "peer": "vllm",
                "model": settings.shape,
                "rows": rows,
                "context": context,
                "new_tokens": settings.new_tokens,
                "repeats": settings.repeats,
                "kv_dtype": dtype_name(options.kv_dtype),
                "dtype": dtype_name(options.dtype),
                **_figures(rows, context, settings.new_tokens, found.get(rows) or found[None]),
            }


def times_faster(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """How many times more tokens a second are ours, best by best and median by median; None where there is none."""

    def over(name: str) -> float | None:
        mine, other = ours[name], theirs.get(name)
        return None if mine is None or other is None else round(mine / other, 4)

    return {"times_faster": over("decode_tok_s"), "times_faster_median": over("decode_tok_s_median")}


def _figures(rows: int, context: int, new_tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """``found``: a line of the process."""
    figures = {name: value for name, value in found.items() if name not in ("rows", "first_s", "whole_s")}
    if "error" in found:
        return figures
    first_s, whole_s = found["first_s"], found["whole_s"]
    return {
        **decode_rates(rows, new_tokens, first_s, whole_s),
        "prefill_tok_s": rate(rows * context, min(first_s)),
        **figures,
    }


def _run(
    settings: EngineSettings, config: ModelConfig, options: Options, context: int
) -> dict[int | None, dict[str, Any]]:
    """The process's lines by rows; that under None stands for those that are missing."""
    longest = context + settings.new_tokens + 1  # so that no row ends by its length
    published = replace(config, max_position_embeddings=max(config.max_position_embeddings, longest))
    with tempfile.TemporaryDirectory(prefix="fastdms-bench-") as folder:
        results = Path(folder, "results.jsonl")
        results.touch()
        Path(folder, "config.json").write_text(json.dumps(published_values(published)), encoding="utf-8")
        asked = {
            "model": folder,
            "kv_cache_dtype": _KV_DTYPES[options.kv_dtype],
            "vocab_size": config.vocab_size,
            "context": context,
            "new_tokens": settings.new_tokens,
            "max_model_len": longest,
            "concurrency": settings.concurrency,
            "repeats": settings.repeats,
            "results": str(results),
        }
        # -P: else the script's folder would come first, and its profile.py before Python's.
        command = [sys.executable, "-P", vllm_run.__file__]
        try:
            done = subprocess.run(
                command, input=json.dumps(asked), env=_environment(settings, options.device), capture_output=True,
                text=True, timeout=_PATIENCE_S,
            )  # fmt: skip
            missing = last_words(done)
        except subprocess.TimeoutExpired:
            missing = f"the process took more than {_PATIENCE_S} s"
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {None: {"error": missing}, **{line.get("rows"): line for line in lines}}


def _environment(settings: EngineSettings, device: torch.device) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    packages = str(Path(str(settings.peer)).resolve())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([packages, *([before] if before else [])])}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index or 0]
    return environment
