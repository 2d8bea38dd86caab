"""A compiled step over a shared pool: the compiler may neither lose a protecting copy nor copy the pool."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fastdms.ops import SpanCache, decode_append, decode_attention
from tests.ops.harness import DEVICE

# One real row of one head, so that the GPU too hands pages out in one order.
_LAYERS, _ROWS, _HEADS, _GROUP, _DIM, _PAGES, _SIZE, _WINDOW = 2, 3, 1, 2, 16, 512, 4, 3


class _State(NamedTuple):
    """``pool [2, P, S, D]``: keys and values as views of one tensor. The rest is stacked over layers."""

    pool: torch.Tensor
    scales: torch.Tensor
    page_table: torch.Tensor
    live_len: torch.Tensor
    ring: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor
    starved: torch.Tensor

    def layer(self, index: int) -> SpanCache:
        return SpanCache(
            self.pool[0], self.pool[1], self.scales, self.scales, self.page_table[index], self.live_len[index],
            self.ring[index], self.free_pages, self.num_free, self.starved,
        )  # fmt: skip


def _state() -> _State:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=DEVICE)

    spans = (_LAYERS, _ROWS, _HEADS)
    return _State(
        pool=torch.zeros(2, _PAGES, _SIZE, _DIM, device=DEVICE),
        scales=torch.zeros(0, dtype=torch.bfloat16, device=DEVICE),
        page_table=zeros(*spans, 8), live_len=zeros(*spans), ring=zeros(*spans, _WINDOW + 1),
        free_pages=torch.arange(_PAGES, dtype=torch.int32, device=DEVICE),
        num_free=torch.full((1,), _PAGES, dtype=torch.int32, device=DEVICE), starved=zeros(_ROWS),
    )  # fmt: skip


def _step(
    x: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, tables: torch.Tensor, state: _State, copy_pages: bool
) -> object:
    """Two layers; a copy taken before each append, of a part of what it mutates, is used after it."""
    for index in range(_LAYERS):
        layer = state.layer(index)
        lengths_before, keys_before = layer.live_len.clone(), x[:, :1, 0]
        if copy_pages:
            keys_before = layer.k_pages[-4:].clone()[-1, :1]
        q, k, v = (x * (index + 1)).split((_HEADS * _GROUP, _HEADS, _HEADS), 1)
        q = decode_append(
            q, k, v, layer, positions=positions, rows=rows, cos=tables, sin=tables, decision=(1.0, 0.05), shift=1,
            zero_borrowed="none",
        )  # fmt: skip
        out = decode_attention(q, layer, positions=positions, rows=rows, sm_scale=0.25)
        # Sums of integers and single additions only: the compiler may reorder or fuse anything else.
        grown = layer.live_len.sum() - lengths_before.sum()
        x = torch.cat((out + keys_before[:1, :1], x[:, _HEADS * _GROUP :] + grown), 1)
    return x, keys_before, lengths_before


@pytest.mark.parametrize("copy_pages", [False, True], ids=["copies-lengths", "copies-pages"])
def test_copies_stay_old_and_the_pool_is_not_copied(copy_pages: bool) -> None:
    """Equal to eager bit for bit. A step that reads pages besides the ops is right too, but makes the compiler copy the
    pool to be so (torch 2.13), which is why only ops touch pages here; without that no buffer is of the pool's size.
    """
    torch._dynamo.reset()
    eager, traced = _state(), _state()
    tables = torch.rand(16, _DIM // 2, device=DEVICE)
    rows = torch.arange(_ROWS, dtype=torch.int32, device=DEVICE)
    compiled = torch.compile(_step, fullgraph=True, dynamic=False)
    source: list[str] = []
    with torch.no_grad():
        for position in range(10):
            x = torch.randn(_ROWS, _HEADS * (_GROUP + 2), _DIM, device=DEVICE)
            positions = torch.tensor([-1, position, -1], dtype=torch.int32, device=DEVICE)
            expected = _step(x, positions, rows, tables, eager, copy_pages)
            if position == 0:
                actual, source = run_and_get_code(compiled, x, positions, rows, tables, traced, copy_pages)
            else:
                actual = compiled(x, positions, rows, tables, traced, copy_pages)
            for mine, other in zip(actual, expected, strict=True):  # type: ignore[call-overload]
                assert torch.equal(mine, other)
    for name, mine, other in zip(_State._fields, traced, eager, strict=True):
        assert torch.equal(mine, other), name
    allocated = [math.prod(map(int, shape)) for shape in _allocations("\n".join(source))]
    assert allocated, "no allocation found in the generated code"
    assert copy_pages or max(allocated) < traced.pool[0].numel()


def _allocations(source: str) -> list[list[str]]:
    """Shapes in ``empty_strided_cpu((3, 4), ...)`` and its relatives."""
    found = re.findall(r"empty_strided\w*\(\s*\(([\d,\s]*)\)", source)
    return [re.findall(r"\d+", shape) for shape in found]
