"""The corpus: what is kept of a page, the same bytes from the same packages, and one line for what can't be had."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastdms.tools.corpus import SOURCES, Package, Source, build_corpus, source_text
from fastdms.tools.corpus import __main__ as command
from fastdms.tools.corpus.fetch import fetch, files_of
from fastdms.tools.corpus.filters import cleaned, normalised, sampled
from fastdms.tools.corpus.formats import dialogue_text, plain_text, r_novels, story_text, unwrapped
from fastdms.tools.corpus.html_text import html_text
from fastdms.tools.corpus.rst_text import rst_text

PROSE = "It is a truth that the text of this page is long enough to be kept, for it has to be; " * 6 + "so it is."


def test_html_keeps_text_lists_and_code() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><nav><ul><li>Home</li></ul></nav>
      <div class="docnav">Prev</div><h1>A &amp; B</h1><p>One <b>bold</b>
      line.<br>Next line.</p><ul class="big"><li>first</li><li><p>second</p></li></ul>
      <pre>if x:
    y()</pre><table><tr><td>1</td></tr></table><p>End<p>Unclosed</body></html>"""
    assert html_text(page).split("\n\n") == [
        "A & B",
        "One bold line.\nNext line.",
        "- first",
        "- second",
        "if x:\n    y()",
        "End",
        "Unclosed",
    ]


def test_html_skips_hidden_lines_of_code_and_unclosed_tags_in_navigation() -> None:
    assert html_text('<pre><span class="boring">fn main() {\n</span>let x = 1;</pre>') == "let x = 1;"
    assert html_text('<div class="toc"><dl><dt>One</div><p>Text</p>') == "Text"
    assert html_text("<ul><li><button>Light</button></li></ul><h1>Title</h1>") == "Title"


RST = """\
.. SPDX-License-Identifier: GPL-2.0

.. _label:

=======
Heading
=======

:Author: Somebody

A paragraph that the :ref:`reader <target>` sees, with ``code``,
*emphasis*, **weight**, :class:`~module.Name` and a `link <there>`_
to |project|.

.. toctree::
   :maxdepth: 1

   other-page

Section
-------

#. First item, which
   goes on.
#. Second, see :rfc:`2119`.

Run this::

    $ make  *all*

    $ make  test

.. note:: Beware.

   The body.

.. code-block:: python
   :linenos:

   x = "``kept``"

.. function:: open(path)

   Opens ``path``.

===== =====
a     b
===== =====

term
    Its definition,
    in two lines.
"""


def test_rst_is_what_a_reader_sees() -> None:
    assert rst_text(RST).split("\n\n") == [
        "Heading",
        "A paragraph that the reader sees, with `code`, emphasis, weight, Name and a link to project.",
        "Section",
        "- First item, which goes on.\n- Second, see RFC 2119.",
        "Run this:",
        "    $ make  *all*",
        "    $ make  test",
        "Note: Beware.",
        "   The body.",
        '   x = "``kept``"',
        "`open(path)`",
        "   Opens `path`.",
        "a     b",
        "term\n    Its definition, in two lines.",
    ]


def test_rst_code_ends_with_its_indent() -> None:
    assert rst_text("* item::\n\n      code  one\n\n  goes\n  on\n\nafter\nit. End.") == (
        "* item:\n\n      code  one\n\n  goes on\n\nafter it. End."
    )


def test_rst_tables_in_spaces_keep_their_lines() -> None:
    rows = "Attributes of the sensor, which is\nin1_input   Measured voltage.\nin1_max     Highest voltage.\nMore."
    assert rst_text(rows) == rows


def test_unwrapped_joins_prose_but_no_verse() -> None:
    prose = "These lines were broken where a line of text was full,\nas prose is in old files."
    verse = "Of Man's First Disobedience, and the Fruit\nOf that Forbidden Tree, whose mortal tast"
    assert unwrapped(f"{prose}\n\n\n{verse}\n") == prose.replace("\n", " ") + "\n\n" + verse


def _rdb(*vectors: list[str], kind: int = 9) -> bytes:
    data = b""
    for lines in vectors:
        record = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
        record += b"".join(struct.pack(">ii", 0x40000 | kind, len(s.encode())) + s.encode() for s in lines)
        data += struct.pack(">I", len(record)) + zlib.compress(record)
    return data


def test_r_data_gives_its_lines() -> None:
    assert r_novels(_rdb(["EMMA", "", "“Yes,” she said."], ["PERSUASION"])) == "EMMA\n\n“Yes,” she said.\n\nPERSUASION"
    with pytest.raises(ValueError, match="vector of strings holds something else"):
        r_novels(_rdb(["EMMA"], kind=10))
    with pytest.raises(ValueError, match="a record is no vector of strings"):
        r_novels(struct.pack(">I", 4) + zlib.compress(b"RDX3"))


def test_game_dialogue_names_its_speakers() -> None:
    scenario = """
    # message= _ "a comment"
    [message]
        speaker=Mal_Kevek
        message= _ "He said ""no""."
    [/message]
    [message]
        speaker=narrator
        message= _ "<i>Night
        fell.</i>"
    [/message]
    story=_"Long ago."
    name= _ "Not spoken"
    """
    assert dialogue_text(scenario).split("\n\n") == ['Mal Kevek: He said "no".', "Night fell.", "Long ago."]


def test_game_stories_come_without_placeholders() -> None:
    told = "You land, and the captain of the other vessel walks up to you. " * 4
    lines = ["name `B`", "conversation", f"\t`{told}`", "\t`\tAboard <ship>, all is well.`", "\t`To <planet>.`"]
    data = 'mission "A"\n' + "".join(f"\t{line}\n" for line in lines)
    short = "\nship `Shuttle`\n\tdescription `Small.`\n"
    assert story_text(data + short).split("\n\n") == ["B", told.strip(), "Aboard the ship, all is well."]


def test_text_older_than_utf8_is_read() -> None:
    assert plain_text("\ufeffcafé".encode()) == plain_text("café".encode("latin-1")) == "café"


def test_normalised_text_has_plain_characters() -> None:
    assert normalised("\n\ncafe\u0301\xa0\u200bau  \r\nlait\x00\ufffd\t\r\n") == "café au\nlait"


def test_cleaning_drops_data_and_a_third_repeat() -> None:
    table = "\n".join(f"0x{i:04x} {i * 977:8d} {i * 31:6d}" for i in range(12))
    licence = "Permission is hereby granted to any person who has a copy of this to use it as it is."
    census = "\n".join(f"Montgomery county {229363 + i}" for i in range(12))
    drawing = "\n".join(["+-----+    /---\\ ==> |cpu|", "| bus | -->|   |"] * 4)
    blob = "QUJD" * 40
    seen: Counter[str] = Counter()
    page = "\n\n".join([PROSE, licence, table, census, drawing, blob, "Short."])
    assert cleaned(page, seen).split("\n\n") == [PROSE, licence, "Short."]
    assert licence in cleaned(f"{licence}\n\n{PROSE} 2", seen)
    assert licence not in cleaned(f"{licence}\n\n{PROSE} 3", seen)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "Too short to be of use.",
        "Les sanglots longs des violons de l'automne blessent mon coeur d'une langueur monotone. " * 6,
    ],
)
def test_cleaning_drops_what_is_short_or_not_english(document: str) -> None:
    assert cleaned(document, Counter()) == ""


def test_samples_are_whole_documents_in_order_within_the_limit() -> None:
    documents = [f"{i:02d}" + "é" * 9 for i in range(40)]
    chosen = sampled(documents, 200)
    assert len(chosen) == 10
    assert chosen == sorted(chosen)
    assert chosen != documents[:10]
    assert chosen == sampled(documents, 200)
    assert sampled(documents, None) == documents


def test_code_is_taken_as_it_is() -> None:
    source = _source(is_code=True)
    assert source_text(source, [b"x = 0x123\r\n", b"", b"y = 2\n"]) == "x = 0x123\n\n\ny = 2\n"


def test_the_table_keeps_held_out_text_out_of_training() -> None:
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert {source.role for source in SOURCES} == {"train", "held-out"}
    files = {
        role: {(p.name, f) for s in SOURCES if s.role == role for p in s.packages for f in s.files} for role in ROLES
    }
    assert not files["train"] & files["held-out"]
    for source in SOURCES:
        assert source.packages
        assert source.licence
        assert re.fullmatch(r"[a-z-]+", source.name)
        for package in source.packages:
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256), package
            assert "://" not in f"{package}{source.title}"


ROLES = ("train", "held-out")
TEXT = f"{PROSE}\n\nThe second paragraph of it."


def _archive(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


ARCHIVE = _archive(
    {"./b/two.txt": f"{TEXT} 2", "./a/one.txt": f"{TEXT} 1", "./a/index.txt": TEXT, "./a/one.png": "PNG"}
)
NPM = Package(registry="npm", name="@scope/words", version="1.0.0", sha256=hashlib.sha256(ARCHIVE).hexdigest())
DEBIAN = replace(NPM, registry="debian", name="words", version="1:2-3")


def _source(**changes: object) -> Source:
    source = Source(
        name="words",
        title="Words",
        role="held-out",
        packages=(NPM,),
        files=("*.txt", "!*/index.txt"),
        read=plain_text,
        licence="MIT",
    )
    return replace(source, **changes)  # type: ignore[arg-type]


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins of the clients; nothing else is on the PATH but the shell's tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "archive").write_bytes(ARCHIVE)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def _client(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nhere={folder}\n{script}\n")
    path.chmod(0o755)


def test_a_package_is_fetched_once_and_its_files_are_in_order(tmp_path: Path, clients: Path) -> None:
    _client(clients, "npm", 'echo "$@" >> $here/calls; cp $here/archive scope-words-1.0.0.tgz')
    for _ in range(2):
        package, archive = fetch(NPM, tmp_path / "packages")
    assert package == NPM
    assert (clients / "calls").read_text() == "pack @scope/words@1.0.0\n"
    assert files_of(archive, ("*.txt", "!*/index.txt")) == [f"{TEXT} 1".encode(), f"{TEXT} 2".encode()]


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, clients: Path) -> None:
    _client(clients, "npm", "cp $here/archive scope-words-1.0.0.tgz")
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        (text,) = build_corpus([_source()], folder, folder / "packages")
        data = (folder / "held-out" / "words.txt").read_bytes()
        assert (text.num_bytes, text.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        written.append((data, (folder / "SOURCES.md").read_bytes()))
    assert written[0] == written[1]
    assert written[0][0].decode() == f"{TEXT} 1\n\n\n{TEXT} 2\n"
    assert f"| words | held-out | Words | @scope/words 1.0.0 (npm) | MIT | {len(written[0][0]):,} |" in (
        written[0][1].decode()
    )


def test_another_archive_than_the_tables_is_refused(tmp_path: Path, clients: Path) -> None:
    _client(clients, "npm", "echo other > scope-words-1.0.0.tgz")
    with pytest.raises(ValueError, match=rf"@scope/words 1.0.0 \(npm\) has {NPM.sha256}; delete it"):
        fetch(NPM, tmp_path)


def test_a_debian_update_comes_in_place_of_the_version(
    tmp_path: Path, clients: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = 'case "$2" in *=*) echo "E: no such version" >&2; exit 100;; esac'
    _client(clients, "apt-get", f"{gone}; cp $here/archive words_1%3a2-4_all.deb")
    _client(clients, "dpkg-deb", 'cat "$2"')
    monkeypatch.setattr(command, "SOURCES", [_source(packages=(DEBIAN,))])
    assert command.main([str(tmp_path / "corpus")]) == 0
    assert "words 1:2-3 (Debian 12) is no longer offered; read words 1:2-4" in capsys.readouterr().err
    assert "| words 1:2-4 (Debian 12) | MIT |" in (tmp_path / "corpus" / "SOURCES.md").read_text()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "@scope/words 1.0.0 (npm) is fetched with npm, which isn't installed"),
        ("echo first; echo 'E404 not found' >&2; exit 1", "npm pack @scope/words@1.0.0: E404 not found"),
        ("touch one two", "holds 2 files where one archive is expected"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    tmp_path: Path,
    clients: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(clients) if script is None else f"{clients}:/usr/bin:/bin")
    if script is not None:
        _client(clients, "npm", script)
    monkeypatch.setattr(command, "SOURCES", [_source()])
    assert command.main([str(tmp_path / "corpus")]) == 2
    assert message in capsys.readouterr().err


def test_a_source_without_text_and_a_broken_archive_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"words: no text in @scope/words 1.0.0 \(npm\), files \*.txt"):
        source_text(_source(), [b"short"])
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"broken\.tgz can't be read"):
        files_of(broken, ("*",))
