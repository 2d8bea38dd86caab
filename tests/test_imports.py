"""The layers: what each folder may import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable

import pytest

import fastdms
from tests.source_tree import LINKED, ROOT, Import, imports, imports_of

IMPORTS = imports()


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _offenders(is_wrong: Callable[[Import], bool]) -> list[str]:
    return [f"{i.module}:{i.line} imports {i.target}" for i in IMPORTS if is_wrong(i)]


def test_the_scan_sees_every_folder() -> None:
    assert {f"fastdms.{name}" for name in LINKED} <= {".".join(i.module.split(".")[:2]) for i in IMPORTS}


def test_the_scan_reads_every_kind_of_import() -> None:
    source = """
import a.b as c, d
from . import e
from .f import g
if True:
    from ..h import i
def function():
    class Inner:
        from j import k
"""
    found = [(i.target, i.level, i.lazy) for i in imports_of("p.q.r", "p.q", ast.parse(source))]
    assert found == [
        ("a.b", 0, False),
        ("d", 0, False),
        ("p.q.e", 1, False),
        ("p.q.f.g", 1, False),
        ("p.h.i", 2, False),
        ("j.k", 0, True),
    ]


def test_ops_import_nothing_of_fastdms_but_ops() -> None:
    def is_wrong(i: Import) -> bool:
        return (
            _within(i.module, "fastdms.ops") and _within(i.target, "fastdms") and not _within(i.target, "fastdms.ops")
        )

    assert not _offenders(is_wrong)


def test_ops_import_only_torch_and_triton_besides() -> None:
    def is_wrong(i: Import) -> bool:
        standard = i.target.split(".")[0] in sys.stdlib_module_names
        return _within(i.module, "fastdms.ops") and not standard and not _within(i.target, "fastdms", "torch", "triton")

    assert not _offenders(is_wrong)


def test_graphs_import_only_ops_of_fastdms() -> None:
    def is_wrong(i: Import) -> bool:
        allowed = _within(i.target, "fastdms.ops", "fastdms.graphs")
        return _within(i.module, "fastdms.graphs") and _within(i.target, "fastdms") and not allowed

    assert not _offenders(is_wrong)


def test_only_the_command_line_imports_tools_and_only_when_needed() -> None:
    def is_wrong(i: Import) -> bool:
        if not _within(i.target, "fastdms.tools") or _within(i.module, "fastdms.tools"):
            return False
        return not (_within(i.module, "fastdms.cli") and i.lazy)

    assert not _offenders(is_wrong)


def test_no_import_leaves_its_folder_relatively() -> None:
    assert not _offenders(lambda i: i.level > 1)


def test_nothing_is_imported_under_a_second_name() -> None:
    """``import ops`` would load a file again as another module and define its ops twice."""
    assert not _offenders(lambda i: _within(i.target, *LINKED, "tests"))
    second_name = re.compile(rf"^\s*(from|import) ({'|'.join(LINKED)})\b", re.MULTILINE)
    assert not [path for path in (ROOT / "tests").rglob("*.py") if second_name.search(path.read_text())]


@pytest.mark.parametrize("name", LINKED)
def test_no_tests_inside_the_package(name: str) -> None:
    assert not list((ROOT / name).rglob("test_*.py"))


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule sets it as an attribute of the package, in place of a function of that name."""
    modules = {path.stem for path in (ROOT / "fastdms").glob("*.py")}
    assert not modules & set(fastdms.__all__)
