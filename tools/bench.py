"""``fastdms bench``: tokens per second and KV bytes of the whole engine, on random weights of a published shape."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fastdms.cli.options import Parser

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """One JSON line for each concurrency on stdout; ValueError for arguments that can't be."""
    parser = Parser(prog="fastdms bench", description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b", help="llama-3.2-1b, qwen3-8b or tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=8192, help="prompt tokens of each row")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--kept", type=float, default=0.125, help="share of tokens to keep past the window; 1: no eviction"
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--mode", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    _check(args)
    for row in _measure(args):
        print(json.dumps(row), flush=True)
    return 0


def _check(args: argparse.Namespace) -> None:
    from fastdms.tools.shapes import SHAPES

    if args.shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {args.shape!r}")
    for name, least in (("context", 1), ("new_tokens", 2), ("repeats", 1), ("window", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0.0 < args.kept <= 1.0:
        raise ValueError(f"--kept must be in (0, 1], got {args.kept}")


def _measure(args: argparse.Namespace) -> Any:
    import torch

    from fastdms.tools.shapes import SHAPES, keep_share_rule, random_model

    config = SHAPES[args.shape]
    rule = keep_share_rule(config, args.kept, args.window)
    begin = time.perf_counter()
    model = random_model(
        config, rule, device=args.device, mode=args.mode, kv_dtype=args.kv_dtype,
        max_concurrency=max(args.concurrency), max_context=args.context + args.new_tokens,
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    cuda = model.options.device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
    with model:
        for rows in args.concurrency:
            shape = (rows, args.context)
            prompts = torch.randint(0, config.vocab_size, shape, generator=generator).tolist()
            _timed(model, prompts, 2)  # what is compiled or allocated at first use stays out of the figures
            firsts = [_timed(model, prompts, 1) for _ in range(args.repeats)]
            wholes = [_timed(model, prompts, args.new_tokens) for _ in range(args.repeats)]
            report = model.kv_report()
            step_s = (min(wholes) - min(firsts)) / max(1, args.new_tokens - 1)
            yield {
                "shape": args.shape,
                "rows": rows,
                "context": args.context,
                "new_tokens": args.new_tokens,
                "kept_asked": args.kept,
                "live_share": round(report.live_share, 4),
                "kv_dtype": str(model.options.kv_dtype).removeprefix("torch."),
                "mode": model.options.mode,
                "prefill_tok_s": round(rows * args.context / min(firsts), 1),
                "decode_tok_s": round(rows / step_s, 1),
                "step_ms": round(step_s * 1e3, 3),
                "start_s": round(start_s, 1),
                "kv_bytes": report.bytes_in_use,
                "kv_metadata_bytes": report.bytes_metadata,
                "kv_pool_bytes": report.bytes_pool,
                "dense_bf16_bytes": report.dense_bytes,
                "card": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__,
            }


def _timed(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    begin = time.perf_counter()
    model(prompts, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    from fastdms.cli import main as command_line

    sys.exit(command_line(["bench", *sys.argv[1:]]))
