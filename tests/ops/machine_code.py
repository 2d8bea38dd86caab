"""Machine code for Hopper of the kernels in Gluon, made without a GPU: ``python -m tests.ops.machine_code FOLDER``.

Not in a process of the tests, which load Triton as an interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["disassemble", "overwritten_operands"]

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PRODUCT = re.compile(r"HGMMA\S* R(\d+), R(\d+), gdesc")  # sums, and the left operand where it is in registers
_ALL_DONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
_ENDS = re.compile(r"EXIT\b|BRA\S* `")  # whatever holds; a branch under a condition names it before its label
_WITHOUT_RESULT = (
    "ST", "RED.", "BAR", "BRA", "HGMMA", "WARPGROUP", "WARPSYNC", "SYNCS", "UTMA", "EXIT", "R2UR", "ISETP", "FSETP",
)  # fmt: skip


def overwritten_operands(code: str) -> list[str]:
    """Instructions that write to a register which a product under way may still read: behind one of a group of
    products, before all are waited for."""
    instructions, labels = list[str](), dict[str, int]()
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    found = set[int]()
    for at, text in enumerate(instructions):
        if product := _PRODUCT.search(text):
            operands = set(range(int(product[2]), int(product[2]) + 4))
            behind = _until_done(instructions, labels, at + 1)
            found |= {other for other in behind if operands & set(_written(instructions[other]))}
    return [instructions[at] for at in sorted(found)]


def _until_done(instructions: list[str], labels: dict[str, int], begin: int) -> set[int]:
    """What may run from there on until all products are done."""
    seen, left = set[int](), [begin]
    while left:
        at = left.pop()
        if at in seen or at >= len(instructions) or _ALL_DONE in instructions[at]:
            continue
        seen.add(at)
        text = instructions[at]
        branch = re.search(r"BRA.*(\.L_x_\d+)", text)
        if branch:
            left.append(labels[branch[1]])
        if not _ENDS.match(text):
            left.append(at + 1)
    return seen


def _written(text: str) -> range:
    """Registers that an instruction writes to."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    target = re.match(r"(\S+)\s+(?:P\w+,\s*)?R(\d+)", text)
    if target is None or text.startswith(_WITHOUT_RESULT):
        return range(0)
    wide = next((n for width, n in ((".128", 4), (".64", 2), (".WIDE", 2)) if width in target[1]), 1)
    return range(int(target[2]), int(target[2]) + wide)


def disassemble(folder: Path) -> dict[str, str]:
    """Compile each kernel; the code by its name."""
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDevice:
        """A device to compile for, and no more."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    driver.set_active(NoDevice())
    from fastdms.ops.prefill_attention import hopper_kernel, specialised_kernel

    code = {}

    def compiled(name: str, module: Any, kernel: str, call: Callable[..., None], *args: Any, **options: Any) -> None:
        original = getattr(module, kernel)

        class Compiling:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*given: Any, **constants: Any) -> None:
                    made = original.warmup(*given, grid=grid, **constants)
                    path = folder / f"{name}.cubin"
                    path.write_bytes(made.asm["cubin"])
                    command = [knobs.nvidia.nvdisasm.path, "-c", path]
                    code[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout

                return launch

        setattr(module, kernel, Compiling())
        call(*args, **options)
        setattr(module, kernel, original)

    ints = torch.zeros(100, dtype=torch.int32)
    options = {"B": 2, "HKV": 2, "WINDOW": 256, "DEPENDENT": True, "launch_pdl": True}
    for dim, module, kernel in (
        (64, specialised_kernel, "_specialised_kernel"), (64, hopper_kernel, "_attend_hopper_kernel"),
        (128, hopper_kernel, "_attend_hopper_kernel"),
    ):  # fmt: skip
        q, k = torch.zeros(100, 8, dim, dtype=torch.bfloat16), torch.zeros(100, 2, dim, dtype=torch.bfloat16)
        packed = (k[:, 0].contiguous(),) * 2
        compiled(
            f"{kernel}, {dim}", module, kernel, module.attend, q, k, k, *(ints,) * 5, *packed, q, 1, 1.0, **options
        )
        if module is specialised_kernel:
            compiled(f"{kernel}, dense", module, kernel, module.attend_densely, q, k, k, 0, q, 1.0)
    return code


if __name__ == "__main__":
    for name, text in disassemble(Path(sys.argv[1])).items():
        print(name, text.count("DEPBAR.LE gsb0, 0x1"), *overwritten_operands(text), sep="\t")
