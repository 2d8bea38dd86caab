"""What is to be measured; light enough to be read by ``--help``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastdms.sampling_params import SamplingParams

__all__ = [
    "COPY_TB_S",
    "ENGINE",
    "ENGINE_QUICK",
    "KEPT",
    "KERNELS_QUICK",
    "LINEARS",
    "OPS",
    "SPANS",
    "WEIGHTS",
    "EngineSettings",
    "KernelSettings",
]

COPY_TB_S = 3.0  # what a device copy moves on an NVIDIA H100 80GB HBM3, in 10^12 bytes a second
OPS = (
    "decode_attention",
    "decode_linear",
    "dequantise",
    "prefill_attention",
    "decode_append",
    "decode_layer",
    "prefill_append",
    "release",
    "dense_attention",
    "soft_attention",
)
LINEARS = tuple(
    f"{shape}.{layer}"
    for shape in ("llama-3.2-1b", "qwen3-8b", "tiny")
    for layer in ("qkv", "o", "gate_up", "down", "lm_head")
)
WEIGHTS = ("bf16", "fp8", "int4")
KEPT = (1.0, 0.125)
SPANS = ("uniform", "zipf", "one-keeps-all")
_KV_DTYPES = ("fp32", "bf16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One measurement of the whole engine.

    shape: random weights of a published shape, or model: a checkpoint; one of them is set.
    kept: shares to keep of the tokens past the window, of random weights; None for a checkpoint, which was trained.
    concurrency: rows that run at once. contexts: prompt tokens of each row. bandwidth_tb_s: what the floor assumes.
    peer: folder of Python packages with vLLM, which decodes beside a shape's random weights, greedily.
    The others as ``fastdms.compile`` takes them.

    Raises ValueError for a value outside its range.
    """

    shape: str | None = None
    model: str | None = None
    concurrency: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (8192,)
    new_tokens: int = 128
    kept: tuple[float, ...] | None = None
    window_tokens: int = 256
    kv_dtype: str = "auto"
    weights: str = "auto"
    dtype: str | None = None
    dms: str = "auto"
    mode: str | None = None
    device: str | None = None
    prefill_chunk: int = 2048
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repeats: int = 3
    peer: str | None = None
    bandwidth_tb_s: float = COPY_TB_S

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.model is None):
            raise ValueError("give either --shape or --model")
        if self.model is not None and self.kept is not None:
            raise ValueError("--kept is for random weights (--shape); a checkpoint keeps what it was trained to keep")
        if self.dms == "off" and self.kept is not None:
            raise ValueError("--kept says how much to evict and --dms off says not to; give one of them")
        _at_least(self, {"new_tokens": 2, "repeats": 1, "window_tokens": 0, "prefill_chunk": 1})
        _each_at_least(self, {"concurrency": 1, "contexts": 1})
        _shares(self.kept or ())
        _bandwidth(self.bandwidth_tb_s)
        _folder(self.peer)
        if self.peer is not None and self.model is not None:
            raise ValueError("--peer is for random weights (--shape): it is given none of a checkpoint's")
        if self.peer is not None and self.temperature != 0:
            raise ValueError(f"--peer decodes greedily: --temperature must be 0, got {self.temperature}")
        self.sampling(2)

    def sampling(self, max_tokens: int) -> SamplingParams:
        """What every row asks of the sampler."""
        return SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=1, max_tokens=max_tokens,
            ignore_eos=True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """One measurement of single ops; every combination of the tuples that an op depends on is a case of its own.

    spans: how a batch's live tokens are spread. live: mean live tokens of a span. lengths: tokens of a prompt.
    chunks: how many of them are one chunk, the last; 0: all.
    kept: shares to keep of the tokens past the window; None: ``KEPT``. Decode attention hangs on none: a share says of
    how many tokens the live ones are left, to time spans that have kept them all beside it; None: of no more.
    linears: layers of published shapes. weights: what theirs are stored in.
    repeats: samples of each figure. peer: folder with other libraries' kernels. check: hold each kernel against its
    reference before it is timed.

    Raises ValueError for a value outside its range.
    """

    ops: tuple[str, ...] = OPS
    spans: tuple[str, ...] = SPANS
    rows: tuple[int, ...] = (1, 8)
    live: tuple[int, ...] = (1280, 16384)
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    chunks: tuple[int, ...] = (0,)
    head_dims: tuple[int, ...] = (64, 128)
    kv_dtypes: tuple[str, ...] = ("fp8", "bf16")
    kept: tuple[float, ...] | None = None
    linears: tuple[str, ...] = tuple(name for name in LINEARS if not name.startswith("tiny."))
    weights: tuple[str, ...] = WEIGHTS
    kv_heads: int = 8
    group: int = 4
    window_tokens: int = 256
    page_size: int = 64
    repeats: int = 30
    device: str | None = None
    peer: str | None = None
    check: bool = True
    bandwidth_tb_s: float = COPY_TB_S

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("ops", self.ops, OPS),
            ("spans", self.spans, SPANS),
            ("kv-dtype", self.kv_dtypes, _KV_DTYPES),
            ("linear", self.linears, LINEARS),
            ("weights", self.weights, WEIGHTS),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"--{name} must be of {', '.join(allowed)}, got {value!r}")
        if set(self.ops) == {"dequantise"} and set(self.weights) == {"bf16"}:
            raise ValueError("--ops dequantise takes --weights fp8 or int4, got bf16")
        _at_least(self, {"kv_heads": 1, "group": 1, "window_tokens": 0, "page_size": 1, "repeats": 1})
        _each_at_least(self, {"rows": 1, "live": 1, "lengths": 1, "chunks": 0, "head_dims": 2})
        if odd := [size for size in self.head_dims if size % 2]:
            raise ValueError(f"--head-dim must be even (RoPE rotates pairs), got {odd[0]}")
        _shares(self.kept or ())
        _bandwidth(self.bandwidth_tb_s)
        _folder(self.peer)


# What each subcommand measures unless told otherwise.
ENGINE: dict[str, dict[str, object]] = {
    "decode": {},
    "profile": {"repeats": 20},
    "prefill": {"contexts": (8192, 32768)},
    "start": {"repeats": 1, "concurrency": (8,)},
    "memory": {"contexts": (1024, 4096, 8192, 32768), "concurrency": (1,), "kept": (1.0, 0.25, 0.125)},
}
ENGINE_QUICK: dict[str, dict[str, object]] = {
    "decode": {"contexts": (320,), "concurrency": (1,), "new_tokens": 16, "repeats": 1},
    "profile": {"contexts": (320,), "concurrency": (1,), "new_tokens": 16, "repeats": 3},
    "prefill": {"contexts": (128, 384), "concurrency": (1,), "repeats": 1},
    "start": {"contexts": (64,), "concurrency": (2,), "repeats": 1},
    "memory": {"contexts": (320, 640), "concurrency": (1,)},
}
KERNELS_QUICK: dict[str, object] = {
    "rows": (2,), "live": (320,), "lengths": (384,), "head_dims": (64,), "kv_heads": 3,
    "group": 3, "repeats": 3, "linears": ("tiny.gate_up", "tiny.lm_head"),
}  # fmt: skip


def _at_least(settings: object, least: dict[str, int]) -> None:
    for name, low in least.items():
        if (value := getattr(settings, name)) < low:
            raise ValueError(f"{_option(name)} must be at least {low}, got {value}")


def _each_at_least(settings: object, least: dict[str, int]) -> None:
    for name, low in least.items():
        for value in getattr(settings, name):
            if value < low:
                raise ValueError(f"{_option(name)} must be at least {low}, got {value}")


def _option(field: str) -> str:
    names = {
        "contexts": "context",
        "lengths": "length",
        "chunks": "chunk",
        "head_dims": "head-dim",
        "window_tokens": "window",
    }
    return "--" + names.get(field, field.replace("_", "-"))


def _shares(kept: tuple[float, ...]) -> None:
    for share in kept:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"--kept must be in (0, 1], got {share}")


def _bandwidth(tb_s: float) -> None:
    if not 0.0 < tb_s < math.inf:
        raise ValueError(f"--bandwidth must be a positive number of TB/s, got {tb_s}")


def _folder(peer: str | None) -> None:
    if peer is not None and not (peer and Path(peer).is_dir()):  # an empty path would be the current folder
        raise ValueError(f"--peer {peer or '(empty)'} is no folder")
