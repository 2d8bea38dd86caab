"""The text inside files that are neither HTML nor reStructuredText: novels, plays, game dialogue, R data."""

from __future__ import annotations

import re
import struct
import zlib

__all__ = ["dialogue_text", "plain_text", "r_novels", "story_text", "unwrapped"]


def plain_text(content: bytes) -> str:
    """Decode UTF-8, or Latin-1 where it isn't, as texts older than UTF-8 are."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def unwrapped(text: str) -> str:
    """Join the lines of each paragraph of prose that was wrapped at a fixed width; shorter lines stay as they are.

    A paragraph counts as wrapped if all its lines but the last are at least 50 characters long and start in one column.
    """
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in paragraph.strip("\n").splitlines()]
        starts = {len(line) - len(line.lstrip()) for line in lines[1:]}
        if len(starts) <= 1 and all(len(line.strip()) >= 50 for line in lines[:-1]):
            out.append(" ".join(line.strip() for line in lines))
        else:
            out.append("\n".join(lines))
    return "\n\n".join(p for p in out if p.strip())


def r_novels(content: bytes) -> str:
    """Return the character vectors of an R data file (``Rdata.rdb``), each as lines, unwrapped.

    Format: R Internals, "Serialization Formats": records of a big-endian length and a zlib stream in XDR; a string is a
    header whose low byte is 9 (CHARSXP), its length and its bytes, a vector of them has type 16 (STRSXP).

    Raises:
        ValueError: if the file holds anything but such vectors.
    """
    novels = []
    while content:
        stream = zlib.decompressobj()
        record = stream.decompress(content[4:])
        content = stream.unused_data
        header = record.find(b"\x00\x00\x00\x10", 0, 64)
        if not record.startswith(b"X\n") or header < 0:
            raise ValueError("R data: a record is no vector of strings")
        (count,) = struct.unpack_from(">i", record, header + 4)
        position, lines = header + 8, []
        for _ in range(count):
            kind, length = struct.unpack_from(">ii", record, position)
            if kind & 0xFF != 9:
                raise ValueError("R data: a vector of strings holds something else")
            lines.append(record[position + 8 : position + 8 + max(length, 0)].decode("utf-8"))
            position += 8 + max(length, 0)
        novels.append(unwrapped("\n".join(lines)))
    return "\n\n".join(novels)


def dialogue_text(markup: str) -> str:
    """Return the spoken and narrated lines of a Wesnoth scenario (WML), speakers' names before what they say."""
    out, speaker = [], ""
    for name, text in _WML.findall(re.sub(r"(?m)^\s*#.*$", "", markup)):
        if name:
            speaker = "" if name in _NO_NAMES else name.replace("_", " ")
            continue
        said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text.replace('""', '"'))).strip()
        if said:
            out.append(f"{speaker}: {said}" if speaker else said)
        speaker = ""
    return "\n\n".join(out)


_WML = re.compile(r'speaker\s*=\s*"?([^"\n{}$]+?)"?\s*\n|\b(?:message|story)\s*=\s*_\s*"((?:[^"]|"")*)"')
_NO_NAMES = {"narrator", "unit", "second_unit"}


def story_text(data: str) -> str:
    """Return the paragraphs of an Endless Sky data file: its conversations and descriptions, quoted with backticks."""
    out = []
    for block in re.split(r"\n(?=\S)", data):
        said = [text.strip() for text in re.findall(r"`([^`\n]+)`", block)]
        # Placeholders such as <planet> stand for names that only the game knows.
        if len(" ".join(said)) >= 200:
            out += [text for text in said if "<" not in text or text.count("<") == text.count("<ship>")]
    return "\n\n".join(text.replace("<ship>", "the ship") for text in out)
