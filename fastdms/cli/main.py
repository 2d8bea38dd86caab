"""Finds the command and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from fastdms import __version__

__all__ = ["main"]

COMMANDS = {
    "generate": "continue a text, or answer one message",
    "chat": "talk with a model",
    "inspect": "show a model's shape, its DMS layout and its KV memory per token",
}
# The name on the command line, the module whose main(argv) it runs, and what it does.
TOOLS = {
    "bench": ("fastdms.tools.bench", "measure tokens per second, KV bytes, start and kernels beside their floor"),
    "demo": ("fastdms.tools.demo", "retell a chapter through the compact cache and show what was kept"),
    "retrofit": ("fastdms.tools.retrofit.command", "train DMS into a checkpoint by logit distillation"),
    "quantise": ("fastdms.tools.quantise", "write a checkpoint with int4 weights, as llm-compressor stores them"),
    "kv-error": (
        "fastdms.tools.kv_error",
        "measure how far each KV dtype, fp8 and int4 weights move a model's logits",
    ),
    "fuzz": ("fastdms.tools.fuzz", "throw random inputs at the operations until time is up"),
    "quality": ("fastdms.tools.quality", "measure what eviction costs: KLD, greedy match, perplexity, live share"),
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 when interrupted, 141 when nobody reads on."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    # A character that the terminal can't show is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        print(f"fastdms: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(done.code is not None)


def _dispatch(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help", ""):
        print(_help())
        return 0 if name else EXIT_BAD_INPUT
    if name == "--version":
        print(f"fastdms {__version__}")
        return 0
    if name in COMMANDS:
        run: Any = importlib.import_module(f"fastdms.cli.{name}").run
    elif name in TOOLS:
        run = importlib.import_module(TOOLS[name][0]).main
    else:
        raise ValueError(f"there is no command {name!r}; there are {', '.join([*COMMANDS, *TOOLS])}")
    return int(run(rest) or 0)


def _help() -> str:
    lines = ["usage: fastdms COMMAND [options]", "", "Language models with a learned-sparse KV cache.", ""]
    for name, text in [*COMMANDS.items(), *((name, tool[1]) for name, tool in TOOLS.items())]:
        lines.append(f"  {name:<10} {text}")
    return "\n".join([*lines, "", "fastdms COMMAND --help tells more; --version shows the version."])


def _discard_stdout() -> None:
    """Python flushes stdout once more when it exits, which would complain again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
