"""Eviction on against eviction off in the same engine, over the same tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fastdms
from fastdms.checkpoint import open_checkpoint
from fastdms.config import DMSConfig
from fastdms.ops import KV_DTYPES
from fastdms.options import Options, resolve_options
from fastdms.progress import progress
from fastdms.tokenizer import has_tokenizer, load_tokenizer
from fastdms.tools.quality.metrics import Steps, compare, live_share_outside_window, summarise
from fastdms.tools.quality.settings import Settings
from fastdms.tools.quality.texts import Text, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Subject", "batches", "engines", "measure", "open_subject"]

# Of one batch's logits; both engines' are held at once.
_LOGITS_BYTES = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint with trained eviction, and what it is to be measured on.

    folder: where its files lie. options: by KV dtype, each once, what ``fastdms.compile`` will resolve. windows: by
    text, the sequences of ``settings.context`` ids and one more that is only predicted.
    """

    source: str | os.PathLike[str]
    name: str
    folder: Path
    dms: DMSConfig
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    options: dict[str, Options]
    windows: dict[str, list[list[int]]]


def open_subject(source: str | os.PathLike[str], texts: Sequence[Text], settings: Settings) -> Subject:
    """Look at a checkpoint before its weights are read: a folder or a hub id.

    Raises ValueError where it has no trained eviction, no tokenizer, or can't be run as ``settings`` ask, and where a
    text is too short.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.dms is None:
        raise ValueError(f"{checkpoint.name} has no trained eviction (DMS), so there is nothing to measure")
    if settings.context <= checkpoint.dms.window_tokens + 1:
        raise ValueError(
            f"context must reach past the window of {checkpoint.dms.window_tokens} tokens and the token itself, or "
            f"nothing is evicted; got {settings.context}"
        )
    folder = checkpoint.tokenizer_path
    if folder is None or not has_tokenizer(folder):
        raise ValueError(f"{checkpoint.name} has no tokenizer, which reading text needs")
    options: dict[str, Options] = {}
    for kv_dtype in settings.kv_dtypes:
        resolved = resolve_options(
            checkpoint.config, device=settings.device, dtype=settings.dtype, kv_dtype=kv_dtype, weights="auto",
            max_concurrency=settings.rows, max_context=settings.context, kv_memory=None, prefill_chunk=1, mode=None,
        )  # fmt: skip
        options[next(name for name, dtype in KV_DTYPES.items() if dtype == resolved.kv_dtype)] = resolved
    tokenizer = load_tokenizer(folder)
    return Subject(
        source=source,
        name=folder.resolve().name if Path(source).is_dir() else checkpoint.name,
        folder=folder,
        dms=checkpoint.dms,
        tokenizer=tokenizer,
        settings=settings,
        options=options,
        windows={text.name: token_windows(tokenizer, text, settings.context + 1, settings.sequences) for text in texts},
    )


def measure(subject: Subject) -> list[dict[str, Any]]:
    """One dict for each text and KV dtype, texts in their order, ready for JSON.

    ``decode``: a ``Summary`` of the tokens that went through the decode path. ``prefill``: of single prefills of
    several lengths, or None; a prompt within one prefill chunk sees its own keys unrounded, whatever the KV dtype.
    ``live_share``: kept tokens over all; ``live_share_outside_window``: the same of the tokens that could be evicted;
    means over sequences, layers and KV heads. ``live_share_outside_window_spans``: by layer and KV head, ``[L][Hkv]``.
    ``compression_outside_window``: the inverse of the mean, None where nothing is kept. ``kv_bytes``: of one sequence
    with eviction, whole pages; ``dense_bf16_bytes``: in a dense bf16 cache.
    """
    results = []
    for kv_dtype in subject.options:
        with engines(subject, kv_dtype) as (off, on):
            for name, sequences in subject.windows.items():
                figures = _measure_text(off, on, sequences, subject.settings, f"{name}, {kv_dtype} pages")
                results.append(_described(subject, kv_dtype, name) | figures)
    names = list(subject.windows)
    return sorted(results, key=lambda result: names.index(result["text"]))


@contextmanager
def engines(subject: Subject, kv_dtype: str) -> Iterator[tuple[fastdms.CompiledModel, fastdms.CompiledModel]]:
    """The checkpoint twice, with eviction off and as it was trained."""
    settings = subject.settings

    def compiled(dms: str) -> fastdms.CompiledModel:
        return fastdms.compile(
            subject.source, tokenizer=subject.tokenizer, dms=dms, device=settings.device, dtype=settings.dtype,
            kv_dtype=kv_dtype, max_concurrency=settings.rows, max_context=settings.context,
        )  # fmt: skip

    with compiled("off") as off, compiled("auto") as on:
        yield off, on


def batches(
    sequences: Sequence[list[int]], logits_per_sequence: int, vocab_size: int, rows: int
) -> list[Sequence[list[int]]]:
    """``sequences`` in batches of at most ``rows``, and of no more than fp32 logits leave room for."""
    rows = min(rows, max(1, _LOGITS_BYTES // (4 * vocab_size * logits_per_sequence)))
    return [sequences[first : first + rows] for first in range(0, len(sequences), rows)]


def _measure_text(
    off: fastdms.CompiledModel, on: fastdms.CompiledModel, sequences: list[list[int]], settings: Settings, what: str
) -> dict[str, Any]:
    decoded = batches(sequences, settings.decode_tokens + 1, on.config.vocab_size, settings.rows)
    prefilled = sequences if settings.prefill_points else []
    with progress(total=2 * (len(decoded) + len(prefilled)), desc=f"measuring {what}", unit=" runs") as bar:
        figures = _through_decode(off, on, decoded, settings, bar)
        steps = [_through_prefill(off, on, sequence, settings, bar) for sequence in prefilled]
    return {"decode": figures.pop("decode"), "prefill": asdict(summarise(steps)) if steps else None, **figures}


def _through_decode(
    off: Any, on: Any, decoded: list[Sequence[list[int]]], settings: Settings, bar: Any
) -> dict[str, Any]:
    steps: list[Steps] = []
    live = np.zeros((on.config.num_layers, on.config.num_kv_heads))
    kv_bytes = dense_bytes = 0
    for batch in decoded:
        ids = [sequence[: settings.context] for sequence in batch]
        lengths = [settings.prompt_tokens] * len(batch)
        logits = []
        for model in (off, on):
            logits.append(model.score_batch(ids, lengths))
            bar.update()
        report = on.kv_report()
        live += np.rint(report.rows * report.live_tokens)  # whole tokens: no share above 1 by rounding
        kv_bytes, dense_bytes = kv_bytes + report.bytes_in_use, dense_bytes + report.dense_bytes
        for sequence, without, with_eviction in zip(batch, *logits, strict=True):
            # The first row is the prompt's own: prefill made it.
            targets = sequence[settings.prompt_tokens + 1 :]
            steps.append(compare(without[1:], with_eviction[1:], targets, on.options.device))
    live /= len(steps)
    outside = live_share_outside_window(live, settings.context, on.dms.window_tokens)
    mean = float(outside.mean())
    return {
        "decode": asdict(summarise(steps)),
        "live_share": float(live.mean()) / settings.context,
        "live_share_outside_window": mean,
        "compression_outside_window": 1.0 / mean if mean > 0 else None,
        "live_share_outside_window_spans": outside.tolist(),
        "kv_bytes": kv_bytes // len(steps),
        "dense_bf16_bytes": dense_bytes // len(steps),
    }


def _through_prefill(off: Any, on: Any, sequence: list[int], settings: Settings, bar: Any) -> Steps:
    """One prefill gives the logits after its last token only, so each point is a prompt of its own."""
    points = min(settings.prefill_points, settings.decode_tokens)
    lengths = [settings.prompt_tokens + settings.decode_tokens * (i + 1) // points for i in range(points)]

    def last_logits(model: Any) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        for first in range(0, points, settings.rows):
            part = lengths[first : first + settings.rows]
            rows += model.score_batch([sequence[:length] for length in part], part)
        bar.update()
        return torch.cat(rows)

    return compare(last_logits(off), last_logits(on), [sequence[length] for length in lengths], on.options.device)


def _described(subject: Subject, kv_dtype: str, text: str) -> dict[str, Any]:
    settings, options = subject.settings, subject.options[kv_dtype]
    return {
        "text": text,
        "kv_dtype": kv_dtype,
        "dtype": str(options.dtype).removeprefix("torch."),
        "sequences": len(subject.windows[text]),
        "context": settings.context,
        "prompt_tokens": settings.prompt_tokens,
        "window_tokens": subject.dms.window_tokens,
    }
