"""Several quality reports side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdms.tools.quality.frontier import _lines, main, read_points
from tests.source_tree import ROOT


def _report(folder: Path, window: int, target: float | None, kld: float, live: float, **other: Any) -> str:
    """A report's folder; other: ``context``, ``card`` or ``commit``."""
    decode = {"kld": kld, "greedy_match": 0.9, "perplexity_change": 0.0123}
    result = {
        "text": "prose", "kv_dtype": "fp32", "window_tokens": window, "context": other.pop("context", 2048),
        "live_share": live, "live_share_outside_window": live / 2, "decode": decode,
    }  # fmt: skip
    report = {"dms": {"target_compression": target}, "card": "cpu", "commit": "abc", "results": [result]} | other
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps(report))
    return str(folder)


def test_rows_are_sorted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        _report(tmp_path / "a", 128, 8.0, 0.03, 0.2),
        _report(tmp_path / "b", 256, 8.0, 0.02, 0.3),
        _report(tmp_path / "c", 256, 2.0, 0.01, 0.5),
        _report(tmp_path / "d", 256, None, 0.0, 1.0),
        _report(tmp_path / "e", 256, 2.0, 0.04, 0.4, context=8192),
        _report(tmp_path / "f", 256, 2.0, 0.05, 0.5, card="H100", commit=None),
    ]
    picture = tmp_path / "frontier.png"
    assert main([*folders, "--out", str(picture)]) == 0
    *table, empty, measured = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in row.split("|")[3:-3]] for row in table[2:]] == [
        ["2,048", "H100", "256", "2x", "25.0%", "50.0%", "0.0500"],
        ["2,048", "cpu", "256", "", "50.0%", "100.0%", "0.0000"],
        ["2,048", "cpu", "256", "2x", "25.0%", "50.0%", "0.0100"],
        ["2,048", "cpu", "256", "8x", "15.0%", "30.0%", "0.0200"],
        ["2,048", "cpu", "128", "8x", "10.0%", "20.0%", "0.0300"],
        ["8,192", "cpu", "256", "2x", "20.0%", "40.0%", "0.0400"],
    ]
    assert (empty, measured) == ("", "Measured on H100 at commit unknown; cpu at commit abc.")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_line_joins_what_differs_in_nothing_but_training(tmp_path: Path) -> None:
    _report(tmp_path / "a", 256, 2.0, 0.01, 0.5)
    _report(tmp_path / "b", 256, 8.0, 0.02, 0.3)
    _report(tmp_path / "c", 256, 8.0, 0.03, 0.3, context=8192)
    _report(tmp_path / "d", 256, 8.0, 0.04, 0.3, card="H100")
    _report(tmp_path / "e", 128, 8.0, 0.05, 0.3)
    lines = _lines(read_points([tmp_path / name for name in "abcde"]))
    assert sorted([point["decode"]["kld"] for point in line] for line in lines.values()) == [
        [0.01, 0.02],
        [0.03],
        [0.04],
        [0.05],
    ]


@pytest.mark.parametrize("name", ["text", "context", "kv_dtype", "window_tokens", "live_share", "decode"])
def test_a_report_that_lacks_something_is_named(name: str, tmp_path: Path) -> None:
    path = Path(_report(tmp_path / "a", 256, 2.0, 0.01, 0.5)) / "quality.json"
    report = json.loads(path.read_text())
    del report["results"][0][name]
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"a/quality\.json is no report of fastdms quality: '{name}' is missing"):
        read_points([tmp_path / "a"])


def test_what_is_no_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in [
        (None, "holds no quality.json; measure with fastdms quality"),
        ('{"results": [{}], "dms": {}, "card": "cpu", "commit": null}', "'target_compression' is missing"),
        ('{"results": ["x"], "dms": {"target_compression": 2}, "card": "cpu", "commit": null}', "is no report"),
    ]:
        if content is not None:
            (tmp_path / "quality.json").write_text(content)
        assert main([str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("frontier: ")
        assert message in line


def test_as_a_module_it_ends_with_one_line_and_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdms.tools.quality.frontier", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
