"""Measurements as JSON, as Markdown tables, and as pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import fastdms
from fastdms.tools.provenance import commit
from fastdms.tools.quality.heatmap import save_heatmap
from fastdms.tools.quality.measure import Subject

__all__ = ["document", "markdown", "provenance", "table", "write_report"]


def document(
    subject: Subject,
    results: Sequence[dict[str, Any]],
    transformers_results: Sequence[dict[str, Any]] = (),
    needles: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """All that is known about one run, ready for JSON; the lists are what the measurements give."""
    device = next(iter(subject.options.values())).device
    return {
        "model": subject.name,
        "dms": asdict(subject.dms),
        "settings": asdict(subject.settings),
        **provenance(device),
        "results": list(results),
        "transformers": list(transformers_results),
        "needles": list(needles),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what something was measured: card, versions, and the commit where fastdms runs from a checkout."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "fastdms": fastdms.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(Path(fastdms.__file__).resolve().parents[1]),
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables of a ``document``."""
    dms, settings = report["dms"], report["settings"]
    made_at = f", commit {report['commit']}" if report["commit"] else ""
    target = f", trained for {dms['target_compression']:g}x" if dms["target_compression"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# What eviction costs: {report['model']}",
        "Eviction on against eviction off in the same engine, over the same tokens. "
        f"Window {dms['window_tokens']} tokens{target}; context {settings['context']} tokens, of which "
        f"{settings['prompt_tokens']} prefilled. {report['card']}, {versions}{made_at}.",
        _main_table(report["results"]),
        "KLD: KL(off || on) in nats per token, mean with its 95 % interval between sequences, and largest. "
        "Match: steps with the same most likely token. Kept: share of the tokens outside the window. "
        "KV: pages in use of one sequence, and their share of a dense bf16 cache.",
    ]
    if any(result["prefill"] for result in report["results"]):
        parts += ["## Through prefill", _prefill_table(report["results"])]
    if report["transformers"]:
        parts += [
            "## The runtime and transformers",
            "The same checkpoint in transformers, fp32, under the mask written out, and how far the runtime in fp32 is "
            "from it, relatively.",
            _transformers_table(report["transformers"]),
        ]
    if report["needles"]:
        parts += [
            "## Needles",
            "Answers that rank first among eight, and their mean lead in nats over the likeliest of the other seven. "
            "A needle inside the window can't be evicted.",
            _needle_table(report["needles"]),
        ]
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write ``quality.json``, ``quality.md`` and a heat map for each text, of the first KV dtype; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "quality.json", folder / "quality.md"]
    written[0].write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    written[1].write_text(markdown(report), encoding="utf-8")
    for text in dict.fromkeys(result["text"] for result in report["results"]):
        result = next(result for result in report["results"] if result["text"] == text)
        written.append(folder / f"live_share-{text}.png")
        title = (
            f"{report['model']} on {text}: share kept of the tokens outside the window of {result['window_tokens']}, "
            f"{result['kv_dtype']} pages"
        )
        save_heatmap(written[-1], result["live_share_outside_window_spans"], title)
    return written


def _main_table(results: Iterable[dict[str, Any]]) -> str:
    head = (
        *("text", "KV dtype", "steps", "kept", "compression", "KLD", "KLD max", "match"),
        *("PPL off", "PPL on", "PPL change", "KV"),
    )
    rows = []
    for result in results:
        decode, compression = result["decode"], result["compression_outside_window"]
        rows.append((
            result["text"],
            result["kv_dtype"],
            f"{decode['steps']:,}",
            f"{result['live_share_outside_window']:.1%}",
            "all gone" if compression is None else f"{compression:.2f}x",
            _kld(decode),
            f"{decode['kld_max']:.3f}",
            f"{decode['greedy_match']:.2%}",
            f"{decode['perplexity_off']:.3f}",
            f"{decode['perplexity_on']:.3f}",
            f"{decode['perplexity_change']:+.2%}",
            f"{result['kv_bytes'] / 2**20:.2f} MiB, {result['kv_bytes'] / result['dense_bf16_bytes']:.0%}",
        ))  # fmt: skip
    return table(head, rows)


def _prefill_table(results: Iterable[dict[str, Any]]) -> str:
    head = ("text", "KV dtype", "steps", "KLD", "KLD max", "match")
    return table(head, [
        (
            result["text"], result["kv_dtype"], f"{prefill['steps']:,}", _kld(prefill), f"{prefill['kld_max']:.3f}",
            f"{prefill['greedy_match']:.2%}",
        )
        for result in results
        if (prefill := result["prefill"])
    ])  # fmt: skip


def _transformers_table(results: Iterable[dict[str, Any]]) -> str:
    head = (
        "text",
        "kept",
        "KLD",
        "PPL off",
        "PPL on",
        "kept differs",
        "KLD differs",
        "PPL off differs",
        "PPL on differs",
    )
    names = ("live_share_outside_window", "kld", "perplexity_off", "perplexity_on")
    rows = []
    for result in results:
        decode, differences = result["decode"], result["relative_differences"]
        rows.append((
            result["text"],
            f"{result['live_share_outside_window']:.1%}",
            _kld(decode),
            f"{decode['perplexity_off']:.3f}",
            f"{decode['perplexity_on']:.3f}",
            *("by zero" if differences[name] is None else f"{differences[name]:+.4%}" for name in names),
        ))  # fmt: skip
    return table(head, rows)


def _needle_table(needles: Iterable[dict[str, Any]]) -> str:
    head = ("text", "KV dtype", "depth", "needles", "first, off", "first, on", "lead, off", "lead, on")
    return table(head, [
        (
            row["text"], row["kv_dtype"], f"{row['depth']:.0%}{', inside the window' * row['inside_window']}",
            f"{row['needles']}", f"{row['accuracy_off']:.1%}", f"{row['accuracy_on']:.1%}",
            f"{row['margin_off']:.2f}", f"{row['margin_on']:.2f}",
        )
        for row in needles
    ])  # fmt: skip


def _kld(summary: dict[str, Any]) -> str:
    interval = "" if summary["kld_low"] is None else f" ({summary['kld_low']:.4f} to {summary['kld_high']:.4f})"
    return f"{summary['kld']:.4f}{interval}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; ``|`` in a cell is escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
