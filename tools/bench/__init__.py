"""``fastdms bench``: what the engine and its kernels reach, beside the floor that memory bandwidth sets."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from fastdms.cli.options import Parser
from fastdms.tools.bench.settings import (
    COPY_TB_S,
    ENGINE,
    ENGINE_QUICK,
    KERNELS_QUICK,
    LINEARS,
    OPS,
    SPANS,
    WEIGHTS,
    EngineSettings,
    KernelSettings,
)

__all__ = ["main"]

DEFAULT_SHAPE = "llama-3.2-1b"
_WHAT = {
    "decode": "tokens per second of decoding, through the whole engine",
    "profile": "which kernels a decode step's time goes to",
    "prefill": "prompt tokens per second, by context",
    "start": "seconds to a ready model: cold, then with the caches of the compilers kept",
    "memory": "KV bytes in use against a dense bf16 cache, by context and kept share",
    "kernels": "single ops: microseconds, GB/s or TFLOP/s, share of the floor, peers",
}


def main(argv: list[str] | None = None) -> int:
    """One JSON line for each measurement on stdout, and to ``--json FILE``; ValueError for what can't be measured."""
    parser = Parser(prog="fastdms bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in _WHAT.items():
        command = commands.add_parser(name, help=text, description=f"Measure {text}.")
        (_add_kernel_options if name == "kernels" else _add_engine_options)(command)
        if name == "profile":
            command.add_argument("--html", type=Path, metavar="FILE", help="write a page with each step's timeline")
        if name == "decode":
            text = "a folder of Python packages with vLLM, to measure it first in a process of its own"
            command.add_argument("--peer", metavar="DIR", help=text)
        command.add_argument("--quick", action="store_true", help="small sizes on the CPU: under 3 minutes")
        command.add_argument("--device", help="cpu, cuda or cuda:N; cuda where there is one")
        command.add_argument("--repeats", type=int, help="how often each figure is measured")
        command.add_argument("--json", type=Path, metavar="FILE", help="append the JSON lines to this file")
        command.add_argument(
            "--bandwidth", type=float, dest="bandwidth_tb_s", metavar="TB/S",
            help=f"of the card, for the floor (default {COPY_TB_S}, a copy on an H100)",
        )  # fmt: skip
    text = "how two profiles differ, kernel by kernel"
    command = commands.add_parser("compare", help=text, description=f"Show {text}; of a bucket's profiles the last.")
    command.add_argument("a", type=Path, metavar="A.json", help="what fastdms bench profile --json wrote")
    command.add_argument("b", type=Path, metavar="B.json", help="the same of another run")
    args = parser.parse_args(argv)
    if args.what == "compare":
        from fastdms.tools.bench.compare import compare

        print(compare(args.a, args.b))
        return 0
    page = getattr(args, "html", None)
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise ValueError(f"--html {page} must be a file in a folder that exists")
    settings = _kernel_settings(args) if args.what == "kernels" else _engine_settings(args)
    with open(args.json, "a", encoding="utf-8") if args.json else nullcontext() as file:
        line = shlex.join(["fastdms", "bench", *(sys.argv[1:] if argv is None else argv)])
        measured = _report(args.what, settings, line, file)
    if page is not None:
        from fastdms.tools.bench.page import profile_page

        page.write_text(profile_page(measured), encoding="utf-8")
    return 0


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", help=f"random weights: llama-3.2-1b, qwen3-8b or tiny (default {DEFAULT_SHAPE})")
    parser.add_argument("--model", metavar="CHECKPOINT", help="a folder, hub id or GGUF file instead")
    parser.add_argument("--concurrency", type=int, nargs="+", metavar="ROWS", help="requests that run at once")
    parser.add_argument("--context", type=int, nargs="+", dest="contexts", metavar="TOKENS", help="of each prompt")
    parser.add_argument("--new-tokens", type=int, metavar="TOKENS", help="decoded after each prompt (default 128)")
    parser.add_argument(
        "--kept", type=float, nargs="+", metavar="SHARE", help="of the tokens past the window; 1: no eviction"
    )
    parser.add_argument("--window", type=int, dest="window_tokens", metavar="TOKENS", help="default 256")
    parser.add_argument("--kv-dtype", help="auto, fp32, bf16 or fp8")
    parser.add_argument("--weights", help="auto, bf16, fp8 or int4")
    parser.add_argument("--dtype", help="of weights and computation: fp32, bf16 or fp16")
    parser.add_argument("--dms", choices=("auto", "off"), help="off: never evict")
    parser.add_argument("--mode", help="graphs, compile or eager")
    parser.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="prompt tokens per step")
    parser.add_argument("--temperature", type=float, help="of the sampled tokens (default 0: the likeliest)")
    parser.add_argument("--top-k", type=int, metavar="TOKENS")
    parser.add_argument("--top-p", type=float, metavar="SHARE")


def _add_kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--spans", nargs="+", metavar="KIND", help=f"of {', '.join(SPANS)}")
    parser.add_argument("--rows", type=int, nargs="+", help="of a decode batch")
    parser.add_argument("--live", type=int, nargs="+", metavar="TOKENS", help="mean live tokens of a span")
    parser.add_argument("--length", type=int, nargs="+", dest="lengths", metavar="TOKENS", help="of a prompt")
    parser.add_argument(
        "--chunk", type=int, nargs="+", dest="chunks", metavar="TOKENS", help="time a prompt's last ones; 0: all of it"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", dest="head_dims", metavar="D")
    parser.add_argument("--kv-dtype", nargs="+", dest="kv_dtypes", metavar="DTYPE", help="fp8, bf16 or fp32")
    parser.add_argument(
        "--kept", type=float, nargs="+", metavar="SHARE",
        help="of the tokens past the window; given, decode_attention is timed beside spans that still hold all of them",
    )  # fmt: skip
    parser.add_argument("--linear", nargs="+", dest="linears", metavar="LAYER", help=f"of {', '.join(LINEARS)}")
    parser.add_argument("--weights", nargs="+", metavar="DTYPE", help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--kv-heads", type=int, help="default 8")
    parser.add_argument("--group", type=int, help="query heads of each KV head (default 4)")
    parser.add_argument("--window", type=int, dest="window_tokens", metavar="TOKENS", help="default 256")
    parser.add_argument("--page-size", type=int, metavar="TOKENS", help="default 64")
    parser.add_argument(
        "--peer", metavar="DIR", help="a folder of Python packages with flash-attn or vLLM, to time their kernels too"
    )
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, help="time no kernel that differs from its reference"
    )


def _engine_settings(args: argparse.Namespace) -> EngineSettings:
    chosen = dict(ENGINE[args.what])
    if args.quick:
        chosen |= {"device": "cpu"} | ENGINE_QUICK[args.what]
    chosen |= _given(args, EngineSettings)
    if args.model is None and args.shape is None:
        if args.quick:
            import fastdms

            chosen["model"] = str(fastdms.default_model())
        else:
            chosen["shape"] = DEFAULT_SHAPE
    if args.kept is None and (chosen.get("model") is not None or chosen.get("dms") == "off"):
        chosen["kept"] = None
    return EngineSettings(**chosen)  # type: ignore[arg-type]


def _kernel_settings(args: argparse.Namespace) -> KernelSettings:
    chosen: dict[str, Any] = {"device": "cpu"} | KERNELS_QUICK if args.quick else {}
    return KernelSettings(**chosen | _given(args, KernelSettings))


def _given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    names = [name for name in settings.__dataclass_fields__ if getattr(args, name, None) is not None]  # type: ignore[attr-defined]
    values = {name: getattr(args, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _report(what: str, settings: Any, command: str, file: IO[str] | None) -> list[dict[str, Any]]:
    from fastdms.tools.provenance import provenance

    known: dict[str, Any] = {}
    measured: list[dict[str, Any]] = []
    for row in _rows(what, settings):
        # After the first measurement, which has refused what can't be.
        known = known or provenance(settings.device, command)
        measured.append({"bench": what, **row, **known})
        line = json.dumps(measured[-1], allow_nan=False)
        print(line, flush=True)
        if file is not None:
            file.write(line + "\n")
            file.flush()
    if what == "kernels":
        from fastdms.tools.bench.kernels import table

        print(f"\n{table(measured)}")
    if what == "profile":
        from fastdms.tools.bench.profile import table as profile_table

        print(f"\n{profile_table(measured)}")
    return measured


def _rows(what: str, settings: Any) -> Iterable[dict[str, Any]]:
    if what == "kernels":
        from fastdms.tools.bench.kernels import measure_kernels

        return measure_kernels(settings)
    if what == "start":
        from fastdms.tools.bench.start import measure_starts

        return measure_starts(settings)
    from fastdms.tools.bench.engine import measure_engine

    return measure_engine(what, settings)
