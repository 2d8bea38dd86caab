"""HTML to plain text: paragraphs, headings, lists and code, without navigation and tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["html_text"]

# What isn't one of these ends a paragraph.
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|q|s|samp|small|span|strike|strong|sub|"
    "sup|time|tt|u|var"
)
_SKIPPED = {"button", "footer", "form", "head", "header", "nav", "noscript", "script", "style", "svg", "table", "title"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
# Navigation that the generators of these packages write outside <nav>, and lines of code that their pages hide.
_SKIPPED_NAMES = {"banner", "book-navigation", "boring", "docnav", "headerlink", "menu-bar", "toc"}


def html_text(markup: str) -> str:
    """Return the running text of an HTML page, paragraphs separated by an empty line."""
    parser = _Reader()
    parser.feed(markup)
    parser.close()
    parser.end_paragraph()
    return "\n\n".join(parser.paragraphs)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._prefix = ""
        self._skipping: list[str] = []
        self._in_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br" and not self._skipping:
                self._pieces.append("\n")
            return
        names = " ".join(value or "" for key, value in attrs if key in ("class", "id")).split()
        if self._skipping or tag in _SKIPPED or _SKIPPED_NAMES.intersection(names):
            if not self._skipping and not _INLINE.fullmatch(tag):
                self.end_paragraph()
            self._skipping.append(tag)
            return
        if not _INLINE.fullmatch(tag):
            self.end_paragraph()
            self._prefix = "- " if tag == "li" else self._prefix
        self._in_pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            # A tag that nobody closed inside what is skipped ends with it.
            if tag in self._skipping:
                del self._skipping[len(self._skipping) - 1 - self._skipping[::-1].index(tag) :]
            return
        if not _INLINE.fullmatch(tag):
            self.end_paragraph()
            self._prefix = "" if tag == "li" else self._prefix
        self._in_pre -= tag == "pre" and self._in_pre > 0

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data if self._in_pre else re.sub(r"\s+", " ", data))

    def end_paragraph(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        text = text.strip("\n") if self._in_pre else re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip()
        if text.strip():
            self.paragraphs.append(self._prefix + text)
            self._prefix = ""
