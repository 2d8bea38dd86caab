"""A cache under test beside the plain definition of what each of its spans was given, driven through the public ops."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastdms.ops import decode_append, decode_attention, prefill_append, prefill_attention, prefill_rope
from fastdms.ops.quantise import FP8_MAX
from fastdms.ops.span_cache import SpanCache
from tests.ops.definition import History, attend, prepare_token
from tests.ops.harness import check_pool, make_cache, on, read_span, split_heads
from tests.tolerance import LOGITS_RELATIVE, rounding_band

FLAG_ALL = (1.0, -math.inf)
FLAG_NONE = (1.0, math.inf)
FLAG_HALF = (1.0, 0.05)  # the inputs are standard normal
NORM_EPS = 1e-5


class Results(NamedTuple):
    """q: rotated queries, out: attention, ``[n, Hq, D]`` on the CPU, each beside its fp64 oracle."""

    q: torch.Tensor
    q_oracle: torch.Tensor
    out: torch.Tensor
    out_oracle: torch.Tensor


class Rig:
    """One layer, a few rows. The inputs hang on (row, position) alone, so that any split into chunks sees the same."""

    def __init__(
        self,
        backend: str,
        *,
        heads: tuple[int, int, int] = (2, 2, 16),
        rows: int = 3,
        page_size: int = 16,
        window: int = 7,
        shift: int = 0,
        zero_borrowed: str = "none",
        decision: tuple[float, float] = FLAG_HALF,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        use_alpha: bool = False,
        use_norms: bool = False,
        max_tokens: int = 64,
        num_pages: int = 64,
        seed: int = 0,
    ) -> None:
        num_kv_heads, group, head_dim = heads
        self.backend, self.num_kv_heads, self.shift, self.window = backend, num_kv_heads, shift, window
        self.zero_borrowed, self.decision, self.dtype = zero_borrowed, decision, dtype
        self.sm_scale = head_dim**-0.5
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.fused = normal(rows, max_tokens, (group + 2) * num_kv_heads, head_dim)
        self.alpha = normal(rows, max_tokens, num_kv_heads) if use_alpha else None
        self.norms = (normal(head_dim), normal(head_dim)) if use_norms else None
        angles = torch.rand(max_tokens, head_dim // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        with on(backend) as device:
            self.device = device
        self.cache = make_cache(
            device, seed=seed, num_rows=rows, num_kv_heads=num_kv_heads, head_dim=head_dim, window_tokens=window,
            max_context=max_tokens, kv_dtype=kv_dtype or dtype, num_pages=num_pages, page_size=page_size,
        )  # fmt: skip
        self.histories = [[History(window, shift) for _ in range(num_kv_heads)] for _ in range(rows)]

    @property
    def layer(self) -> SpanCache:
        return self.cache.layer(0)

    def length(self, row: int) -> int:
        """Tokens that the row was given."""
        return len(self.histories[row][0].tokens)

    def decode(self, rows: list[int]) -> Results:
        """One more token for each row in ``rows``; an entry of -1 is padding."""
        entries = [(row, self.length(row) if row >= 0 else -1) for row in rows]
        q, k, v, alpha = self._inputs(entries)
        positions, of_rows = self._int([position for _, position in entries]), self._int([max(r, 0) for r in rows])
        with on(self.backend):
            rotated = decode_append(
                q, k, v, self.layer, positions=positions, rows=of_rows, cos=self.cos.to(self.device),
                sin=self.sin.to(self.device), decision=self.decision, shift=self.shift,
                zero_borrowed=self.zero_borrowed, alpha=alpha, norm_eps=NORM_EPS, **self._norms(),
            )  # fmt: skip
            self._remember(entries)
            self._read_back(rows)
            out = decode_attention(
                rotated, self.layer, positions=positions, rows=of_rows, sm_scale=self.sm_scale
            )  # fmt: skip
        q_oracle = self._query_oracle(entries)
        out_oracle = torch.stack([self._attend(*entry, query) for entry, query in zip(entries, rotated, strict=True)])
        return Results(rotated.cpu(), q_oracle, out.cpu(), out_oracle)

    def prefill(self, pieces: list[tuple[int, int]], padding: int = 0) -> Results:
        """``(row, n)``: n more tokens of the row, which may be none; then ``padding`` tokens that belong to no row."""
        entries = [(row, self.length(row) + i) for row, n in pieces for i in range(n)]
        indptr = [0]
        for _, n in pieces:
            indptr.append(indptr[-1] + n)
        q, k, v, alpha = self._inputs(entries + [(-1, -1)] * padding)
        positions = self._int([position for _, position in entries] + [-1] * padding)
        ragged = {
            "positions": positions,
            "rows": self._int([row for row, _ in pieces]),
            "chunk_indptr": self._int(indptr),
        }
        before = [row for row, _ in pieces]
        with on(self.backend):
            rotated, k, decisions = prefill_rope(
                q, k, positions=positions, cos=self.cos.to(self.device), sin=self.sin.to(self.device),
                decision=self.decision, zero_borrowed=self.zero_borrowed, alpha=alpha, norm_eps=NORM_EPS,
                **self._norms(),
            )  # fmt: skip
            self._remember(entries, k)
            out = prefill_attention(
                rotated, k, v, decisions, self.layer, **ragged, shift=self.shift, sm_scale=self.sm_scale
            )
            out_oracle = [self._attend(*entry, query) for entry, query in zip(entries, rotated, strict=False)]
            prefill_append(k, v, decisions, self.layer, **ragged, shift=self.shift)
            self._read_back(before)
        assert not out[len(entries) :].any(), "padding tokens give zeros"
        n = len(entries)
        stacked = torch.stack(out_oracle) if n else torch.zeros(out[:0].shape, dtype=torch.float64)
        return Results(rotated[:n].cpu(), self._query_oracle(entries), out[:n].cpu(), stacked)

    def check(self) -> None:
        """The pool's invariants, and the rings of all rows."""
        check_pool(self.cache)
        ring = self.cache.ring[0].cpu()
        for row, histories in enumerate(self.histories):
            for head, history in enumerate(histories):
                for position in history.recent():
                    entry = int(ring[row, head, position % (self.window + 1)])
                    assert entry & 1 == history.tokens[position].flagged, f"flag of token {position} in the ring"
                    assert history.stored_at[position] == entry >> 1, f"slot of token {position} in the ring"

    def _read_back(self, rows: list[int]) -> None:
        """Find out which token lies in each slot, and hold it against the definition."""
        for row in {row for row in rows if row >= 0}:
            for head, history in enumerate(self.histories[row]):
                if not history.tokens:
                    continue
                keys, values = read_span(self.cache, 0, row, head)
                found = torch.cdist(keys, history.keys()).argmin(1)
                assert sorted(found.tolist()) == history.stored(), f"row {row}, head {head} holds the wrong tokens"
                self._check_stored(keys, history.keys()[found])
                self._check_stored(values, history.values()[found])
                history.stored_at = {position: slot for slot, position in enumerate(found.tolist())}
                for position, key, value in zip(found.tolist(), keys, values, strict=True):
                    history.tokens[position].as_stored = (key, value)

    def _check_stored(self, stored: torch.Tensor, given: torch.Tensor) -> None:
        """``[n, D]`` fp64 each."""
        kv_dtype, largest = self.cache.config.kv_dtype, given.abs().amax(-1, keepdim=True)
        scale = largest / FP8_MAX if kv_dtype == torch.float8_e4m3fn else torch.ones_like(largest)
        allowed = rounding_band(given / scale, kv_dtype) * scale + rounding_band(given, self.dtype)
        error = (stored - given).abs() - allowed - LOGITS_RELATIVE * largest
        assert bool((error <= 0).all()), "a stored token is too far from the one given"

    def _attend(self, row: int, position: int, query: torch.Tensor) -> torch.Tensor:
        query = query.double().cpu()
        if position < 0:
            return torch.zeros_like(query)
        grouped = query.view(self.num_kv_heads, -1, query.shape[-1])
        out = []
        for history, queries in zip(self.histories[row], grouped, strict=True):
            tokens = [history.tokens[j].as_stored for j in history.visible(position)]
            out.append(attend(queries, [key for key, _ in tokens], [value for _, value in tokens], self.sm_scale))
        return torch.cat(out)

    def _prepared(self, row: int, position: int) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        q, k, _ = split_heads(self.fused[row, position : position + 1].double(), self.num_kv_heads)
        alpha = None if self.alpha is None else self.alpha[row, position].double()
        norms = None if self.norms is None else (self.norms[0].double(), self.norms[1].double())
        angles = (self.cos[position].double(), self.sin[position].double())
        return prepare_token(q[0], k[0], alpha, norms, NORM_EPS, angles, self.decision, self.zero_borrowed)

    def _query_oracle(self, entries: list[tuple[int, int]]) -> torch.Tensor:
        heads, head_dim = self.fused.shape[2] - 2 * self.num_kv_heads, self.fused.shape[3]
        zero = torch.zeros(heads, head_dim, dtype=torch.float64)
        oracles = [zero if position < 0 else self._prepared(row, position)[0] for row, position in entries]
        return torch.stack(oracles) if oracles else zero[None][:0]

    def _remember(self, entries: list[tuple[int, int]], k: torch.Tensor | None = None) -> None:
        """Append to the histories; ``k``: the rotated keys as prefill passes them on and attends to them."""
        passed = None if k is None else k.double().cpu()
        for index, (row, position) in enumerate(entries):
            if position < 0:
                continue
            _, keys, decisions = self._prepared(row, position)
            if passed is not None:
                self._check_stored(passed[index], keys)
            values = self.fused[row, position, -self.num_kv_heads :].double()
            for head, history in enumerate(self.histories[row]):
                history.append(keys[head] if passed is None else passed[index, head], values[head], decisions[head])

    def _inputs(
        self, entries: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Strided q, k, v and alpha; padding has NaN keys, values and decision inputs."""
        rows, positions = [row for row, _ in entries], [position for _, position in entries]
        fused = self.fused[rows, positions].to(self.device)
        padded = torch.tensor([position < 0 for position in positions], dtype=torch.bool, device=self.device)
        q, k, v = split_heads(fused, self.num_kv_heads)
        k[padded], v[padded] = torch.nan, torch.nan
        if self.alpha is None:
            return q, k, v, None
        alpha = torch.stack((self.alpha[rows, positions],) * 2, -1).to(self.device)[..., 0]
        alpha[padded] = torch.nan
        return q, k, v, alpha

    def _norms(self) -> dict[str, torch.Tensor]:
        return {} if self.norms is None else {
            "q_norm": self.norms[0].to(self.device), "k_norm": self.norms[1].to(self.device)
        }  # fmt: skip

    def _int(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def release(self, rows: list[int]) -> None:
        """Empty the rows, and poison the pages that they gave back."""
        with on(self.backend):
            self.cache.release(rows)
        for row in rows:
            self.histories[row] = [History(self.window, self.shift) for _ in range(self.num_kv_heads)]
        free = self.cache.free_pages[: int(self.cache.num_free)].long()
        for pages in (self.cache.k_pages, self.cache.v_pages):
            flat = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
            flat[free] = 0xFF if pages.dtype.itemsize == 1 else torch.nan
