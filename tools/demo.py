"""``fastdms demo``: text from the default model through the compact cache, and what the cache held.

A model that evicts retells a chapter of a novel, so that most tokens lie outside its window; any other answers a
question.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fastdms
from fastdms.cli.options import Parser

if TYPE_CHECKING:
    from fastdms.config import DMSConfig
    from fastdms.kv_report import KVReport

__all__ = ["main"]

PASSAGE = Path(fastdms.__file__).parent / "assets" / "demo.txt"
_TASK = "Tell this story again in your own words, in a few sentences."
_QUESTION = "Explain in a few sentences why the sky is blue."


def main(argv: list[str] | None = None) -> int:
    """Stream one answer, then print the KV report, what was evicted, and a comparison with a dense cache."""
    parser = Parser(prog="fastdms demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="ask this instead")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--heat-map",
        default="fastdms-live-share.png",
        metavar="PATH",
        help="where to draw what each layer and KV head kept, if the model evicts (%(default)s)",
    )
    args = parser.parse_args(argv)
    with fastdms.compile(fastdms.default_model(), max_context=4096, max_concurrency=1) as model:
        prompt = args.prompt
        if prompt is None and model.dms is not None:
            passage = PASSAGE.read_text(encoding="utf-8").strip()
            prompt = f"{passage}\n\n{_TASK}"
            title = passage.splitlines()[0].rstrip(".")
            print(f"{title} ... ({len(passage.split()):,} words: {PASSAGE})\n\n> {_TASK}\n", flush=True)
        else:
            prompt = prompt or _QUESTION
            print(f"> {prompt}\n", flush=True)
        for piece in model.stream([{"role": "user", "content": prompt}], max_tokens=args.max_tokens, temperature=0):
            print(piece.text, end="", flush=True)
        report = model.kv_report()
        print(f"\n\nKV cache ({str(model.options.kv_dtype).removeprefix('torch.')} pages):\n{report}\n")
        if model.dms is None:
            print("This model has no trained eviction, so eviction is off and every token is kept.\n")
        else:
            _show_eviction(report, model.dms, args.heat_map)
        size = report.bytes_in_use / report.dense_bytes
        sizes = f"{report.bytes_in_use:,} bytes in use; a dense bf16 cache would take {report.dense_bytes:,}"
        verdict = f"{size:.2f} times as much" if size >= 1 else f"{1 / size:.2f} times less"
        print(f"Compact cache: {sizes}, so this is {verdict}.")
    return 0


def _show_eviction(report: KVReport, rule: DMSConfig, heat_map: str) -> None:
    from fastdms.tools.quality.heatmap import save_heatmap
    from fastdms.tools.quality.metrics import live_share_outside_window

    if report.tokens <= rule.window_tokens + 1:
        print(f"All {report.tokens:,} tokens lie within the window of {rule.window_tokens:,}: nothing to evict yet.\n")
        return
    share = float(live_share_outside_window(report.live_tokens, report.tokens, rule.window_tokens).mean())
    trained = "" if rule.target_compression is None else f"; trained for {rule.target_compression:g}x"
    fewer = f"{1 / share:.1f}x fewer" if share else "none"
    print(
        f"Eviction: {share:.1%} of the tokens outside the window of {rule.window_tokens:,} are kept ({fewer}{trained})."
    )
    title = f"Share of {report.tokens:,} tokens kept in the KV cache (window {rule.window_tokens:,})"
    try:
        save_heatmap(heat_map, report.live_tokens / report.tokens, title)
        print(f"Heat map, layers x KV heads: {heat_map}\n")
    except (ImportError, OSError) as error:
        print(f"No heat map: {error}\n")


if __name__ == "__main__":
    from fastdms.cli import main as command_line

    sys.exit(command_line(["demo", *sys.argv[1:]]))
