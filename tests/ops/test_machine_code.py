"""Triton as installed compiles prefill's kernels in Gluon for Hopper, and keeps operands of products under way.

The assembler of 3.6 has been seen not to, where weights became operands before the wait; that of 3.9 has not.
"""

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
        /*0048*/                   {third} ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R56, R92, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0068*/                   {branch} ;
        /*0070*/              @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R94, R3 ;
        /*00a0*/                   EXIT ;
"""
_PLACES = ("first", "second", "third", "branch")
_PACK, _OTHER = "F2FP.BF16.F32.PACK_AB R91, R57, R56", "F2FP.BF16.F32.PACK_AB R96, R57, R56"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"second": _PACK}, []),
        ({"first": _PACK}, [_PACK]),
        ({"third": _PACK}, [_PACK]),
        ({"third": "MUFU.EX2 R92, R3"}, []),
        ({"first": "LDS.128 R92, [R15]"}, ["LDS.128 R92, [R15]"]),
        ({"first": "LDS.64 R86, [R15]"}, []),
        ({"first": "STS [R15], R92"}, []),
        ({"first": "WARPSYNC.COLLECTIVE R92, `(.L_x_2)"}, []),
        ({"first": "REDUX.SUM R92, R3"}, ["REDUX.SUM R92, R3"]),
        ({"first": "@!P1 MUFU.EX2 R95, R3"}, ["@!P1 MUFU.EX2 R95, R3"]),
        ({"branch": "BRA.DIV UR4, `(.L_x_2)", "first": _PACK}, [_PACK, "MUFU.EX2 R94, R3"]),
        ({"branch": "BRA `(.L_x_2)", "first": _PACK}, ["MUFU.EX2 R94, R3"]),
    ],
)
def test_an_operand_written_to_before_the_wait_is_found(changes: dict[str, str], expected: list[str]) -> None:
    assert overwritten_operands(_LOOP.format(**{**dict.fromkeys(_PLACES, _OTHER), **changes})) == expected


def test_operands_of_products_under_way_stay(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.machine_code", str(tmp_path)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for name, waits, *overwritten in lines:
        assert int(waits) >= 2, f"{name}: no product goes on while others are waited for"
        assert not overwritten, name
