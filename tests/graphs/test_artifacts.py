"""Artifacts on disk: a second start compiles nothing, and nothing that lies in the folder can spoil a start."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.compiler._cache import CacheArtifactManager

from fastdms.graphs import artifacts
from tests.graphs.start import start
from tests.source_tree import ROOT


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.artifacts")
    return file


def compile_something() -> None:
    torch.compile(lambda values: torch.sort(values).values, fullgraph=True)(torch.arange(3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a start leaves, as a file."""
    folder = tmp_path_factory.mktemp("saved")
    assert start(folder) == ("saved", 2)
    return the_file(folder).read_bytes()


def test_the_second_start_compiles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "not" / "there"
    assert start(folder) == ("saved", 2)
    made = the_file(folder).stat().st_mtime_ns
    for _ in range(2):
        assert start(folder) == ("loaded", 0)
    assert the_file(folder).stat().st_mtime_ns == made, "a warm start writes nothing"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", the_file(folder).name]
    assert folder.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().err == ""


def test_no_folder_no_artifacts() -> None:
    assert start(None) == ("off", 2)


def test_what_the_compiler_still_has_is_kept_too(tmp_path: Path) -> None:
    """The compiler's own cache may be warm while the folder is new."""
    with torch._inductor.utils.fresh_cache():
        for folder in (tmp_path / "a", tmp_path / "b"):
            graphs = artifacts.Artifacts(folder)
            with graphs.around([]):
                compile_something()
                torch._dynamo.reset()
            assert graphs.state == "saved"
    assert (tmp_path / "b" / the_file(tmp_path / "b").name).stat().st_size > 1000


def test_a_model_keeps_its_own_and_leaves_the_callers_alone(tmp_path: Path) -> None:
    """What the process compiled otherwise is neither in the file nor lost to ``save_cache_artifacts``."""
    with CacheArtifactManager.with_fresh_cache(), torch._inductor.utils.fresh_cache():
        compile_something()
        start(tmp_path)
        payload = the_file(tmp_path).read_bytes().partition(b"\n")[2]
        own = torch.compiler.load_cache_artifacts(payload)
        others = torch.compiler.save_cache_artifacts()
        torch._dynamo.reset()
    assert own is not None
    assert others is not None
    assert len(own.inductor_artifacts) == 2
    assert len(others[1].inductor_artifacts) == 1


@pytest.mark.parametrize("changed", [{"kv_dtype": "fp8"}, {"model": "other"}], ids=str)
def test_another_key_compiles_and_keeps_its_own(tmp_path: Path, changed: dict[str, object]) -> None:
    start(tmp_path)
    path = the_file(tmp_path)
    before = path.read_bytes()
    assert start(tmp_path, **changed) == ("saved", 2)
    assert len(list(tmp_path.glob("*.artifacts"))) == 2
    assert path.read_bytes() == before
    assert start(tmp_path) == start(tmp_path, **changed) == ("loaded", 0)


def rekeyed(data: bytes) -> bytes:
    header, _, payload = data.partition(b"\n")
    return json.dumps(json.loads(header) | {"keys": "those of another version"}).encode() + b"\n" + payload


def with_payload(data: bytes, payload: bytes) -> bytes:
    """Rightly signed."""
    header = json.loads(data.partition(b"\n")[0]) | {"sha256": hashlib.sha256(payload).hexdigest()}
    return json.dumps(header).encode() + b"\n" + payload


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "header only": lambda data: data[: data.index(b"\n") + 1],
    "garbage": lambda data: bytes(range(256)) * 40,
    "garbage of text": lambda data: b"5\nxyz",
    "header without digest": lambda data: b'{"keys": ""}\n' + data.partition(b"\n")[2],
    "one bit": lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
    "appended": lambda data: data + b"x",
    "other version": rekeyed,
    "signed garbage": lambda data: with_payload(data, b"\0" * 1000),
    "signed half": lambda data: with_payload(data, data.partition(b"\n")[2][:5000]),
    "signed nothing": lambda data: with_payload(data, b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_made_again(
    saved: bytes, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is not signed never reaches the compiler."""
    assert start(tmp_path) == ("saved", 2)
    path = the_file(tmp_path)
    bad = DAMAGE[damage](saved)
    assert bad != saved
    path.write_bytes(bad)
    capsys.readouterr()
    load = Mock(wraps=torch.compiler.load_cache_artifacts)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    assert start(tmp_path) == ("saved", 2)
    assert load.called == ("signed" in damage)
    assert path.read_bytes() != bad
    assert capsys.readouterr().err.count("\n") <= 1
    assert start(tmp_path) == ("loaded", 0)


def test_a_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "file"
    folder.write_text("mine")
    assert start(folder) == ("not saved", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("fastdms: the next start will compile again, as artifacts can't be written to ")
    assert folder.read_text() == "mine"


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was there stays whole, and no half of the new one is left."""
    start(tmp_path)
    before = the_file(tmp_path).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert start(tmp_path, model="other") == ("not saved", 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("No space left on device")
    assert the_file(tmp_path).read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_no_home(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert start(Path("~/x")) == ("not saved", 2)
    assert all("Could not determine home directory." in line for line in capsys.readouterr().err.splitlines())


def test_left_over_halves_and_the_oldest_files_go(tmp_path: Path) -> None:
    tmp_path.joinpath("tmpabc.part").write_text("half")
    for n in range(artifacts.MAX_FILES + 5):
        path = tmp_path / f"{n:03}.artifacts"
        path.write_text("old")
        os.utime(path, (1000 + n, 1000 + n))
    assert start(tmp_path)[0] == "saved"
    assert not list(tmp_path.glob("*.part"))
    names = sorted(path.name for path in tmp_path.glob("*.artifacts"))
    assert len(names) == artifacts.MAX_FILES
    assert "005.artifacts" not in names
    assert "006.artifacts" in names
    assert start(tmp_path) == ("loaded", 0)


def test_two_processes_that_start_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.graphs.start", str(tmp_path)]

    def launch() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    for process in [launch(), launch()]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert out.split() in (["saved", "2"], ["loaded", "0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", the_file(tmp_path).name]
    out, _ = launch().communicate(timeout=300)
    assert out.split() == ["loaded", "0"]


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    """Whoever reads sees the whole of what somebody wrote."""
    path, payloads = tmp_path / "x.artifacts", [bytes([n]) * (50_000 * n) for n in range(1, 5)]
    artifacts._write(path, [], payloads[0])
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(artifacts._write, path, [], payload) for _ in range(20) for payload in payloads]
        seen = set()
        while not all(writer.done() for writer in writers):
            seen.add(artifacts._read(path, []))
    assert [writer.exception() for writer in writers] == [None] * 80
    assert len(seen) > 1
    assert seen <= set(payloads)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "x.artifacts"]


def test_a_failed_warm_up_saves_nothing(tmp_path: Path) -> None:
    kept = artifacts.Artifacts(tmp_path)
    with pytest.raises(KeyError), kept.around([]):
        raise KeyError
    assert kept.state == "not saved"
    assert not list(tmp_path.iterdir())
    assert not artifacts._recording.locked()
