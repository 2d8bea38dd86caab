"""The cache under test between guard elements, and copies of it on the CPU, in which its pages are numbered from 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastdms.ops import SpanCache
from fastdms.ops.quantise import load_slots
from fastdms.tools.fuzz.budget import WrongAnswer
from fastdms.tools.fuzz.calls import GUARD, GUARD_BYTE, guarded, same_bytes
from fastdms.tools.fuzz.draw import Setting

__all__ = ["Snapshot", "State", "span_contents"]

_FAR_ELEMENTS = 2**31
_POOL = ("k_pages", "v_pages", "k_scales", "v_scales")


class State:
    """All layers' tensors on a device, as ``SpanCache`` names them.

    Pages that no span holds are NaN; page tables and rings hold what a previous owner may have left; the free stack is
    in any order. Of a pool beyond 2^31 elements only some pages at both ends are ever handed out.
    """

    def __init__(self, setting: Setting, rng: np.random.Generator, device: torch.device) -> None:
        self._setting, s = setting, setting
        most = s.num_spans * s.max_pages
        in_play = int(rng.integers(1, most + 1)) if rng.random() < 0.6 else most
        self.page_ids = torch.arange(in_play)
        num_pages = in_play
        if s.far_pages:
            num_pages = in_play + _FAR_ELEMENTS // (s.page_size * s.head_dim)
            near = in_play // 8
            self.page_ids[near:] += num_pages - in_play
        self._device_ids = self.page_ids.to(device)
        spans = (s.num_layers, s.num_rows, s.num_kv_heads)
        scales = (num_pages, s.page_size) if s.kv_dtype == torch.float8_e4m3fn else (0,)
        pages = (num_pages, s.page_size, s.head_dim)
        ints = torch.int32
        self._guarded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            name: guarded(shape, dtype, device)
            for name, shape, dtype in (
                ("k_pages", pages, s.kv_dtype), ("v_pages", pages, s.kv_dtype), ("k_scales", scales, torch.bfloat16),
                ("v_scales", scales, torch.bfloat16), ("page_table", (*spans, s.max_pages), ints),
                ("live_len", spans, ints), ("ring", (*spans, s.window_tokens + 1), ints),
                ("free_pages", pages[:1], ints), ("num_free", (1,), ints), ("starved", (s.num_rows,), ints),
            )
        }  # fmt: skip
        if rng.random() < 0.5:  # reading it is a crash
            stale = {name: rng.integers(-(2**31), 2**31, self[name].shape) for name in ("page_table", "ring")}
        else:  # reading it is a wrong answer, of a page and a slot that there are
            stale = {
                "page_table": self.page_ids.numpy()[rng.integers(in_play, size=self["page_table"].shape)],
                "ring": rng.integers(2 * s.max_pages * s.page_size, size=self["ring"].shape),
            }
        for name, entries in stale.items():
            self[name].copy_(torch.from_numpy(entries))
        order = torch.from_numpy(rng.permutation(in_play))
        self["free_pages"][:in_play] = self._device_ids[order.to(device)].int()
        self["num_free"].fill_(in_play)
        self["live_len"].zero_()
        self["starved"].zero_()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._guarded[name][1]

    def layer(self, index: int) -> SpanCache:
        """One layer, as ops take it."""
        views = {name: self[name] for name in SpanCache._fields}
        for name in ("page_table", "live_len", "ring"):
            views[name] = views[name][index]
        return SpanCache(**views)

    def snapshot(self) -> Snapshot:
        """A copy on the CPU."""
        pool = {name: self._pages(self[name]) for name in _POOL}
        rest = {name: self[name].cpu().clone() for name in SpanCache._fields if name not in _POOL}
        return Snapshot(page_ids=self.page_ids, **pool, **rest)

    def _pages(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.page_ids.numel() == tensor.shape[0] or tensor.numel() == 0:
            return tensor.cpu().clone()
        raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor  # indexing does not know fp8
        return raw[self._device_ids].cpu().view(tensor.dtype)

    def load(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's contents."""
        for name in SpanCache._fields:
            mine, new = self[name], getattr(snapshot, name)
            if name in _POOL and new.numel():
                raw = mine.view(torch.uint8) if mine.dtype.itemsize == 1 else mine
                raw[self._device_ids] = new.view(raw.dtype).to(mine.device)
            else:
                mine.copy_(new)

    def poison_free_pages(self) -> None:
        """Fill the free pages with NaN, as no op has to."""
        free = self["free_pages"][: int(self["num_free"])].long()
        for name in _POOL:
            if self[name].numel():
                pages = self[name].view(torch.uint8)
                pages[free] = GUARD_BYTE

    def check_guards(self, op: str) -> None:
        """Nothing was written outside the buffers."""
        for name, (buffer, view) in self._guarded.items():
            ends = buffer[:GUARD], buffer[GUARD + view.numel() :]
            if not all(bool((end.view(torch.uint8) == GUARD_BYTE).all()) for end in ends):
                raise WrongAnswer(op, f"something was written outside {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state on the CPU: all layers' tensors, as ``SpanCache`` names them; ``page_ids``: which pages they hold."""

    page_ids: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    page_table: torch.Tensor
    live_len: torch.Tensor
    ring: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor
    starved: torch.Tensor

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return int(self.k_pages.shape[1])

    @property
    def pages_held(self) -> torch.Tensor:
        """Pages of each span, ``[L, R, Hkv]``."""
        return (self.live_len + self.page_size - 1) // self.page_size

    @property
    def is_held(self) -> torch.Tensor:
        """Which entries of ``page_table`` count, ``[L, R, Hkv, max_pages]``."""
        return torch.arange(self.page_table.shape[-1]) < self.pages_held[..., None]

    def local(self, pages: torch.Tensor) -> torch.Tensor:
        """Page numbers of the pool as indices into ``k_pages``, int64; -1 for a page that is not in play."""
        at = torch.searchsorted(self.page_ids, pages.long()).clamp_max(self.page_ids.numel() - 1)
        return torch.where(self.page_ids[at] == pages, at, -1)

    @property
    def local_table(self) -> torch.Tensor:
        """``page_table`` by ``local``, int32, where a span holds the page; other entries as they are."""
        return torch.where(self.is_held, self.local(self.page_table).int(), self.page_table)

    def layer(self, index: int, extra_pages: int = 0) -> SpanCache:
        """A copy of one layer for a reference, with pages numbered by ``local``.

        extra_pages: free pages more than there are, below the others on the stack.
        """
        pages, free = self.page_ids.numel(), int(self.num_free)
        pool = {}
        for name in _POOL:
            tensor = getattr(self, name)
            more = torch.zeros((extra_pages if tensor.numel() else 0, *tensor.shape[1:]), dtype=tensor.dtype)
            more.view(torch.uint8).fill_(GUARD_BYTE)
            pool[name] = torch.cat((tensor.view(torch.uint8), more.view(torch.uint8))).view(tensor.dtype)
        stack = torch.full((pages + extra_pages,), -1, dtype=torch.int32)
        stack[:extra_pages] = torch.arange(pages, pages + extra_pages)
        stack[extra_pages : extra_pages + free] = self.local(self.free_pages[:free]).int()
        return SpanCache(
            **pool,
            page_table=self.local_table[index].clone(),
            live_len=self.live_len[index].clone(),
            ring=self.ring[index].clone(),
            free_pages=stack,
            num_free=self.num_free + extra_pages,
            starved=self.starved.clone(),
        )

    def with_layer(self, index: int, cache: SpanCache) -> Snapshot:
        """This state after a reference has changed ``layer(index)``."""
        rest = {name: getattr(self, name).clone() for name in ("page_table", "live_len", "ring")}
        rest["live_len"][index], rest["ring"][index] = cache.live_len, cache.ring
        held = torch.arange(rest["page_table"].shape[-1]) < -(-cache.live_len // self.page_size)[..., None]
        table = rest["page_table"][index]
        table[held] = self.page_ids[cache.page_table[held].long()].int()
        pool = {name: getattr(cache, name) for name in _POOL}
        return Snapshot(
            page_ids=self.page_ids, free_pages=self.free_pages, num_free=cache.num_free, starved=cache.starved,
            **pool, **rest,
        )  # fmt: skip

    def same_as(self, other: Snapshot) -> bool:
        """Whether both hold the same bits."""
        return all(same_bytes(getattr(self, name), getattr(other, name)) for name in SpanCache._fields)

    def check_owners(self, op: str) -> None:
        """Each page is free or held by one span, never both, twice, or neither."""
        free = self.local(self.free_pages[: max(int(self.num_free), 0)])
        owned = torch.cat((free, self.local(self.page_table[self.is_held])))
        if not torch.equal(owned.sort().values, torch.arange(self.page_ids.numel())):
            raise WrongAnswer(op, "a page is lost, has two owners, or is none of the pool's")

    @property
    def is_written(self) -> torch.Tensor:
        """Which slots hold a token, ``[pages, page_size]`` bool."""
        written = torch.zeros(self.page_ids.numel(), self.page_size, dtype=torch.bool)
        slots = torch.arange(self.page_table.shape[-1] * self.page_size)
        live = slots < self.live_len[..., None]
        pages = self.local_table.repeat_interleave(self.page_size, -1)[live].long()
        written[pages, (slots % self.page_size).expand(live.shape)[live]] = True
        return written


def span_contents(cache: SpanCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all spans of a CPU cache, fp32 ``[R, Hkv, longest live_len, D]``, zero where unused."""
    slots = torch.arange(min(int(cache.live_len.max()), cache.page_table.shape[-1] * cache.page_size))
    live = slots < cache.live_len[..., None]
    pages = torch.where(live, cache.page_table[..., slots // cache.page_size], 0).long()
    keys, values = (
        load_slots(data, scales, pages, slots % cache.page_size).masked_fill_(~live[..., None], 0.0)
        for data, scales in ((cache.k_pages, cache.k_scales), (cache.v_pages, cache.v_scales))
    )
    return keys, values
