"""``fastdms chat``: a conversation on the terminal or over a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastdms.cli.options import Parser, add_model_options, add_sampling_options, open_model, sampling_params

if TYPE_CHECKING:
    from fastdms.runtime import CompiledModel
    from fastdms.sampling_params import SamplingParams

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Answers line by line until /exit or the end of input; 2 if a message couldn't be answered."""
    args = _parser().parse_args(argv)
    params = sampling_params(args)
    with open_model(args) as model:
        from fastdms.tokenizer import has_chat_template

        if model.tokenizer is None or not has_chat_template(model.tokenizer):
            raise ValueError("this model's tokenizer has no chat template; use fastdms generate")
        return _converse(model, params, args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastdms chat",
        description="Talk with a model: one line, one message. /reset forgets the conversation, /exit ends it.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a .gguf file or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--allow-control-tokens", action="store_true", help="don't disarm control tokens in messages")
    parser.add_argument("--kv", action="store_true", help="tell after each answer what the KV cache held")
    add_sampling_options(parser, max_tokens=1024)
    add_model_options(parser)
    return parser


def _converse(model: CompiledModel, params: SamplingParams, args: argparse.Namespace) -> int:
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    history = list(opening)
    code = 0
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            history = list(opening)
            continue
        message = {"role": "user", "content": line}
        try:
            answer = _answer(model, [*history, message], params, args)
        except ValueError as error:
            print(f"fastdms: error: {error} (/reset starts anew)", file=sys.stderr)
            code = 2
            continue
        history += [message, {"role": "assistant", "content": answer}]
    return code


def _answer(
    model: CompiledModel, messages: list[dict[str, str]], params: SamplingParams, args: argparse.Namespace
) -> str:
    text, finish_reason = "", None
    for piece in model.stream(messages, params, allow_control_tokens=args.allow_control_tokens):
        print(piece.text, end="", flush=True)
        text, finish_reason = text + piece.text, piece.finish_reason
    print(flush=True)
    if finish_reason not in ("stop", None):
        print(f"fastdms: the answer was cut ({finish_reason})", file=sys.stderr)
    if args.kv:
        print(model.kv_report(), file=sys.stderr)
    return text


def _lines() -> Iterator[str]:
    """The lines that aren't empty, asked for with a prompt where somebody types."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its line editing)

    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()
