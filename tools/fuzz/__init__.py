"""``fastdms fuzz``: random calls and histories of the ops, each held against the op's plain reference.

``fastdms fuzz --seed S --only H`` repeats history H of seed S alone. Processes with different seeds may share a GPU:
most of the time goes to the references, on the CPU.

A case is one span (row and KV head) of one op call, compared with the reference: integer state exactly, stored keys and
values exactly or within one rounding, outputs within twice the reference's own error against fp64 plus one rounding.
For sample and decode_linear a case is a row, for dense_attention a KV head, for soft_attention a (batch entry, KV
head), forward and backward apart, for dequantise a whole call, which must be exact. An invalid call is a case too: it
must raise ValueError and change nothing. Free slots are NaN, every buffer lies between guard elements, pools run dry in
the middle of a chunk.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16, for it rounds bf16 and fp8 wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdms.cli.options import Parser

if TYPE_CHECKING:
    import torch

    from fastdms.tools.fuzz.run import Outcome

__all__ = ["main"]

_SANITIZED_CASES = 300
_PROGRESS_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Print what was tried; returns 1 if an answer was wrong."""
    parser = Parser(
        prog="fastdms fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--ops", nargs="+", metavar="OP", help="try these only")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="stop after this long (default: 60)")
    length.add_argument("--cases", type=int, help="stop after this many cases")
    length.add_argument("--only", type=int, metavar="HISTORY", help="run this history of the seed alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--sanitize", action="store_true", help="a small run of each op under compute-sanitizer")
    args = parser.parse_args(argv)
    for name in ("seconds", "cases", "only", "seed"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name} must not be negative, got {value}")
    import torch

    from fastdms.tools.fuzz.calls import OPS

    ops = tuple(dict.fromkeys(args.ops or OPS))
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"there is no op {unknown[0]!r}; there are {', '.join(OPS)}")
    if args.sanitize:
        from fastdms.tools.fuzz.sanitize import sanitize

        return int(bool(sanitize(ops, cases=args.cases or _SANITIZED_CASES, seed=args.seed)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _prepare_triton(device)
    return _run(args, ops, device)


def _prepare_triton(device: torch.device) -> None:
    """Have Triton interpret kernels on the CPU, which it decides when it is imported."""
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device; --device cpu runs the kernels in Triton's interpreter")
        if interpreted:
            raise ValueError("TRITON_INTERPRET is set: kernels would not run on the CUDA device; unset it")
    elif not interpreted:
        if "triton" in sys.modules:
            raise ValueError("Triton is loaded already, as a compiler: --device cpu needs a process of its own")
        os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401  (an ImportError now, rather than as an op's wrong answer)


def _run(args: argparse.Namespace, ops: tuple[str, ...], device: torch.device) -> int:
    import torch

    from fastdms.tools.fuzz.run import fuzz

    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, in Triton's interpreter"
    print(f"{', '.join(ops)} on {name}, seed {args.seed}", flush=True)
    endless = args.cases is None and args.only is None and args.seconds is None
    shown = [time.monotonic()]

    def report(outcome: Outcome) -> None:
        if time.monotonic() - shown[0] >= _PROGRESS_SECONDS:
            shown[0] = time.monotonic()
            print(_summary(outcome), file=sys.stderr, flush=True)

    outcome = fuzz(
        ops, device, seed=args.seed, seconds=60.0 if endless else args.seconds, cases=args.cases, only=args.only,
        report=report,
    )  # fmt: skip
    for op in ops:
        refused = outcome.tally.rejected[op]
        print(f"  {op:<18} {outcome.tally.cases[op]:>12,} cases, {refused:,} invalid calls refused")
    print(_summary(outcome))
    for wrong in outcome.wrong:
        print(f"\nWRONG: {wrong.op}: {wrong.message}")
        print(f"  largest difference {wrong.difference:.6g}; history {wrong.history}")
        print("  " + ", ".join(f"{field}={value}" for field, value in wrong.setting.items()))
        chosen = f" --ops {' '.join(args.ops)}" if args.ops else ""
        print(f"  fastdms fuzz --device {device.type} --seed {args.seed}{chosen} --only {wrong.history}")
    if args.json:
        args.json.write_text(json.dumps(_as_json(outcome, ops, name, args.seed), indent=2) + "\n", encoding="utf-8")
    return int(bool(outcome.wrong))


def _summary(outcome: Outcome) -> str:
    total = outcome.tally.total
    rate = total / max(outcome.seconds, 1e-9)
    return (
        f"{total:,} cases in {outcome.histories:,} histories and {outcome.seconds:.1f} s ({rate:,.0f} cases/s); "
        f"{len(outcome.wrong)} histories with a wrong answer"
    )


def _as_json(outcome: Outcome, ops: tuple[str, ...], name: str, seed: int) -> dict[str, Any]:
    import torch
    import triton

    return {
        "device": name,
        "seed": seed,
        "seconds": outcome.seconds,
        "histories": outcome.histories,
        "cases": {op: outcome.tally.cases[op] for op in ops},
        "rejected": {op: outcome.tally.rejected[op] for op in ops},
        "wrong": [{field: getattr(wrong, field) for field in wrong.__slots__} for wrong in outcome.wrong],
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
