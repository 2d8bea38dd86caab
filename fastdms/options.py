"""The arguments of ``compile``, checked and resolved against the machine and the checkpoint."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import torch

from fastdms.cache import CacheConfig
from fastdms.config import DMSConfig, ModelConfig, dense_chunk, dense_tokens
from fastdms.graphs import check_mode
from fastdms.ops import KV_DTYPES
from fastdms.ops.int4 import INT4

__all__ = ["Options", "resolve_cache", "resolve_device", "resolve_dms", "resolve_options", "resolve_zeroing"]

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
WEIGHTS = ("auto", "bf16", "fp8", "int4")
# An output head in int4 costs four times what one in fp8 does (``docs/lab-notes.md``).
QUANTISED = {"fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn), "int4": (INT4, torch.float8_e4m3fn)}
_MAX_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Resolved arguments: devices and dtypes as torch knows them, every default filled in.

    weights, head: what the linear layers and the output head are stored in.
    """

    device: torch.device
    dtype: torch.dtype
    weights: torch.dtype
    head: torch.dtype
    kv_dtype: torch.dtype
    max_concurrency: int
    max_context: int
    kv_memory: int | float | None
    prefill_chunk: int
    mode: str


def resolve_options(
    config: ModelConfig,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    kv_dtype: str,
    weights: str,
    max_concurrency: int,
    max_context: int | None,
    kv_memory: int | float | None,
    prefill_chunk: int,
    mode: str | None,
) -> Options:
    """``Options`` for a model of shape ``config``; ValueError names the argument that can't be."""
    place = resolve_device(device)
    compute = _dtype(dtype, config, place)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {_names(WEIGHTS)}, got {weights!r}")
    if config.int4 is not None and weights not in ("auto", "int4"):
        raise ValueError(f"the checkpoint's weights are int4; weights must be 'auto' or 'int4', got {weights!r}")
    if weights == "bf16":
        if dtype is not None and compute != torch.bfloat16:
            raise ValueError(f"weights 'bf16' and dtype {dtype!r} contradict each other")
        compute = torch.bfloat16
    if not isinstance(kv_dtype, str) or kv_dtype not in ("auto", *KV_DTYPES):
        raise ValueError(f"kv_dtype must be 'auto' or one of {_names(KV_DTYPES)}, got {kv_dtype!r}")
    if kv_dtype == "auto":
        kv_dtype = "fp8" if place.type == "cuda" else "bf16" if compute == torch.bfloat16 else "fp32"
    if mode is None:
        mode = "graphs" if place.type == "cuda" else "eager"
    check_mode(mode, place)
    limit = config.max_position_embeddings
    context = _integer("max_context", limit if max_context is None else max_context, 2, limit)
    if kv_memory is not None:
        _check_kv_memory(kv_memory)
    stored, head = QUANTISED.get(weights, (compute if config.int4 is None else INT4, compute))
    return Options(
        device=place,
        dtype=compute,
        weights=stored,
        head=head,
        kv_dtype=KV_DTYPES[kv_dtype],
        max_concurrency=_integer("max_concurrency", max_concurrency, 1, _MAX_ROWS),
        max_context=context,
        kv_memory=kv_memory,
        prefill_chunk=_integer("prefill_chunk", prefill_chunk, 1, 2**20),
        mode=mode,
    )


def resolve_dms(dms: object, declared: DMSConfig | None) -> DMSConfig | None:
    """The DMS rule in force; None: nothing is ever evicted."""
    if isinstance(dms, DMSConfig):
        return dms
    if dms not in ("auto", "off"):
        raise ValueError(f"dms must be 'auto', 'off' or a DMSConfig, got {dms!r}")
    return declared if dms == "auto" else None


def resolve_zeroing(declared: DMSConfig | None) -> str:
    """Where a model with eviction off still sees its borrowed channel as zero: as it was trained."""
    return declared.zero_borrowed if declared is not None and declared.source == "borrowed_q" else "none"


def resolve_cache(config: ModelConfig, dms: DMSConfig | None, options: Options) -> CacheConfig:
    """The cache that fits ``options.kv_memory``: bytes, a share of the free memory, or as much as ever needed."""
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "num_rows": options.max_concurrency,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "window_tokens": min(dms.window_tokens, options.max_context) if dms else 0,
        "max_context": options.max_context,
        "kv_dtype": options.kv_dtype,
        "vocab_size": config.vocab_size,
    }
    empty = CacheConfig(**fields, num_pages=0)
    budget = options.kv_memory
    if budget is None or isinstance(budget, float):
        default = 0.85 if options.device.type == "cuda" else 0.5
        share = default if budget is None else budget
        budget = int(_free_memory(options.device) * share)
        budget -= min(_dense_bytes(config, dms, options), budget // 2)
    pages = empty.pages_within(budget)
    if pages < empty.num_spans:
        least = empty.fixed_bytes + empty.num_spans * (empty.page_bytes + 4)
        raise ValueError(
            f"kv_memory of {budget:,} bytes is too small: {options.max_concurrency} rows of {options.max_context} "
            f"tokens need {least:,} bytes to hold even one token each layer and head"
        )
    return CacheConfig(**fields, num_pages=pages)


def _dense_bytes(config: ModelConfig, dms: DMSConfig | None, options: Options) -> int:
    """What a dense prefill of the longest prompt takes beside the cache: its keys and values, and on a GPU what a dense
    chunk's activations have more than those of another chunk."""
    tokens, chunk = options.max_context, options.prefill_chunk
    tokens = dense_tokens(dms, tokens, tokens, chunk)
    numbers = 2 * config.num_layers * tokens * config.num_kv_heads * config.head_dim
    if options.device.type == "cuda":
        more = max(0, min(tokens, dense_chunk(chunk)) - chunk)
        numbers += more * (2 * config.intermediate_size + 7 * config.hidden_size)
    return numbers * options.dtype.itemsize


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA where there is one; ValueError for one that isn't there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(place)!r} asks for CUDA, and this machine has no CUDA device")
        if place.index is not None and place.index >= torch.cuda.device_count():
            raise ValueError(f"device {str(place)!r} does not exist; there are {torch.cuda.device_count()}")
        return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    return torch.device("cpu")


def _dtype(dtype: str | torch.dtype | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    if dtype is None:
        stored = config.weight_dtype if config.weight_dtype in DTYPES.values() else torch.float32
        return stored if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype must be one of {_names(DTYPES)}, got {dtype!r}")
    return resolved


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    return int(value)


def _check_kv_memory(value: object) -> None:
    allowed = "kv_memory must be a number of bytes (int > 0) or a share of the free memory (float in (0, 1])"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{allowed}, got {value!r}")
    if value <= 0 or (isinstance(value, float) and not value <= 1.0):
        raise ValueError(f"{allowed}, got {value!r}")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _names(values: object) -> str:
    return ", ".join(repr(value) for value in values)  # type: ignore[attr-defined]
