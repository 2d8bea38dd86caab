"""Triton as installed compiles prefill's kernels in Gluon for Hopper, and keeps operands of products under way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.machine_code import overwritten_operands

_LOOP = """
.L_x_1:
        /*0010*/                   {first} ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   {second} ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/              @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
_PACK, _OTHER = "F2FP.BF16.F32.PACK_AB R91, R57, R56", "F2FP.BF16.F32.PACK_AB R96, R57, R56"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (_OTHER, _PACK, []),
        (_PACK, _OTHER, [_PACK]),
        ("LDS.128 R92, [R15]", _OTHER, ["LDS.128 R92, [R15]"]),
        ("LDS.64 R86, [R15]", _OTHER, []),
        ("STS [R15], R92", _OTHER, []),
        ("@!P1 MUFU.EX2 R95, R3", _OTHER, ["@!P1 MUFU.EX2 R95, R3"]),
    ],
)
def test_an_operand_written_to_before_the_wait_is_found(first: str, second: str, expected: list[str]) -> None:
    assert overwritten_operands(_LOOP.format(first=first, second=second)) == expected


def test_operands_of_products_under_way_stay(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.machine_code", str(tmp_path)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for name, products, *overwritten in lines:
        assert int(products) >= 20, name
        assert not overwritten, name
