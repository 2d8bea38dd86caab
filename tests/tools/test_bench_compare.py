"""``fastdms bench compare``: the differences of two profiles, and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdms.cli import main
from fastdms.tools.bench.compare import compare, differences, read_profiles


def _row(rows: int = 1, /, **kernels: float) -> dict[str, Any]:
    listed = [{"name": name, "launches": 1.0, "us": us, "added_us": us} for name, us in kernels.items()]
    whole = sum(kernels.values())
    facts = {"bench": "profile", "model": "tiny", "rows": rows, "context": 64, "mode": "eager"}
    return {**facts, "step_us": whole + 5.0, "idle_us": 5.0, "kernels": listed}


def _file(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_kernel_of_one_file_alone_counts_nothing_in_the_other() -> None:
    a, b = _row(same=3.0, faster=10.0, gone=4.0), _row(same=3.0, faster=7.5, new=20.0)
    assert differences(a, b) == [
        ("new", 0.0, 20.0, 20.0),
        ("gone", 4.0, 0.0, -4.0),
        ("faster", 10.0, 7.5, -2.5),
        ("same", 3.0, 3.0, 0.0),
    ]
    assert differences(b, a) == [(name, y, x, -difference) for name, x, y, difference in differences(a, b)]


def test_the_table_of_each_common_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _file(tmp_path / "a.json", {"bench": "decode"}, _row(1, x=1.0), _row(8, x=1000.0, y=2.0), _row(2, x=1.0))
    b = _file(tmp_path / "b.json", _row(8, x=900.0) | {"mode": "graphs"}, _row(1, x=1.5), _row(4, x=1.0))
    assert main(["bench", "compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny, 1 rows x 64",
        "     us in A      us in B   difference  kernel",
        "         6.0          6.5         +0.5  (step)",
        "         5.0          5.0         +0.0  (idle)",
        "         1.0          1.5         +0.5  x",
        "",
        "tiny, 8 rows x 64",
        "  mode: eager in A, graphs in B",
        "     us in A      us in B   difference  kernel",
        "     1,007.0        905.0       -102.0  (step)",
        "         5.0          5.0         +0.0  (idle)",
        "     1,000.0        900.0       -100.0  x",
        "         2.0          0.0         -2.0  y",
    ]


def test_the_last_profile_of_a_bucket_counts(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.json", _row(1, x=1.0), _row(1, x=2.0))
    assert read_profiles(file) == {("tiny", 1, 64): _row(1, x=2.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        '{"bench": "decode", "rows": 1}\n',
        "[1, 2]\n",
        "no json\n",
        '{"bench": "profile"}\n',
        json.dumps(_row(x=1.0) | {"kernels": [{"name": "x"}]}),
        json.dumps(_row(x=1.0) | {"rows": "1"}),
    ],
)
def test_a_file_without_profiles_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _file(tmp_path / "good.json", _row(x=1.0)), tmp_path / "bad.json"
    bad.write_text(text)
    for files in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=r"bad\.json .*; expected JSON lines that fastdms bench profile --json"):
            compare(*files)
        assert main(["bench", "compare", *map(str, files)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastdms: error: {bad} ")


def test_what_is_no_text_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (binary, tmp_path / "missing", tmp_path):
        assert main(["bench", "compare", str(file), str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line


def test_no_bucket_in_common(tmp_path: Path) -> None:
    a, b = _file(tmp_path / "a.json", _row(1, x=1.0)), _file(tmp_path / "b.json", _row(8, x=1.0))
    with pytest.raises(ValueError, match=r"no bucket .* in common: tiny 1 x 64 in the one, tiny 8 x 64 in the other"):
        compare(a, b)
