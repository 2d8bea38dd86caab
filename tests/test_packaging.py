"""What is shipped, and that it imports where Triton or a GPU is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.models import save_checkpoint, tiny_model, tiny_tokens
from tests.source_tree import LINKED, ROOT, package_files

MAX_LINES = 400
NOT_SHIPPED = (".md",)

IMPORT_ALL = """
import importlib, pkgutil, sys
import fastdms
for found in pkgutil.walk_packages(fastdms.__path__, "fastdms."):
    if found.name.endswith(".__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        kernel = found.name.startswith("fastdms.ops.") and not found.ispkg
        if not (kernel and sys.modules.get("triton", 0) is None and (error.name or "").startswith("triton")):
            raise
"""
BLOCK_OPTIONAL = """
import sys
for name in ("triton", "gguf", "flash_attn", "accelerate"):
    sys.modules[name] = None
"""
RECORD_DEFINITIONS = """
import collections, torch
defined = collections.Counter()
define = torch.library.Library.define
def recorded(self, schema, *args, **kwargs):
    defined[self.ns + "::" + schema.partition("(")[0]] += 1
    return define(self, schema, *args, **kwargs)
torch.library.Library.define = recorded
"""
CHECK_DEFINITIONS = """
import pathlib
ours = {name: count for name, count in defined.items() if name.startswith("fastdms::")}
assert ours and set(ours.values()) == {1}, ours
files = [pathlib.Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
folders = [pathlib.Path.cwd() / name for name in ("fastdms", "ops", "graphs", "tools")]
loaded = collections.Counter(str(f) for f in files if any(f.is_relative_to(folder) for folder in folders))
assert loaded and set(loaded.values()) == {1}, loaded.most_common(3)
"""


def _python(code: str) -> None:
    """Run ``code`` in a fresh interpreter at the repo's root, without a GPU and without Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_links_are_relative() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "fastdms" / name) == f"../{name}"
        assert not (ROOT / name).is_symlink()


def test_no_python_file_is_long() -> None:
    files = [*package_files("*.py").values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 20
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_no_environment_variable_changes_behaviour() -> None:
    files = {path: source for path, source in package_files("*.py").items() if not path.startswith("fastdms/tools/")}
    assert not [path for path, source in files.items() if re.search(r"\b(environb?|getenvb?)\b", source.read_text())]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(sdist, the wheel built from it, the wheel built from the tree), made offline from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree") / "fastdms", tmp_path_factory.mktemp("dist")
    unshipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unshipped)
    for folder, arguments in ((out / "via_sdist", []), (out / "direct", ["--wheel"])):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *arguments, str(tree)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        shutil.rmtree(tree / "build", ignore_errors=True)
    (sdist,), (via_sdist,), (direct,) = (
        list(out.glob(pattern)) for pattern in ("via_sdist/*.tar.gz", "via_sdist/*.whl", "direct/*.whl")
    )
    return sdist, via_sdist, direct


def _contents(wheel: Path) -> dict[str, int]:
    """Path -> CRC of the contents, for every file of the archive."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.is_dir()}


def test_the_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path, Path]) -> None:
    contents = _contents(distributions[2])
    metadata = {name for name in contents if name.split("/")[0].endswith(".dist-info")}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assets = {name for name in package_files() if name.startswith("fastdms/assets/")}
    shipped = {name for name in package_files() if not name.endswith(NOT_SHIPPED)} | assets
    assert set(contents) - metadata == shipped
    assert {"fastdms/py.typed", "fastdms/assets/demo.txt", "fastdms/assets/README.md"} <= shipped
    for name in LINKED:
        assert any(path.startswith(f"fastdms/{name}/") for path in shipped), name


def test_the_wheel_from_the_sdist_is_the_same(distributions: tuple[Path, Path, Path]) -> None:
    sdist, via_sdist, direct = distributions
    assert _contents(via_sdist) == _contents(direct)
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert len(names) == len(set(names))
    assert "fastdms/config.py" in names
    assert not [name for name in names if name.startswith(("tests", *LINKED))]


def test_imports_without_triton_and_the_other_optional_packages() -> None:
    _python(BLOCK_OPTIONAL + IMPORT_ALL)


def test_runs_on_the_cpu_without_triton(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path, "shisa")
    _python(
        BLOCK_OPTIONAL
        + f"""
import fastdms
with fastdms.compile({str(folder)!r}, device="cpu", max_context=64) as model:
    logits = model.score({tiny_tokens(24)}, prompt_len=20)
assert logits.shape == (5, 300) and logits.isfinite().all()
"""
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_imports_with_triton_and_no_driver() -> None:
    _python(IMPORT_ALL)


def test_ops_are_defined_once() -> None:
    _python(RECORD_DEFINITIONS + IMPORT_ALL + CHECK_DEFINITIONS)
