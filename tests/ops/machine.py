"""A Hypothesis machine over the compact cache: any history of appends, chunks, releases, starvation, against lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastdms.ops import decode_append, decode_attention, prefill_append, prefill_attention
from tests.ops.definition import attend
from tests.ops.harness import check_pool, make_cache, on, read_span, spans
from tests.tolerance import LOGITS_RELATIVE

LAYERS, ROWS, HEADS, GROUP, DIM, PAGE, LONGEST = 2, 3, 2, 2, 8, 4, 28
_SCALE = 0.01  # the codes below are large for scores
_DECIDE = (1.0, 0.5)  # decision inputs are 0 and 1


@dataclass
class Span:
    """What one span holds: positions, and the flag of each position given so far."""

    stored: set[int] = field(default_factory=set)
    flags: dict[int, bool] = field(default_factory=dict)

    def given(self, position: int, decision: bool, window: int, shift: int) -> Span:
        """The span after one more token."""
        flags = dict(self.flags)
        if shift and position:
            flags[position - 1] = decision
        flags[position] = decision and not shift
        gone = {old for old in self.stored if old < position - window and flags[old]}
        return Span((self.stored - gone) | {position}, flags)


class CacheMachine(RuleBasedStateMachine):
    """Each token's key and value spell out whose it is: (layer, row, head, position, owner). RoPE is the identity."""

    backend: ClassVar[str] = "reference"

    @initialize(
        window=st.sampled_from([0, 1, 2, 5]), shift=st.integers(0, 1), num_pages=st.integers(6, 90),
        seed=st.integers(0, 2**31),
    )  # fmt: skip
    def start(self, window: int, shift: int, num_pages: int, seed: int) -> None:
        self.window, self.shift = window, shift
        with on(self.backend) as device:
            self.device = device
        self.cache = make_cache(
            device, seed=seed, num_layers=LAYERS, num_rows=ROWS, num_kv_heads=HEADS, head_dim=DIM, page_size=PAGE,
            window_tokens=window, max_context=LONGEST, num_pages=num_pages,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths, self.owners = [0] * ROWS, [0] * ROWS
        self.expected = {span: Span() for span in spans(self.cache)}
        self.starved: set[int] = set()

    @rule(rows=st.lists(st.integers(-1, ROWS - 1), max_size=ROWS + 2))
    def decode(self, rows: list[int]) -> None:
        """One token for each row named, at its first mention; the other entries are padding."""
        seen: set[int] = set()
        entries = []
        for row in rows:
            real = row >= 0 and row not in seen and self.lengths[row] < LONGEST
            entries.append((max(row, 0), self.lengths[row] if real else -1))
            seen.add(row)
        for layer in range(LAYERS):
            decisions = self._decisions(len(entries))
            before = self._before()
            with on(self.backend):
                decode_append(
                    self._queries(len(entries)), self._codes(layer, entries), -self._codes(layer, entries),
                    self.cache.layer(layer), positions=self._int([position for _, position in entries]),
                    rows=self._int([row for row, _ in entries]), cos=torch.ones(LONGEST, DIM // 2, device=self.device),
                    sin=torch.zeros(LONGEST, DIM // 2, device=self.device), decision=_DECIDE, shift=self.shift,
                    zero_borrowed="none", alpha=decisions.float().to(self.device),
                )  # fmt: skip
            given = {row: [(position, i)] for i, (row, position) in enumerate(entries) if position >= 0}
            self._settle(layer, given, decisions, before)
        for row, position in entries:
            self.lengths[row] += position >= 0
        self._attend(entries)

    @rule(
        order=st.permutations(range(ROWS)), counts=st.lists(st.integers(0, 11), min_size=1, max_size=ROWS),
        padding=st.integers(0, 2),
    )  # fmt: skip
    def chunk(self, order: list[int], counts: list[int], padding: int) -> None:
        """A ragged chunk for some rows."""
        pieces = [(row, min(n, LONGEST - self.lengths[row])) for row, n in zip(order, counts, strict=False)]
        entries = [(row, self.lengths[row] + i) for row, n in pieces for i in range(n)]
        padded = entries + [(0, -1)] * padding
        indptr = [0]
        for _, n in pieces:
            indptr.append(indptr[-1] + n)
        ragged = {
            "positions": self._int([position for _, position in padded]),
            "rows": self._int([row for row, _ in pieces]),
            "chunk_indptr": self._int(indptr),
        }
        for layer in range(LAYERS):
            decisions = self._decisions(len(padded))
            keys, flags = self._codes(layer, padded), decisions.to(self.device)
            queries, before = self._queries(len(padded)), self._before()
            with on(self.backend):
                attended = prefill_attention(
                    queries, keys, -keys, flags, self.cache.layer(layer), **ragged, shift=self.shift, sm_scale=_SCALE
                )
                self._check_chunk(layer, entries, queries, attended, decisions)
                prefill_append(keys, -keys, flags, self.cache.layer(layer), **ragged, shift=self.shift)
            given: dict[int, list[tuple[int, int]]] = {}
            for index, (row, position) in enumerate(entries):
                given.setdefault(row, []).append((position, index))
            self._settle(layer, given, decisions, before)
        for row, n in pieces:
            self.lengths[row] += n

    @rule(rows=st.lists(st.integers(-1, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
    def release(self, rows: list[int]) -> None:
        """Rows go to new owners; their pages become poison."""
        with on(self.backend):
            self.cache.release(rows)
        for row in rows:
            if row >= 0:
                self.lengths[row] = 0
                self.owners[row] += 1
                self.starved.discard(row)
        for span in self.expected:
            if span[1] in rows:
                self.expected[span] = Span()
        free = self.cache.free_pages[: int(self.cache.num_free)].long()
        self.cache.k_pages[free] = torch.nan
        self.cache.v_pages[free] = torch.nan

    @invariant()
    def pages_and_slots_are_right(self) -> None:
        """No page twice, none lost, poison intact; each span holds exactly its tokens, which its ring finds."""
        check_pool(self.cache)
        assert set(self.cache.starved_rows()) == self.starved
        rings = self.cache.ring.tolist()
        for span, expected in self.expected.items():
            layer, row, head = span
            keys, values = read_span(self.cache, *span)
            assert torch.equal(values, -keys)
            codes = keys.long().tolist()
            assert all(code[:5] == [layer, row, head, code[3], self.owners[row]] for code in codes)
            positions = [code[3] for code in codes]
            assert sorted(positions) == sorted(expected.stored)
            newest = max(expected.flags, default=-1)
            for position in range(max(0, newest - self.window), newest + 1):
                entry = rings[layer][row][head][position % (self.window + 1)]
                assert positions[entry >> 1] == position
                assert entry & 1 == expected.flags[position]

    def _settle(
        self, layer: int, given: dict[int, list[tuple[int, int]]], decisions: torch.Tensor, before: int
    ) -> None:
        """Update the lists: a span took all its tokens, or none if its row is starved, and that for want of pages."""
        lengths, flags = self.cache.live_len.tolist(), set(self.cache.starved_rows())
        wanted, took = 0, 0
        for row, tokens in given.items():
            if row in self.starved:
                continue
            for head in range(HEADS):
                span = (layer, row, head)
                old = after = self.expected[span]
                for position, index in tokens:
                    after = after.given(position, bool(decisions[index, head]), self.window, self.shift)
                pages = -(-len(after.stored) // PAGE) - -(-len(old.stored) // PAGE)
                wanted += pages
                if row not in flags or (lengths[layer][row][head] == len(after.stored) and self._newest(span, after)):
                    self.expected[span] = after
                    took += pages
        assert int(self.cache.num_free) == before - took
        assert flags >= self.starved
        assert flags <= self.starved | set(given)
        assert flags == self.starved or wanted > before
        self.starved = flags

    def _newest(self, span: tuple[int, int, int], after: Span) -> bool:
        keys, _ = read_span(self.cache, *span)
        return max(after.stored) in keys[:, 3].long().tolist()

    def _before(self) -> int:
        return int(self.cache.num_free)

    def _check_chunk(
        self, layer: int, entries: list[tuple[int, int]], queries: torch.Tensor, attended: torch.Tensor,
        decisions: torch.Tensor,
    ) -> None:  # fmt: skip
        codes = self._codes(layer, entries).double().cpu()
        for head in range(HEADS):
            own = slice(head * GROUP, (head + 1) * GROUP)
            running: dict[int, Span] = {}
            for index, (row, position) in enumerate(entries):
                if row in self.starved:
                    continue
                span = running.get(row, self.expected[layer, row, head])
                running[row] = span = span.given(position, bool(decisions[index, head]), self.window, self.shift)
                keys = codes[index, head].repeat(len(span.stored), 1)
                keys[:, 3] = torch.tensor(sorted(span.stored))
                self._compare(attended[index, own], queries[index, own], keys)
        assert attended.isfinite().all()
        assert not attended[len(entries) :].any()

    def _attend(self, entries: list[tuple[int, int]]) -> None:
        """Starved rows too: they attend to what they hold."""
        queries = self._queries(len(entries))
        for layer in range(LAYERS):
            with on(self.backend):
                out = decode_attention(
                    queries, self.cache.layer(layer), positions=self._int([position for _, position in entries]),
                    rows=self._int([row for row, _ in entries]), sm_scale=_SCALE,
                )  # fmt: skip
            assert out.isfinite().all()
            for index, (row, position) in enumerate(entries):
                for head in range(HEADS):
                    own = slice(head * GROUP, (head + 1) * GROUP)
                    keys, _ = read_span(self.cache, layer, row, head)
                    self._compare(out[index, own], queries[index, own], keys if position >= 0 else keys[:0])

    def _compare(self, out: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> None:
        expected = attend(queries.double().cpu(), list(keys), list(-keys), _SCALE)
        error = (out.double().cpu() - expected).abs().max()
        assert error <= LOGITS_RELATIVE * keys.abs().amax() if len(keys) else error == 0

    def _codes(self, layer: int, entries: list[tuple[int, int]]) -> torch.Tensor:
        """Keys ``[n, HEADS, DIM]``; padding is NaN."""
        codes = torch.zeros(len(entries), HEADS, DIM)
        for index, (row, position) in enumerate(entries):
            for head in range(HEADS):
                codes[index, head, :5] = torch.tensor([layer, row, head, position, self.owners[row]])
            if position < 0:
                codes[index] = torch.nan
        return codes.to(self.device)

    def _decisions(self, tokens: int) -> torch.Tensor:
        return torch.rand(tokens, HEADS, generator=self.generator) < 0.6

    def _queries(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, HEADS * GROUP, DIM, generator=self.generator).to(self.device)

    def _int(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
