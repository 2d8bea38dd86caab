"""``fastdms quality``: what eviction costs, in KL divergence, greedy match, perplexity and tokens kept."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdms.cli.options import Parser
from fastdms.tools.quality.settings import PRESETS, Settings

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Print the tables; with ``--out``, write them, JSON and heat maps there. ValueError for what can't be measured."""
    args = _parser().parse_args(argv)
    _report(args, _settings(args))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastdms quality",
        description="Measure what eviction costs a checkpoint: the same tokens with eviction off and on, in the same "
        "engine. A prompt goes through prefill, the rest token by token through the decode path.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a hub id; none: the default model")
    parser.add_argument("--text", action="append", required=True, metavar="FILE", help="UTF-8; may be repeated")
    presets = "; ".join(
        f"{name}: {preset.context} tokens, {preset.prompt_tokens} of them prefilled" for name, preset in PRESETS.items()
    )
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="2k", help=f"{presets} (default 2k); options beside it win"
    )
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of a sequence")
    parser.add_argument("--prompt-tokens", type=int, metavar="TOKENS", help="how many of them are prefilled")
    parser.add_argument("--sequences", type=int, help="of each text, spread over it (default 4)")
    parser.add_argument("--rows", type=int, help="sequences that run at once (default 8)")
    parser.add_argument(
        "--prefill-points", type=int, metavar="N", help="prompt lengths for prefill alone; 0: skip that (default 8)"
    )
    parser.add_argument("--kv-dtype", nargs="+", dest="kv_dtypes", metavar="DTYPE", help="auto, fp32, bf16 or fp8")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; cuda where there is one")
    parser.add_argument("--dtype", help="of weights and computation: fp32, bf16 or fp16")
    parser.add_argument(
        "--transformers", action="store_true", help="also without the runtime: in transformers, fp32, under the mask"
    )
    parser.add_argument("--needle", action="store_true", help="also whether facts told far back are still found")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for quality.json, quality.md and the heat maps")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    names = ("context", "prompt_tokens", "sequences", "rows", "prefill_points", "kv_dtypes", "device", "dtype")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if "kv_dtypes" in given:
        given["kv_dtypes"] = tuple(given["kv_dtypes"])
    return replace(PRESETS[args.preset], **given)


def _report(args: argparse.Namespace, settings: Settings) -> None:
    import fastdms
    from fastdms.tools.quality.heatmap import new_figure
    from fastdms.tools.quality.masked import measure_masked, relative_differences
    from fastdms.tools.quality.measure import measure, open_subject
    from fastdms.tools.quality.needle import hide_needles, measure_needles
    from fastdms.tools.quality.report import document, markdown, write_report
    from fastdms.tools.quality.texts import read_texts

    # Whatever may be refused comes first, not after an hour.
    texts = read_texts(args.text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        new_figure((1, 1))
    source = fastdms.default_model() if args.model is None else args.model
    subject = open_subject(source, texts, settings)
    hidden = hide_needles(subject, texts) if args.needle else {}
    masked = measure_masked(subject) if args.transformers else []
    needles = measure_needles(subject, hidden) if args.needle else []
    results = measure(subject)
    if masked:
        exact = [result for result in results if (result["kv_dtype"], result["dtype"]) == ("fp32", "float32")]
        if not exact:
            in_fp32 = replace(settings, kv_dtypes=("fp32",), dtype="fp32", prefill_points=0)
            exact = measure(open_subject(source, texts, in_fp32))
        masked = [
            without | {"relative_differences": relative_differences(runtime, without)}
            for runtime, without in zip(exact, masked, strict=True)
        ]
    report = document(subject, results, masked, needles)
    print(markdown(report), end="")
    if args.out is not None:
        write_report(args.out, report)
