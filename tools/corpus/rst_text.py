"""reStructuredText to plain text: what a reader of the rendered page would see, without its tables."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["rst_text"]

_CODE = {"code", "code-block", "console", "parsed-literal", "sourcecode"}
# Directives whose body is text of the page, with the words that the page shows before it.
_LABELS = {
    "admonition": "",
    "attention": "Attention:",
    "caution": "Caution:",
    "danger": "Danger:",
    "deprecated": "Deprecated in version",
    "hint": "Hint:",
    "important": "Important:",
    "note": "Note:",
    "seealso": "See also:",
    "tip": "Tip:",
    "topic": "",
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "warning": "Warning:",
}
# Directives that describe a name of a programming interface, which the page shows as code.
_NAMES = {"attribute", "class", "data", "decorator", "django-admin", "exception", "function", "method", "option"}
_DIRECTIVE = re.compile(r"\.\. (?:\w+:)?([\w-]+)::(?:\s+(.*))?$")
_BULLET = re.compile(r"\s*(?:[-*+•]|#\.|\(?(?:[A-Za-z]|\d{1,2})[.)])\s+(?=\S)")
_RULE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}$")
_TABLE = re.compile(r"\+[-=+]{3,}$|\|(.*\|)?$|={2,}( +={2,})+$")
_COLUMNS = re.compile(r"\S {3,}\S")
_FIELD = re.compile(r":[A-Za-z][\w ./-]*:(\s|$)")
_INLINE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r":pep:`(\d+)`", r"PEP \1"),
        (r":rfc:`(\d+)`", r"RFC \1"),
        (r":[\w:+-]+:`[!~]?([^`<]+?)\s*<[^`>]*>`", r"\1"),
        (r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`", r"\1"),
        (r":[\w:+-]+:`[!.]?([^`]*)`", r"\1"),
        (r"``(.+?)``", r"`\1`"),
        (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),
        (r"`([^`]+)`__?", r"\1"),
        (r"(?<![\w`])(\w+)_(?![\w`])", r"\1"),
        (r"\|([\w-]+)\|", r"\1"),
        (r"\*\*([^*]+)\*\*", r"\1"),
        (r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"\1"),
        (r"\s*\[[\w#*.-]+\]_", ""),
        (r"\\([ *`_|\\])", r"\1"),
        (r"^(\s*)#\. ", r"\1- "),
    )
)


def rst_text(markup: str) -> str:
    """Return the running text of a reStructuredText page; paragraphs become one line each, code keeps its lines.

    Syntax: the reStructuredText Markup Specification of docutils, and the directives and roles that Sphinx adds.
    """
    out: list[str] = []
    paragraph: list[str] = []

    def end_paragraph() -> None:
        if paragraph:
            text = " ".join([paragraph[0].rstrip(), *(line.strip() for line in paragraph[1:])])
            for pattern, replacement in _INLINE:
                text = pattern.sub(replacement, text)
            out.append(text)
            paragraph.clear()

    for is_code, line in _readable(markup.expandtabs(8).splitlines()):
        if is_code or not line.strip():
            end_paragraph()
            out.append(line.rstrip())
        else:
            if paragraph and not _continues(paragraph, line):
                end_paragraph()
            paragraph.append(line)
    end_paragraph()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _text_indent(line: str) -> int:
    bullet = _BULLET.match(line)
    return bullet.end() if bullet else _indent(line)


def _continues(paragraph: list[str], line: str) -> bool:
    """Whether a line goes on with the paragraph: in its column, no list item, and not a row of a table in spaces."""
    if _BULLET.match(line) or _COLUMNS.search(line) or _COLUMNS.search(paragraph[-1]):
        return False
    return _indent(line) == (_text_indent(paragraph[0]) if len(paragraph) == 1 else _indent(paragraph[-1]))


def _readable(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """Yield whether it is code, and the line, for each line that isn't markup alone."""
    skipped_indent: int | None = None
    code_indent: int | None = None
    in_options = False
    previous = ""
    for number, line in enumerate(lines):
        text, indent = line.strip(), _indent(line)
        if skipped_indent is not None and (not text or indent > skipped_indent):
            continue
        skipped_indent = None
        if in_options and text.startswith(":"):
            continue
        in_options = False
        if code_indent is not None and (not text or indent > code_indent):
            yield True, line
            continue
        code_indent = None
        if text == ".." or text.startswith((".. ", "__ ")):
            match = _DIRECTIVE.match(text)
            name, argument = (match[1], match[2] or "") if match else ("", "")
            in_options = name in _CODE or name in _LABELS or name in _NAMES
            if name in _CODE:
                code_indent = indent
            elif name in _LABELS:
                yield from _paragraph(indent, f"{_LABELS[name]} {argument}".strip())
            elif name in _NAMES:
                yield from _paragraph(indent, f"``{argument}``")
            else:
                skipped_indent = indent
            continue
        if _TABLE.search(text) or (indent == 0 and _FIELD.match(text)):
            continue
        is_overline = number + 2 < len(lines) and lines[number + 2].rstrip() == line.rstrip()
        if _RULE.match(text) and (previous or is_overline):
            previous = ""
            continue
        if text.endswith("::"):
            code_indent = _text_indent(line)
            line = "" if text == "::" else line.rstrip()[:-1]
        previous = text
        yield False, line


def _paragraph(indent: int, text: str) -> Iterator[tuple[bool, str]]:
    yield False, ""
    yield False, " " * indent + text
    yield False, ""
