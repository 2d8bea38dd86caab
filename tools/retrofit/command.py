"""``fastdms retrofit``: train DMS into a Llama or Qwen checkpoint by logit distillation.

Text comes from .txt, .md and .jsonl files ("text" or "messages" in each line), folders of them, or
dataset:NAME[:SPLIT].
The result is OUT/final, a checkpoint in the public layout asked for; OUT/adapter.safetensors holds an adapter alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from fastdms.cli.options import Parser

__all__ = ["main"]

_HELP = {
    "layout": "adapter: the base stays frozen; nvidia or shisa: the borrowed query channel",
    "window_tokens": "tokens that stay visible whatever their flag",
    "target_compression": "tokens per token kept at the end of the run",
    "context": "tokens of a training sequence",
    "sequences": "sequences of a step",
    "micro_batch": "sequences that run at once; default: all",
    "zeroing_steps": "steps in which a borrowed channel fades",
    "ramp_steps": "steps in which the compression asked for rises",
    "anneal_steps": "steps at the target, with a falling learning rate",
    "learning_rate": "peak learning rate",
    "aux_weight": "weight of the pull towards the target",
    "tau_start": "temperature of the soft decisions at first",
    "tau_end": "and at last",
    "alpha_scale": "of the decision alpha_scale * s - alpha_offset > 0",
    "alpha_offset": "likewise",
    "trainable": "with a borrowed channel, part of the names of weights to train; may be repeated; default: all",
    "seed": "of text order and noise",
}


def main(argv: list[str] | None = None) -> int:
    """Print where the checkpoint is; ValueError for what can't be, KeyboardInterrupt once the state is saved."""
    args = _parser().parse_args(argv)
    import torch

    from fastdms.options import resolve_device
    from fastdms.tools.retrofit.runner import begin, resume
    from fastdms.tools.retrofit.settings import RetrofitSettings

    device = resolve_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    names = [field.name for field in fields(RetrofitSettings)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        if args.resume is not None:
            if args.model is not None or args.text or args.out is not None or given:
                raise ValueError("--resume takes model, text and settings from the run; give nothing besides --device")
            out, written = args.resume, resume(Path(args.resume), device)
        else:
            if args.out is None or not args.text:
                raise ValueError("--text and --out are needed (or --resume); see fastdms retrofit --help")
            if "trainable" in given:
                given["trainable"] = tuple(given["trainable"])
            settings = RetrofitSettings(**given)
            out, written = args.out, begin(args.model, args.text, Path(args.out), settings, device)
    except KeyboardInterrupt as stop:
        if stop.args:
            where = args.resume or args.out
            command = f"fastdms retrofit --resume {where}" + (f" --device {args.device}" if args.device else "")
            print(f"\nfastdms: {stop}; go on with: {command}", file=sys.stderr)
        raise
    print(f"{written}: the checkpoint; {out}: log, picture and settings of the run")
    return 0


def _parser() -> argparse.ArgumentParser:
    from fastdms.tools.retrofit.settings import RetrofitSettings

    parser = Parser(prog="fastdms retrofit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id of the base; none: that of the default model")
    parser.add_argument("--text", action="append", metavar="SOURCE", help="what to train on; may be repeated")
    parser.add_argument("--out", metavar="DIR", help="a new folder for the run and its result")
    parser.add_argument("--resume", metavar="DIR", help="go on with an interrupted run, exactly where it stopped")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; cuda where there is one")
    group = parser.add_argument_group("recipe")
    for field in fields(RetrofitSettings):
        flag, text = "--" + field.name.replace("_", "-"), _HELP[field.name]
        if field.name == "trainable":
            group.add_argument(flag, action="append", metavar="PART", help=text)
        elif field.default is None:
            group.add_argument(flag, type=int, help=text)
        else:
            group.add_argument(flag, type=type(field.default), help=f"{text} (default {field.default})")
    return parser


if __name__ == "__main__":
    from fastdms.cli import main as command_line

    sys.exit(command_line(["retrofit", *sys.argv[1:]]))
