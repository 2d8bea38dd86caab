"""``python -m fastdms.tools.quality.frontier DIR ...``: several checkpoints' ``fastdms quality`` side by side.

A row for each checkpoint, text and KV dtype; with ``--out``, a picture of KL divergence over the tokens kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdms.checkpoint.json_file import read_json_object
from fastdms.cli.options import Parser
from fastdms.tools.quality.heatmap import new_figure
from fastdms.tools.quality.report import table

__all__ = ["draw", "main", "read_points", "table_of"]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 2 and one line on stderr for a folder without a report or a picture that can't be drawn."""
    parser = Parser(prog="python -m fastdms.tools.quality.frontier", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what fastdms quality --out wrote")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where to draw the frontier")
    try:
        args = parser.parse_args(argv)
        points = read_points(args.folders)
        print(table_of(points))
        if args.out is not None:
            draw(args.out, points)
    except (ValueError, OSError, ImportError) as error:
        print(f"frontier: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def read_points(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The decode-path figures of each report, widest window and least compression first.

    Raises ValueError for a folder without a report, or whose report lacks something.
    """
    points = []
    for folder in folders:
        path = folder / "quality.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no quality.json; measure with fastdms quality --out {folder}")
        report = read_json_object(path)
        try:
            common = {
                "trained_for": report["dms"]["target_compression"],
                "card": report["card"],
                "commit": report["commit"],
            }
            read = [{**result, **common} for result in report["results"]]
            for point in read:
                _cells(point)
        except KeyError as error:
            raise ValueError(f"{path} is no report of fastdms quality: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no report of fastdms quality: {error}") from error
        points += read
    return sorted(points, key=_order)


def _order(point: dict[str, Any]) -> tuple[Any, ...]:
    same = (point["text"], point["kv_dtype"], point["context"], point["card"])
    return (*same, -point["window_tokens"], point["trained_for"] or 1.0)


def table_of(points: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line for each point, and under it the cards and commits."""
    head = (
        *("text", "KV dtype", "context", "card", "window"),
        *("trained for", "kept outside", "kept in all", "KLD", "match", "PPL change"),
    )
    measured = sorted({f"{p['card']} at commit {p['commit'] or 'unknown'}" for p in points})
    return f"{table(head, map(_cells, points))}\n\nMeasured on {'; '.join(measured)}."


def _cells(point: dict[str, Any]) -> tuple[str, ...]:
    decode = point["decode"]
    return (
        point["text"],
        point["kv_dtype"],
        f"{point['context']:,}",
        point["card"],
        f"{point['window_tokens']:,}",
        f"{point['trained_for']:g}x" if point["trained_for"] else "",
        f"{point['live_share_outside_window']:.1%}",
        f"{point['live_share']:.1%}",
        f"{decode['kld']:.4f}",
        f"{decode['greedy_match']:.1%}",
        f"{decode['perplexity_change']:+.2%}",
    )


def draw(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """KL divergence over the share of all tokens that is kept; what one line joins differs in nothing but training.

    Raises ImportError without matplotlib.
    """
    figure = new_figure((7.5, 5))
    axes = figure.add_subplot()
    for name, line in _lines(points).items():
        at = [(100 * point["live_share"], point["decode"]["kld"]) for point in line]
        axes.plot(*zip(*at, strict=True), marker="o", markersize=4, label=name)
        for point, (x, y) in zip(line, at, strict=True):
            if point["trained_for"]:
                axes.annotate(
                    f"{point['trained_for']:g}x", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8
                )
    axes.set(xlabel="tokens kept, % of the context", ylabel="KL(off || on), nats/token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def _lines(points: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        text, kv_dtype, context, card, window, *_ = _cells(point)
        lines.setdefault(f"{text}, {kv_dtype}, window {window}, context {context}, {card}", []).append(point)
    return lines


if __name__ == "__main__":
    sys.exit(main())
