"""Decoding, prefill and KV memory, measured through the whole engine by calling the model as its users do."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import fastdms
from fastdms.config import ModelConfig
from fastdms.decoder import Decoder
from fastdms.options import resolve_options
from fastdms.runtime import CompiledModel
from fastdms.tools.bench.figures import decode_figures, dtype_name, floor_ms, rate, spread
from fastdms.tools.bench.profile import profile_steps
from fastdms.tools.bench.settings import EngineSettings
from fastdms.tools.bench.vllm_peer import measure_vllm, times_faster
from fastdms.tools.quality.metrics import live_share_outside_window
from fastdms.tools.shapes import SHAPES, keep_share_rule, random_model

if TYPE_CHECKING:
    from fastdms.kv_report import KVReport

__all__ = ["Subject", "kept_shares", "measure_engine", "measure_subject", "open_subject", "weight_bytes"]

Clock = Callable[[], float]
_SINGLE_ROWS = ("cos", "sin")  # tables of which a step reads one row for each token


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model ready to be measured. ``start_s``: what making it took. ``weight_bytes``: read by each decode step."""

    name: str
    model: CompiledModel
    kept: float | None
    start_s: float
    weight_bytes: int
    kv_token_bytes: int


def measure_engine(what: str, settings: EngineSettings, clock: Clock = time.perf_counter) -> Iterator[dict[str, Any]]:
    """The rows of ``fastdms bench decode``, ``profile``, ``prefill`` or ``memory``, one model for each kept share.

    Of decode with a peer first that one's rows, while nothing of ours is on the device, and then how many times faster
    ours are.
    """
    theirs = {}
    if settings.peer is not None:
        config = _shape(settings)
        for row in measure_vllm(settings, config, resolve_options(config, kv_memory=None, **_options(settings))):
            theirs[row["rows"], row["context"]] = row
            yield row
    for kept in kept_shares(settings):
        subject = open_subject(settings, kept, clock)
        with subject.model:
            for row in measure_subject(what, subject, settings, clock):
                other = theirs.get((row["rows"], row["context"]))
                yield row if other is None else {**row, **times_faster(row, other)}


def kept_shares(settings: EngineSettings) -> tuple[float | None, ...]:
    """What ``open_subject`` is to be called with: None once for a checkpoint."""
    if settings.model is not None:
        return (None,)
    return settings.kept or ((1.0,) if settings.dms == "off" else (0.125,))


def open_subject(settings: EngineSettings, kept: float | None, clock: Clock = time.perf_counter) -> Subject:
    """The checkpoint, or random weights under a rule that keeps ``kept``; ValueError for an unknown shape."""
    options = _options(settings)
    begin = clock()
    if settings.model is not None:
        model = fastdms.compile(settings.model, dms=settings.dms, **options)
    else:
        assert kept is not None
        config = _shape(settings)
        model = random_model(config, keep_share_rule(config, kept, settings.window_tokens), **options)
    _synchronize(model)
    start_s = clock() - begin
    runner = model._open_engine().runner
    page = runner.cache.config
    return Subject(
        name=settings.shape or str(settings.model),
        model=model,
        kept=kept,
        start_s=start_s,
        weight_bytes=weight_bytes(runner.decoder),
        kv_token_bytes=page.page_bytes // page.page_size,
    )


def _options(settings: EngineSettings) -> dict[str, Any]:
    return {
        "device": settings.device, "dtype": settings.dtype, "kv_dtype": settings.kv_dtype, "weights": settings.weights,
        "mode": settings.mode, "prefill_chunk": settings.prefill_chunk, "max_concurrency": max(settings.concurrency),
        "max_context": max(settings.contexts) + settings.new_tokens,
    }  # fmt: skip


def _shape(settings: EngineSettings) -> ModelConfig:
    if settings.shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {settings.shape!r}")
    return SHAPES[settings.shape]


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all weights that one decode step reads whole: not an embedding table that isn't also the output's."""
    tied = decoder.lm_head.weight is decoder.embed
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    skipped = _SINGLE_ROWS if tied else (*_SINGLE_ROWS, "embed")
    return sum(tensor.nbytes for name, tensor in tensors.items() if name not in skipped)


def measure_subject(
    what: str, subject: Subject, settings: EngineSettings, clock: Clock = time.perf_counter
) -> Iterator[dict[str, Any]]:
    """One row for each concurrency and context. What is compiled or allocated at first use stays out of the figures."""
    measure = {"decode": _decode, "profile": _profile, "prefill": _prefill, "memory": _memory}[what]
    generator = torch.Generator().manual_seed(1)
    for rows in settings.concurrency:
        for context in settings.contexts:
            shape = (rows, context)
            prompts = torch.randint(0, subject.model.config.vocab_size, shape, generator=generator).tolist()
            _reset_peak(subject.model)
            figures = measure(subject, prompts, settings, clock)
            yield {
                "model": subject.name,
                "rows": rows,
                "context": context,
                **figures,
                **_facts(subject, settings),
                "start_s": round(subject.start_s, 3),
                "peak_bytes": _peak_bytes(subject.model),
            }


def _decode(subject: Subject, prompts: list[list[int]], settings: EngineSettings, clock: Clock) -> dict[str, Any]:
    model = subject.model
    _timed(model, prompts, settings, 2, clock)
    firsts, wholes = [], []
    for _ in range(settings.repeats):  # in turns, so that a machine that slows down slows both
        firsts.append(_timed(model, prompts, settings, 1, clock))
        before, steps_before = model.kv_report(), _decode_steps(model)
        wholes.append(_timed(model, prompts, settings, settings.new_tokens, clock))
    after, steps = model.kv_report(), _decode_steps(model) - steps_before
    live_bytes = (_live_tokens(before) + _live_tokens(after)) / 2 * subject.kv_token_bytes
    floor = floor_ms(subject.weight_bytes + live_bytes, settings.bandwidth_tb_s)
    return {
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        **decode_figures(len(prompts), settings.new_tokens, firsts, wholes, floor),
        # Fewer than all where prompts are many chunks and answers short: the first end while the last are prefilled.
        "rows_a_step": round(len(prompts) * (settings.new_tokens - 1) / steps, 3),
        "prefill_tok_s": rate(len(prompts) * len(prompts[0]), min(firsts)),
        "weight_bytes": subject.weight_bytes,
        "live_bytes": round(live_bytes),
        **_kv(after, subject),
    }


def _profile(subject: Subject, prompts: list[list[int]], settings: EngineSettings, _: Clock) -> dict[str, Any]:
    figures = profile_steps(subject.model, prompts, settings.repeats, settings.sampling(1))
    live_bytes = figures["live_tokens"] * subject.kv_token_bytes
    floor_us = floor_ms(subject.weight_bytes + live_bytes, settings.bandwidth_tb_s) * 1e3
    return {
        **figures,
        "floor_us": round(floor_us, 3),
        "floor_share": round(floor_us / figures["step_us"], 4),
        "weight_bytes": subject.weight_bytes,
        "live_bytes": round(live_bytes),
    }


def _prefill(subject: Subject, prompts: list[list[int]], settings: EngineSettings, clock: Clock) -> dict[str, Any]:
    _timed(subject.model, prompts, settings, 1, clock)
    seconds = [_timed(subject.model, prompts, settings, 1, clock) for _ in range(settings.repeats)]
    tokens = len(prompts) * len(prompts[0])
    return {
        "repeats": settings.repeats,
        "prefill_tok_s": rate(tokens, min(seconds)),
        "prefill_tok_s_median": rate(tokens, spread(seconds)["p50"]),
        "prefill_s_spread": spread(seconds),
        **_kv(subject.model.kv_report(), subject),
    }


def _memory(subject: Subject, prompts: list[list[int]], settings: EngineSettings, clock: Clock) -> dict[str, Any]:
    _timed(subject.model, prompts, settings, 1, clock)
    report = subject.model.kv_report()
    whole = report.bytes_in_use + report.bytes_metadata
    return {
        "live_bytes": round(_live_tokens(report) * subject.kv_token_bytes),
        **_kv(report, subject),
        "dense_over_kv": round(report.ratio, 4),
        "dense_over_kv_and_metadata": round(report.dense_bytes / whole, 4),
    }


def _kv(report: KVReport, subject: Subject) -> dict[str, Any]:
    """What the allocator says; bytes in use are whole pages, metadata is that of the whole cache."""
    window = subject.model.dms.window_tokens if subject.model.dms is not None else 0
    seen = report.tokens // report.rows
    outside = None
    if subject.model.dms is not None and seen > window + 1:
        outside = round(float(live_share_outside_window(report.live_tokens, seen, window).mean()), 4)
    return {
        "live_share": round(report.live_share, 4),
        "live_share_outside_window": outside,
        "kv_bytes": report.bytes_in_use,
        "kv_metadata_bytes": report.bytes_metadata,
        "kv_pool_bytes": report.bytes_pool,
        "dense_bf16_bytes": report.dense_bytes,
    }


def _facts(subject: Subject, settings: EngineSettings) -> dict[str, Any]:
    options, rule = subject.model.options, subject.model.dms
    return {
        "kept_asked": subject.kept,
        "window": None if rule is None else rule.window_tokens,
        "dms": "off" if rule is None else "on",
        "kv_dtype": dtype_name(options.kv_dtype),
        "dtype": dtype_name(options.dtype),
        "weights": settings.weights,
        **{name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")},
        "mode": options.mode,
        "prefill_chunk": options.prefill_chunk,
        "dense_kernel": subject.model.dense_kernel,
        "bandwidth_tb_s": settings.bandwidth_tb_s,
    }


def _decode_steps(model: CompiledModel) -> int:
    """So far."""
    return sum(model.graphs.stats()["runs"].values())


def _live_tokens(report: KVReport) -> float:
    """Of all rows, layers and KV heads together."""
    return float(report.live_tokens.sum()) * report.rows


def _timed(
    model: CompiledModel, prompts: list[list[int]], settings: EngineSettings, new_tokens: int, clock: Clock
) -> float:
    begin = clock()
    model(prompts, settings.sampling(new_tokens))
    return clock() - begin


def _synchronize(model: CompiledModel) -> None:
    if model.options.device.type == "cuda":
        torch.cuda.synchronize(model.options.device)


def _reset_peak(model: CompiledModel) -> None:
    if model.options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.options.device)


def _peak_bytes(model: CompiledModel) -> int:
    """Most that torch had allocated on the card; on the CPU, the most that the process ever held."""
    if model.options.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.options.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
