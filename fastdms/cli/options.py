"""The options that several commands share."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from fastdms.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastdms.runtime import CompiledModel

__all__ = ["Parser", "add_model_options", "add_sampling_options", "open_model", "sampling_params"]

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i?B)?", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ValueErrors, so that the command line reports all errors alike."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How to compile the model; what isn't given is left to ``fastdms.compile``."""
    group = parser.add_argument_group("model")
    group.add_argument("--dms", choices=("auto", "off"), help="auto: evict as the model was trained to; off: never")
    group.add_argument("--device", help="cpu, cuda or cuda:N; cuda where there is one")
    group.add_argument("--dtype", help="of weights and computation: fp32, bf16 or fp16")
    group.add_argument(
        "--weights",
        help="of the linear layers: auto (as --dtype, or as an int4 checkpoint stores them), bf16, fp8 or int4",
    )
    group.add_argument("--kv-dtype", help="of the KV cache: auto, fp32, bf16 or fp8")
    group.add_argument("--kv-memory", type=_memory, metavar="SIZE", help="for the cache: 512MiB, 2GB, or a share: 0.5")
    group.add_argument("--max-context", type=int, metavar="TOKENS", help="prompt and answer together")
    group.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="prompt tokens per step")
    group.add_argument("--mode", help="graphs, compile or eager")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Every field of ``SamplingParams``."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, help="0 takes the most likely token each time (default 1)")
    group.add_argument("--top-p", type=float, help="only the most likely tokens that together have this probability")
    group.add_argument("--top-k", type=int, help="only this many of the most likely tokens")
    group.add_argument("--min-p", type=float, help="only tokens with this share of the most likely one's probability")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="off the logit of each token of the output")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="the same, for each time that it is there")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="divides what is likely of prompt and output; 1: nothing"
    )
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="generate at most this many (%(default)s)")
    group.add_argument("--min-tokens", type=int, help="generate at least this many")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument(
        "--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID", help="end at this token"
    )
    group.add_argument("--seed", type=int, help="the same seed gives the same text again")
    group.add_argument("--ignore-eos", action="store_const", const=True, help="don't end where the model would")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the options say; ValueError names the field that is out of range."""
    return SamplingParams(**_given(args, tuple(SamplingParams.__dataclass_fields__)))


def open_model(args: argparse.Namespace) -> CompiledModel:
    """Compile ``args.model`` (None: the default model) for one request at a time."""
    import fastdms

    model = fastdms.default_model() if args.model is None else args.model
    names = ("dms", "device", "dtype", "weights", "kv_dtype", "kv_memory", "max_context", "prefill_chunk", "mode")
    compiled = fastdms.compile(model, max_concurrency=1, **_given(args, names))
    if compiled.dms is None and args.dms != "off":
        print("fastdms: this model has no trained eviction: its KV cache keeps every token", file=sys.stderr)
    return compiled


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _memory(text: str) -> int | float:
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, 512MiB, 2GB, or a share such as 0.5")
    number, unit = match[1], (match[2] or "").upper()
    if not unit:
        return float(number) if "." in number else int(number)
    base = 1024 if "I" in unit else 1000
    return int(float(number) * base ** ("KMGT".index(unit[0]) + 1))
