"""Offsets beyond 32 bits: the far end of a pool, and more than 2^31 elements of anything, behave like little does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdms.ops import decode_append, decode_attention, dequantise, prefill_append, prefill_attention, prefill_rope
from tests.ops.harness import DEVICE, GuardedCache, make_cache, split_heads
from tests.ops.rig import FLAG_HALF

pytestmark = pytest.mark.gpu

_PAGE_ELEMENTS = 64 * 128


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _run(cache: GuardedCache, pages: torch.Tensor) -> list[torch.Tensor]:
    """A chunk and two decode steps of two rows, on ``pages`` alone; all outputs."""
    cache.free_pages[: len(pages)] = pages
    cache.num_free.fill_(len(pages))
    cache.live_len.zero_()
    torch.manual_seed(0)
    layer, out = cache.layer(0), []
    shared: dict[str, Any] = {"cos": torch.rand(300, 64, device=DEVICE), "sin": torch.rand(300, 64, device=DEVICE)}
    shared |= {"decision": FLAG_HALF, "zero_borrowed": "none"}
    q, k, v = split_heads(torch.randn(200, 8, 128, device=DEVICE).bfloat16(), 2)
    ragged: dict[str, Any] = {"rows": _ints(0, 1), "chunk_indptr": _ints(0, 120, 200)}
    ragged["positions"] = torch.cat((torch.arange(120), torch.arange(80))).int().to(DEVICE)
    q, k, decisions = prefill_rope(q, k, positions=ragged["positions"], **shared)
    out.append(prefill_attention(q, k, v, decisions, layer, **ragged, shift=0, sm_scale=0.1))
    prefill_append(k, v, decisions, layer, **ragged, shift=0)
    for step in range(2):
        q, k, v = split_heads(torch.randn(2, 8, 128, device=DEVICE).bfloat16(), 2)
        batch: dict[str, Any] = {"positions": _ints(120 + step, 80 + step), "rows": _ints(0, 1)}
        q = decode_append(q, k, v, layer, **batch, shift=0, **shared)
        out += [q, decode_attention(q, layer, **batch, sm_scale=0.1)]
    ragged["positions"] = torch.cat((torch.arange(122, 242), torch.arange(82, 162))).int().to(DEVICE)
    q, k, v = split_heads(torch.randn(200, 8, 128, device=DEVICE).bfloat16(), 2)
    out.append(prefill_attention(q, k, v, decisions, layer, **ragged, shift=0, sm_scale=0.1))
    return out


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_the_end_of_a_large_pool(kv_dtype: torch.dtype) -> None:
    num_pages = 2**31 // _PAGE_ELEMENTS + 4096
    cache = make_cache(
        DEVICE, num_pages=num_pages, page_size=64, head_dim=128, num_rows=2, kv_dtype=kv_dtype, max_context=300
    )
    near, far = (torch.arange(first, first + 16, dtype=torch.int32) for first in (0, num_pages - 16))
    results = []
    for pages in (near.to(DEVICE), far.to(DEVICE)):
        results.append(_run(cache, pages))
        for tensor in (cache.k_pages, cache.v_pages):
            untouched = torch.ones(num_pages, dtype=torch.bool, device=DEVICE)
            untouched[near.long()], untouched[far.long()] = False, False
            first = tensor[untouched.nonzero()[0, 0] : untouched.nonzero()[-1, 0] + 1]
            assert all(part[:, ::5, ::7].float().isnan().all() for part in first.split(8192))
            assert any(not tensor[page].float().isnan().all() for page in pages.tolist())
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    cache.check_guards()


def test_a_chunk_of_more_than_two_to_the_31_elements() -> None:
    """The last row of a huge chunk comes out as it does alone."""
    rows, tokens, heads, kv_heads, head_dim = 2050, 128, 32, 2, 256
    assert rows * tokens * heads * head_dim > 2**31
    fused = torch.randn(rows * tokens, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    outputs = []
    for first in (0, rows - 1):
        count = rows - first
        cache = make_cache(
            DEVICE, num_rows=rows, head_dim=head_dim, page_size=64, kv_dtype=torch.bfloat16, num_pages=4 * count + 4
        )
        q, k, v = split_heads(fused[first * tokens :], kv_heads)
        positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(count)
        tables = torch.ones(tokens, head_dim // 2, device=DEVICE)
        q, k, decisions = prefill_rope(
            q, k, positions=positions, cos=tables, sin=tables, decision=FLAG_HALF, zero_borrowed="none"
        )
        ragged: dict[str, Any] = {
            "positions": positions, "rows": torch.arange(first, rows, dtype=torch.int32, device=DEVICE),
            "chunk_indptr": torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * tokens,
        }  # fmt: skip
        out = prefill_attention(q, k, v, decisions, cache.layer(0), **ragged, shift=0, sm_scale=0.1)
        prefill_append(k, v, decisions, cache.layer(0), **ragged, shift=0)
        last = {"positions": _ints(tokens), "rows": _ints(rows - 1)}
        held = decode_attention(out[-1:].contiguous(), cache.layer(0), **last, sm_scale=0.1)
        outputs.append([q[-tokens:].clone(), k[-tokens:].clone(), out[-tokens:].clone(), held])
        del q, k, v, out, cache
    for mine, other in zip(*outputs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("packed", [False, True], ids=["fp8", "int4"])
def test_a_weight_of_more_than_two_to_the_31_elements(packed: bool) -> None:
    """Its first and last rows come out as they do alone."""
    columns, some = 4096, 100
    rows = 2**31 // columns + some
    if packed:
        weight = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, device=DEVICE)
        scale = torch.randn(rows, columns // 128, device=DEVICE).bfloat16()
    else:
        weight = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
        scale = torch.randn(rows, device=DEVICE)
    out = dequantise(weight, scale, torch.bfloat16)
    for part in (slice(some), slice(rows - some, rows)):
        alone = dequantise(weight[part].clone(), scale[part].clone(), torch.bfloat16)
        assert alone.any()
        assert torch.equal(out[part], alone)
