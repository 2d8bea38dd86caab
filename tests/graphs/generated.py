"""Reading the code that the compiler generates."""

from __future__ import annotations

import itertools
import math
import re

_ALLOCATION = re.compile(r"empty_strided_\w+\(\(([\d, ]*)\)")
_INPUT = re.compile(r"assert_size_stride\((\w+), \(([\d, ]*)\)")


def body(code: str) -> list[str]:
    """The lines that run at each call."""
    lines = code[code.index("    def call(self, args):") :].splitlines()[1:]
    return list(itertools.takewhile(lambda line: line.startswith("        ") or not line, lines))


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())


def allocations(code: str) -> list[int]:
    """Elements of every buffer that a call allocates."""
    return [math.prod(shape(sizes)) for line in body(code) for sizes in _ALLOCATION.findall(line)]


def inputs_of_shape(code: str, wanted: tuple[int, ...]) -> list[str]:
    """Names of the arguments that have this shape."""
    return [name for line in body(code) for name, sizes in _INPUT.findall(line) if shape(sizes) == wanted]


def uses(code: str, name: str) -> set[str]:
    """What a call does with ``name``: the ops that take it, or the line itself where that is no op of ours."""
    found = set()
    for line in body(code):
        if not re.search(rf"\b{name}\b", line) or "assert_size_stride" in line or line.strip() == f"del {name}":
            continue
        if re.match(r"\s*arg\d+_\d+, .* = args$", line):
            continue
        op = re.search(r"torch\.ops\.fastdms\.(\w+)\.default\(", line)
        found.add(op[1] if op else line.strip())
    return found
