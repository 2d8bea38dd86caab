"""``fastdms generate``: one prompt, one text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastdms.cli.options import Parser, add_model_options, add_sampling_options, open_model, sampling_params

if TYPE_CHECKING:
    from fastdms.completion import Completion
    from fastdms.runtime import CompiledModel

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """The text goes to stdout, all else to stderr."""
    args = _parser().parse_intermixed_args(argv)
    if len(args.words) > 2:
        raise ValueError(f"expected a model and a prompt, got {len(args.words)} arguments: quote the prompt")
    args.model, text = (None, *args.words) if len(args.words) == 1 else args.words
    if args.model is None and text and (Path(text).is_dir() or text.endswith(".gguf")):
        raise ValueError(f"{text} is a model and there is no prompt: fastdms generate MODEL PROMPT")
    params = sampling_params(args)
    if args.stream and args.logprobs is not None:
        raise ValueError("--logprobs can't be used with --stream")
    text = sys.stdin.read() if text == "-" else text
    messages = [{"role": "user", "content": text}]
    with open_model(args) as model:
        if sys.stdout.isatty() and args.logprobs is None if args.stream is None else args.stream:
            prompt = messages if args.chat else text
            for piece in model.stream(prompt, params, allow_control_tokens=args.allow_control_tokens):
                print(piece.text, end="", flush=True)
            print()
        else:
            if args.chat:
                completion = model.chat(messages, params, allow_control_tokens=args.allow_control_tokens)
            else:
                completion = cast("Completion", model(text, params))
            print(completion.text)
            _print_logprobs(model, completion)
        if args.kv:
            print(model.kv_report(), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastdms generate",
        usage="fastdms generate [MODEL] PROMPT [options]",
        description="Continue PROMPT; the text goes to stdout, all else to stderr.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[MODEL] PROMPT",
        help="MODEL: a folder, a .gguf file or a hub id, by default a small model that comes with a package; "
        "PROMPT: the text, or - to read it from stdin",
    )
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message to answer, not a text to continue")
    parser.add_argument("--allow-control-tokens", action="store_true", help="with --chat: don't disarm control tokens")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, help="show the text as it comes (terminals)")
    parser.add_argument("--kv", action="store_true", help="tell what the KV cache held")
    add_sampling_options(parser, max_tokens=256)
    parser.add_argument("--logprobs", type=int, metavar="N", help="list each token with the N most likely ones")
    add_model_options(parser)
    return parser


def _print_logprobs(model: CompiledModel, completion: Completion) -> None:
    """A line for each token: its log-probability, its text, then the most likely tokens at that place."""
    for token_id, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=False):
        shown = [(token_id, logprobs[token_id]), *sorted(logprobs.items(), key=lambda item: -item[1])]
        print("\t".join(f"{value:.4f} {_token_text(model, i)}" for i, value in shown))


def _token_text(model: CompiledModel, token_id: int) -> str:
    return str(token_id) if model.tokenizer is None else repr(model.tokenizer.decode([token_id]))
