"""vLLM under the protocol of ``fastdms bench decode``: the script of a process that knows nothing of fastdms.

As JSON from stdin: ``model``, a folder with config.json; ``kv_cache_dtype``; ``vocab_size``; ``context`` and
``new_tokens`` of each row; ``max_model_len``; ``concurrency``, how many rows at once; ``repeats``; ``results``, a file.
To that goes a JSON line for each concurrency, with seconds for one token and for all of every row, or an ``error``;
one without ``rows`` is about all of them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_MEMORY_SHARE = 0.85  # of what is free, as fastdms takes by default
_WARM_UP_TOKENS = 8
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}


def main() -> None:
    """Never raises: what fails is a line of the results."""
    asked = json.load(sys.stdin)
    os.environ.update(_ENVIRONMENT)
    known: dict[str, Any] = {}
    try:
        import torch

        vllm: Any = importlib.import_module("vllm")
        known |= {"version": vllm.__version__, "peer_torch": torch.__version__}
        begin = time.perf_counter()
        engine = _engine(vllm, torch, asked)
        known |= {"start_s": round(time.perf_counter() - begin, 3), "kv_tokens": _kv_tokens(engine)}
    except Exception as error:  # a foreign package may fail in any way
        _write(asked, {**known, "error": _one_line(error)})
        return
    generator = torch.Generator().manual_seed(1)
    shape = (max(asked["concurrency"]), asked["context"])
    ids = torch.randint(0, asked["vocab_size"], shape, generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]
    for rows in asked["concurrency"]:
        try:
            found = _measure(vllm, engine, prompts[:rows], known["kv_tokens"], asked)
        except Exception as error:
            found = {"error": _one_line(error)}
        _write(asked, {"rows": rows, **known, **found})


def _engine(vllm: Any, torch: Any, asked: dict[str, Any]) -> Any:
    share = _MEMORY_SHARE
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        share *= free / total
    return vllm.LLM(
        model=asked["model"], tokenizer=None, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16",
        kv_cache_dtype=asked["kv_cache_dtype"], max_model_len=asked["max_model_len"],
        max_num_seqs=max(asked["concurrency"]), gpu_memory_utilization=share, enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip


def _kv_tokens(engine: Any) -> int | None:
    """Tokens that the KV cache holds; None where this version doesn't say."""
    try:
        cache = engine.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)
    except (AttributeError, TypeError):
        return None


def _measure(
    vllm: Any, engine: Any, prompts: list[dict[str, Any]], kv_tokens: int | None, asked: dict[str, Any]
) -> dict[str, Any]:
    needed = len(prompts) * (asked["context"] + asked["new_tokens"])
    if kv_tokens is not None and kv_tokens < needed:
        raise ValueError(f"the KV cache holds {kv_tokens:,} tokens and {len(prompts)} rows take {needed:,}")

    def timed(tokens: int) -> float:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != [tokens] * len(prompts):
            raise ValueError(f"{tokens} tokens were asked of each of {len(prompts)} rows, got {counts}")
        return seconds

    timed(min(_WARM_UP_TOKENS, asked["new_tokens"]))
    pairs = [(timed(1), timed(asked["new_tokens"])) for _ in range(asked["repeats"])]
    return {"first_s": [first for first, _ in pairs], "whole_s": [whole for _, whole in pairs]}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _write(asked: dict[str, Any], line: dict[str, Any]) -> None:
    with Path(asked["results"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
