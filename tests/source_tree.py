"""Where the sources lie, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("ops", "graphs", "tools")  # real folders at the top, also reached as fastdms/<name>


class Import(NamedTuple):
    """One imported name: ``target`` in full ("fastdms.ops.registry"), ``level`` of dots, ``lazy`` inside a function."""

    module: str
    target: str
    level: int
    lazy: bool
    line: int


def package_files(pattern: str = "*") -> dict[str, Path]:
    """Every file of the package, by the path that it has in the wheel ("fastdms/ops/registry.py")."""
    found = {}
    for top, prefix in [("fastdms", "fastdms"), *((name, f"fastdms/{name}") for name in LINKED)]:
        for path in sorted((ROOT / top).rglob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{prefix}/{path.relative_to(ROOT / top).as_posix()}"] = path
    return found


def module_name(wheel_path: str) -> str:
    """ "fastdms/ops/__init__.py" -> "fastdms.ops"."""
    return wheel_path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports() -> list[Import]:
    """Every import statement of the package, one entry for each name, function bodies included."""
    found: list[Import] = []
    for wheel_path, path in package_files("*.py").items():
        module = module_name(wheel_path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found += imports_of(module, package, ast.parse(path.read_text(), filename=str(path)))
    return found


def imports_of(module: str, package: str, tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """What ``tree``, the source of ``module`` inside ``package``, imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, 0, lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", node.level, lazy, node.lineno)
        else:
            inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(module, package, node, inside)
