"""``fastdms demo``: text from the default model through the compact cache, and what the cache held."""

from __future__ import annotations

import sys

from fastdms.cli.options import Parser

__all__ = ["main"]

_QUESTION = "Explain in a few sentences why the sky is blue."


def main(argv: list[str] | None = None) -> int:
    """Stream one answer, then print the KV report and a line that compares it with a dense cache."""
    parser = Parser(prog="fastdms demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", default=_QUESTION)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    import fastdms

    with fastdms.compile(fastdms.default_model(), max_context=2048, max_concurrency=1) as model:
        print(f"> {args.prompt}\n")
        for piece in model.stream(
            [{"role": "user", "content": args.prompt}], max_tokens=args.max_tokens, temperature=0
        ):
            print(piece.text, end="", flush=True)
        report = model.kv_report()
        print(f"\n\nKV cache ({str(model.options.kv_dtype).removeprefix('torch.')} pages):\n{report}")
        if model.dms is None:
            print("\nThis model has no trained eviction, so eviction is off and every token is kept.")
        size = report.bytes_in_use / report.dense_bytes
        sizes = f"{report.bytes_in_use:,} bytes in use; a dense bf16 cache would take {report.dense_bytes:,}"
        verdict = f"{size:.2f} times as much" if size >= 1 else f"{1 / size:.2f} times less"
        print(f"\nCompact cache: {sizes}, so this is {verdict}.")
    return 0


if __name__ == "__main__":
    from fastdms.cli import main as command_line

    sys.exit(command_line(["demo", *sys.argv[1:]]))
