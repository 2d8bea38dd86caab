"""How decode_attention cuts its tiles: shares in order and alike, and the program that a tile is said to belong to."""

from __future__ import annotations

import types

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fastdms.ops.decode_attention import hopper_split_kernel
from fastdms.ops.decode_attention.split_kernel import first_tile, owner
from tests.ops.harness import DEVICE

# Few of programs and of least tiles, which a GPU compiles for.
_CUTS = given(
    total=st.integers(0, 500) | st.integers(0, 40),
    programs=st.sampled_from([1, 2, 3, 5, 8, 17, 60]),
    least=st.sampled_from([1, 2, 5]),
)


@triton.jit(do_not_specialize=["total"])
def _cut_kernel(
    first_ptr, owner_ptr, total, P: tl.constexpr, T: tl.constexpr, PROGRAMS: tl.constexpr, LEAST: tl.constexpr
):
    o_p = tl.arange(0, P)
    o_t = tl.arange(0, T)
    tl.store(first_ptr + o_p, first_tile(o_p, total, PROGRAMS, LEAST), mask=o_p <= PROGRAMS)
    if total > 0:
        tl.store(owner_ptr + o_t, owner(o_t, total, PROGRAMS, LEAST), mask=o_t < total)


def _shares(total: int, programs: int, least: int) -> list[int]:
    """Tiles of each program."""
    sharers = max(min(-(-total // least), programs), min(total, programs // 4))
    return [total // sharers + (p < total % sharers) for p in range(sharers)] if total else []


@_CUTS
def test_shares(total: int, programs: int, least: int) -> None:
    first = torch.empty(programs + 1, dtype=torch.int32, device=DEVICE)
    owners = torch.empty(total, dtype=torch.int32, device=DEVICE)
    sizes = {"P": triton.next_power_of_2(programs + 1), "T": 512, "PROGRAMS": programs, "LEAST": least}
    _cut_kernel[(1,)](first, owners, total, **sizes)
    shares = _shares(total, programs, least)
    assert first.diff().tolist() == shares + [0] * (programs - len(shares))
    assert first[0] == 0
    assert owners.tolist() == [p for p, share in enumerate(shares) for _ in range(share)]


@_CUTS
def test_gluon_cuts_alike(total: int, programs: int, least: int) -> None:
    first_tile = hopper_split_kernel._first_tile.fn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_split_kernel, "gl", types.SimpleNamespace(minimum=min, maximum=max))
        first = [first_tile(p, total, programs, least) for p in range(programs + 1)]
    shares = _shares(total, programs, least)
    assert first == [sum(shares[:p]) for p in range(programs + 1)]
