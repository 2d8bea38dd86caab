"""release: a row's pages return to the free stack, in every layer, once."""

from __future__ import annotations

import pytest
import torch

from fastdms.ops import release
from tests.ops.harness import BACKENDS, STATE, GuardedCache, make_cache, on, span_pages, spans


def _filled(seed: int = 0) -> GuardedCache:
    """Two layers, four rows, spans of 0 to 40 tokens on pages of 4, row 2 starved."""
    cache = make_cache(num_layers=2, num_rows=4, page_size=4, max_context=40, num_pages=120, seed=seed)
    lengths = torch.randint(0, 41, cache.live_len.shape, generator=torch.Generator().manual_seed(seed))
    lengths[0, 0, 0], lengths[1, 3, 1], lengths[0, 2, 1] = 0, 40, 4
    free = cache.config.num_pages
    for span in spans(cache):
        held = -(-int(lengths[span]) // 4)
        cache.page_table[span][:held] = cache.free_pages[free - held : free]
        free -= held
    cache.live_len.copy_(lengths)
    cache.num_free.fill_(free)
    cache.starved[2] = 1
    return cache


def _release(backend: str, cache: GuardedCache, rows: list[int]) -> GuardedCache:
    with on(backend) as device:
        here = cache.copy_to(device)
        release(
            torch.tensor(rows, dtype=torch.int32, device=device), page_table=here.page_table, live_len=here.live_len,
            free_pages=here.free_pages, num_free=here.num_free, starved=here.starved, page_size=4,
        )  # fmt: skip
    return here


@pytest.mark.parametrize("rows", [[2], [0, 3], [3, -1, 1], [-1], [], [1, 0, 3, 2]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_come_back_once(backend: str, rows: list[int]) -> None:
    before = _filled()
    freed = [page for span in spans(before) if span[1] in rows for page in span_pages(before, *span)]
    after = _release(backend, before, rows)
    after.check_guards()
    old, new = int(before.num_free), int(after.num_free)
    assert new == old + len(freed)
    assert torch.equal(after.free_pages[:old].cpu(), before.free_pages[:old])
    assert sorted(after.free_pages[old:new].tolist()) == sorted(freed)
    for span in spans(before):
        expected = 0 if span[1] in rows else int(before.live_len[span])
        assert int(after.live_len[span]) == expected
    assert after.starved.tolist() == [0, 0, 0 if 2 in rows else 1, 0]
    for name in set(STATE) - {"live_len", "free_pages", "num_free", "starved"}:
        mine, other = getattr(after, name).cpu(), getattr(before, name)
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_releasing_an_empty_row_does_nothing(backend: str) -> None:
    once = _release(backend, _filled(), [0, 1, 2, 3])
    assert int(once.num_free) == once.config.num_pages
    assert sorted(once.free_pages.tolist()) == list(range(once.config.num_pages))
    again = _release(backend, once, [3, 0])
    assert torch.equal(again.free_pages, once.free_pages)
    assert int(again.num_free) == once.config.num_pages


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [256, 257, 600])
def test_a_span_of_many_pages(backend: str, held: int) -> None:
    """The kernel moves 256 at a time."""
    before = make_cache(num_rows=1, num_kv_heads=1, page_size=1, max_context=600, num_pages=700)
    pages = before.free_pages[-held:].clone()
    before.page_table[0, 0, 0, :held] = pages
    before.live_len.fill_(held)
    before.num_free -= held
    before.free_pages[-held:] = -1
    with on(backend) as device:
        here = before.copy_to(device)
        release(
            torch.zeros(1, dtype=torch.int32, device=device), page_table=here.page_table, live_len=here.live_len,
            free_pages=here.free_pages, num_free=here.num_free, starved=here.starved, page_size=1,
        )  # fmt: skip
    here.check_guards()
    assert int(here.num_free) == 700
    assert torch.equal(here.free_pages[-held:].cpu(), pages)


def test_bad_input_is_named() -> None:
    cache = _filled()
    rows = torch.zeros(1, dtype=torch.int32)
    good = {name: getattr(cache, name) for name in ("page_table", "live_len", "free_pages", "num_free", "starved")}
    for bad_rows, change, message in (
        (rows.long(), {}, "rows"),
        (rows[0], {}, "rows"),
        (rows, {"page_table": cache.page_table[0]}, "page_table"),
        (rows, {"live_len": cache.live_len[:1]}, "page_table"),
        (rows, {"starved": cache.starved[:1]}, "starved"),
        (rows, {"free_pages": cache.free_pages[::2]}, "free_pages"),
    ):
        with pytest.raises(ValueError, match=message):
            release(bad_rows, **{**good, **change}, page_size=4)
