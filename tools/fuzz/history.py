"""A history of the cache: chunks, decode steps, releases and starvation, each call held against its reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastdms.ops.rope_decide import head_norm
from fastdms.tools.fuzz.budget import FP32_ROUNDING, Budget, WrongAnswer, dot_dtype
from fastdms.tools.fuzz.calls import Call, Evaluated, evaluate, kernels, views
from fastdms.tools.fuzz.checks import check_append, check_release
from fastdms.tools.fuzz.draw import Setting, numbers, pick, rope_tables
from fastdms.tools.fuzz.invalid import check_rejected
from fastdms.tools.fuzz.state import State
from fastdms.tools.fuzz.tally import Tally

__all__ = ["CACHE_OPS", "CacheHistory"]

CACHE_OPS = (
    "decode_append", "decode_attention", "prefill_append", "prefill_attention", "prefill_rope", "release",
)  # fmt: skip
_NORM_EPS = 1e-5
_DECISIONS = ((1.0, 0.05), (1.0, 0.05), (-2.0, 0.3), (1.0, -math.inf), (1.0, math.inf))
_INVALID_CALLS = 0.15  # share of the calls before which a bad one is made


class CacheHistory:
    """One state from empty to the last of its steps. ``ops``: those that run by kernel; the others' references run."""

    def __init__(self, setting: Setting, rng: np.random.Generator, device: torch.device, ops: tuple[str, ...],
                 tally: Tally) -> None:  # fmt: skip
        self._setting, self._rng, self._device, self._ops, self._tally = setting, rng, device, ops, tally
        self._state = State(setting, rng, device)
        self._lengths = [0] * setting.num_rows
        self._tables = rope_tables(rng, setting.max_positions, setting.head_dim)
        self._norms: dict[str, torch.Tensor | None] = {
            name: numbers(rng, (setting.head_dim,), setting.dtype) if setting.use_norms else None
            for name in ("q_norm", "k_norm")
        }
        self._sm_scale = setting.head_dim**-0.5 * float(rng.choice([0.5, 1.0, 2.0]))

    def run(self, steps: int) -> None:
        """Take ``steps`` steps; WrongAnswer at the first call that is wrong."""
        for _ in range(steps):
            step = self._rng.choice(["decode", "chunk", "release"], p=[0.6, 0.28, 0.12])
            {"decode": self._decode, "chunk": self._chunk, "release": self._release}[str(step)]()

    def _decode(self) -> None:
        """One token for some rows."""
        s, rng = self._setting, self._rng
        size = pick(rng, *s.batch_sizes)
        open_rows = [row for row in range(s.num_rows) if self._lengths[row] < s.max_positions]
        count = min(int(rng.integers(size + 1)) if rng.random() < 0.5 else size, len(open_rows))
        entries = [(row, self._lengths[row]) for row in rng.permutation(open_rows)[:count].tolist()]
        entries += [(int(rng.integers(s.num_rows)), -1)] * (size - count)
        entries = [entries[i] for i in rng.permutation(size)]
        batch = {"rows": _ints([row for row, _ in entries]), "positions": _ints([at for _, at in entries])}
        for layer in range(s.num_layers):
            inputs, decision = self._tokens(batch["positions"])
            call = self._call("decode_append", {**inputs, **self._norms, **self._tables, **batch}, decision=decision,
                              zero_borrowed=s.zero_borrowed, norm_eps=_NORM_EPS, shift=s.shift)  # fmt: skip
            (rotated,) = self._apply(call, layer, batch["positions"] >= 0, batch["rows"])
            attention = self._call("decode_attention", {"q": rotated, **batch}, sm_scale=self._sm_scale)
            self._apply(attention, layer, batch["positions"] >= 0, batch["rows"])
        for row, at in entries:
            self._lengths[row] += at >= 0

    def _chunk(self) -> None:
        """Some tokens for some rows, at times none, and padding up to one of the setting's sizes."""
        s, rng = self._setting, self._rng
        size = pick(rng, *s.chunk_tokens)
        left, pieces = size, []
        for row in rng.permutation(s.num_rows)[: pick(rng, *s.batch_sizes)].tolist():
            most = min(left, s.max_positions - self._lengths[row])
            n = min(most, int(rng.integers(0, 2 * size // 3 + 2)))
            pieces.append((row, n))
            left -= n
        entries = [(row, self._lengths[row] + i) for row, n in pieces for i in range(n)]
        positions = _ints([at for _, at in entries] + [-1] * left)
        ragged = {
            "positions": positions,
            "rows": _ints([row for row, _ in pieces]),
            "chunk_indptr": _ints([0, *np.cumsum([n for _, n in pieces]).tolist()]),
        }
        rows = _ints([row for row, _ in entries] + [0] * left)
        for layer in range(s.num_layers):
            inputs, decision = self._tokens(positions)
            values = inputs.pop("v")
            call = self._call("prefill_rope", {**inputs, **self._norms, **self._tables, "positions": positions},
                              decision=decision, zero_borrowed=s.zero_borrowed, norm_eps=_NORM_EPS)  # fmt: skip
            q, k, decisions = self._apply(call, layer, positions >= 0, rows)
            k[positions < 0] = torch.nan
            shared = {"k": k, "v": values, "decisions": decisions, **ragged}
            attention = self._call("prefill_attention", {"q": q, **shared}, shift=s.shift, sm_scale=self._sm_scale)
            self._apply(attention, layer, positions >= 0, rows)
            self._apply(self._call("prefill_append", shared, shift=s.shift), layer, positions >= 0, rows)
        for row, n in pieces:
            self._lengths[row] += n

    def _release(self) -> None:
        """Some rows go to new owners."""
        s, rng, op = self._setting, self._rng, "release"
        rows = rng.permutation(s.num_rows)[: int(rng.integers(1, s.num_rows + 1))]
        rows = np.where(rng.random(rows.shape) < 0.2, -1, rows)
        before = self._state.snapshot()
        names = ("page_table", "live_len", "free_pages", "num_free", "starved")
        inputs = {"rows": _ints(rows.tolist())}
        call = Call(op=op, inputs=inputs, options={"page_size": s.page_size})
        plain = {name: getattr(before, name).clone() for name in names}
        evaluate(Call(op=op, inputs=inputs, options={"page_size": s.page_size, **plain}), None)
        expected = before.layer(0)._replace(**plain)
        state = {name: self._state[name] for name in names}
        if op in self._ops:
            self._try_invalid(call, None, state)
            placed = call.place(self._device)
            with kernels(self._device, op):
                call.run(views(placed), None, **state)
            self._state.check_guards(op)
            check_release(before, self._state.snapshot(), inputs["rows"], expected)
            self._tally.count(op, int((inputs["rows"] >= 0).sum()) * s.num_layers * s.num_kv_heads)
        else:
            for name in names:
                state[name].copy_(plain[name])
        for row in rows[rows >= 0].tolist():
            self._lengths[row] = 0
        self._state.poison_free_pages()

    def _call(self, op: str, inputs: dict[str, torch.Tensor | None], **options: Any) -> Call:
        s = self._setting
        heads, each = (0, s.gap_heads, s.gap_channels), (0, s.gap_heads)
        gaps = {"q": heads, "k": heads, "v": heads, "alpha": each, "decisions": each}
        return Call(op=op, inputs=inputs, options=options, gaps=gaps)

    def _apply(self, call: Call, layer: int, real_tokens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Make the call; WrongAnswer unless state and outputs are right. real_tokens, rows: of each token."""
        s, op = self._setting, call.op
        appends, takes_cache = op.endswith("append"), op != "prefill_rope"
        before = self._state.snapshot()
        if op not in self._ops:
            cache = before.layer(layer) if takes_cache else None
            outputs = evaluate(call, cache).outputs
            if appends and cache is not None:
                self._state.load(before.with_layer(layer, cache))
            return outputs
        granted = before.layer(layer, s.num_rows * s.num_kv_heads * s.max_pages if appends else 0)
        dot = dot_dtype(s.dtype, s.kv_dtype) if op.endswith("attention") else torch.float32
        expected = evaluate(call, granted if takes_cache else None, dot)
        cache = self._state.layer(layer) if takes_cache else None
        self._try_invalid(call, cache, {})
        outputs, _ = call.run_kernel(self._device, cache)
        self._state.check_guards(op)
        after = self._state.snapshot()
        heads = torch.ones(s.num_kv_heads, dtype=torch.bool)
        if appends:
            touched = torch.zeros(s.num_rows, dtype=torch.bool)
            touched[rows[real_tokens].long()] = True
            slack = (s.head_dim + 8) * self._largest(call, "k") if op == "decode_append" else -1.0
            check_append(op, layer, before, after, granted, touched, slack)
            self._tally.count(op, int(touched.sum()) * s.num_kv_heads)
        else:
            if not before.same_as(after):
                raise WrongAnswer(op, "the cache was written to")
            self._tally.count(op, rows[real_tokens].unique().numel() * s.num_kv_heads)
        if op == "prefill_attention":  # a starved row's ring says nothing of its span: what it gives is left open
            starved = before.starved[rows.long()] != 0
            if not bool(outputs[0].isfinite().all()):
                raise WrongAnswer(op, "an output is not finite")
            real_tokens = real_tokens & ~starved
        if outputs:
            self._check_outputs(call, outputs, expected, real_tokens[:, None] & heads, real_tokens, granted)
        return outputs

    def _check_outputs(
        self, call: Call, outputs: tuple[torch.Tensor, ...], expected: Evaluated, real: torch.Tensor,
        real_tokens: torch.Tensor, cache: Any,
    ) -> None:  # fmt: skip
        op = call.op
        if op in ("decode_append", "decode_attention", "prefill_attention"):
            padded = call.inputs["positions"] < 0  # type: ignore[operator]
            if bool((outputs[0][padded] != 0).any()):
                raise WrongAnswer(op, "the output of padding is not zero")
        budget = self._budget(call, cache)
        for index, (mine, plain, truth) in enumerate(zip(outputs, expected.plain, expected.truth, strict=True)):
            if mine.dtype == torch.bool:
                if not torch.equal(mine[real_tokens], expected.outputs[index][real_tokens]):
                    raise WrongAnswer(op, "decisions differ")
            else:
                budget.check(op, f"output {index}", mine, plain, truth, real)

    def _budget(self, call: Call, cache: Any) -> Budget:
        """Sums over the channels and, in attention, over all keys, whose scores may be large."""
        head_dim = self._setting.head_dim
        if not call.op.endswith("attention"):
            return Budget(terms=head_dim + 8, scale=max(self._largest(call, "q"), self._largest(call, "k")))
        keys = [_longest(cache.k_pages, cache.k_scales), self._longest_input(call, "k")]
        values = [_longest(cache.v_pages, cache.v_scales), self._longest_input(call, "v")]
        score = self._sm_scale * self._longest_input(call, "q") * max(keys)
        tokens = int(cache.live_len.max()) + (call.inputs["q"].shape[0] if call.op == "prefill_attention" else 0)  # type: ignore[union-attr]
        return Budget(terms=tokens + 2 * (head_dim + 4) * max(1.0, score), scale=max(values))

    def _largest(self, call: Call, name: str) -> float:
        """The largest number that arithmetic on an input of heads meets, norm weights included."""
        x, weight = call.inputs[name], self._norms[f"{name}_norm"]
        largest = _largest_finite(x)
        if weight is None:
            return 2 * largest
        return 2 * math.sqrt(self._setting.head_dim) * float(weight.abs().max())  # what a normalised channel can be

    @staticmethod
    def _longest_input(call: Call, name: str) -> float:
        x = call.inputs.get(name)
        return 0.0 if x is None or x.numel() == 0 else _largest_finite(x.float().norm(dim=-1))

    def _tokens(self, positions: torch.Tensor) -> tuple[dict[str, torch.Tensor | None], tuple[float, float]]:
        """Inputs of one layer, NaN where padded, and a decision rule that none of them is too close to."""
        s, rng, n = self._setting, self._rng, positions.numel()
        inputs: dict[str, torch.Tensor | None] = {
            "q": numbers(rng, (n, s.num_heads, s.head_dim), s.dtype),
            "k": numbers(rng, (n, s.num_kv_heads, s.head_dim), s.dtype),
            "v": numbers(rng, (n, s.num_kv_heads, s.head_dim), s.dtype),
            "alpha": numbers(rng, (n, s.num_kv_heads), s.dtype) if s.use_alpha else None,
        }
        decision = _DECISIONS[int(rng.integers(len(_DECISIONS)))]
        q, norm = inputs["q"], self._norms["q_norm"]
        if norm is not None and not s.use_alpha and q is not None:
            given = head_norm(q, norm, _NORM_EPS)[:, :: s.group, -1] * decision[0]
            margin = 8 * (s.head_dim + 8) * FP32_ROUNDING * max(1.0, _largest_finite(given))
            while bool(((given - decision[1]).abs() < margin).any()):  # rounding would decide
                decision = (decision[0], float(rng.uniform(-0.5, 0.5)))
        for name in ("k", "v", "alpha"):
            x = inputs[name]
            if x is not None:
                x[positions < 0] = torch.nan
        return inputs, decision

    def _try_invalid(self, call: Call, cache: Any, options: dict[str, torch.Tensor]) -> None:
        if self._rng.random() < _INVALID_CALLS and not self._setting.far_pages:  # which would be copied whole
            check_rejected(call, self._rng, self._device, cache, options)
            self._tally.reject(call.op)


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _largest_finite(x: torch.Tensor | None) -> float:
    return 0.0 if x is None or x.numel() == 0 else float(x.float().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _longest(pages: torch.Tensor, scales: torch.Tensor) -> float:
    """Norm of the longest stored vector."""
    norms = pages.float().norm(dim=-1)
    return _largest_finite(norms * scales.float() if scales.numel() else norms)
