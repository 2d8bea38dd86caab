"""Ops without a cache, one call at a time: decode_linear, dequantise, dense_attention, sample and soft_attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdms.ops import MOST_ROWS, NOT_FINITE, soft_attention
from fastdms.ops.decode_linear import reference as linear_reference
from fastdms.ops.int4 import GROUPS, dequantise_int4, quantise_int4
from fastdms.ops.sample.counts import MOST_COUNTED
from fastdms.ops.sample.reference import LARGEST_UNIFORM, penalised, philox
from fastdms.ops.soft_attention import reference as soft_reference
from fastdms.tools.fuzz.budget import FP32_ROUNDING, Budget, WrongAnswer, in_precision
from fastdms.tools.fuzz.calls import Call, Placed, evaluate, kernels, same_bytes
from fastdms.tools.fuzz.draw import Setting, numbers, pick
from fastdms.tools.fuzz.invalid import check_rejected
from fastdms.tools.fuzz.tally import Tally

__all__ = ["SINGLE_OPS", "run_single"]

SINGLE_OPS = ("decode_linear", "dense_attention", "dequantise", "sample", "soft_attention")
_INVALID_CALLS = 0.15
_MOST_CHANNELS = 2000  # the reference multiplies in fp64, on the CPU
_MANY_CHANNELS = (8000, 9000)  # around what fills every multiprocessor of a Hopper card
_SOFT_TOKENS = 250  # the reference holds a score for each pair of tokens
# log(noise) with noise >= 2^-6 computed as -log(1 - u) to 2^-21: off by 2^-15 of itself, and no more beyond the series.
_NOISE_ERROR = 2.0**-14
_PENALTIES = ((0.0, -2.0, 0.3, 2.0), (0.0, -2.0, 0.1, 2.0), (1.0, 1e-30, 0.7, 1.2, 2.0))
_COUNTS = np.array([0, 0, 0, 1, 5, MOST_COUNTED, -1, -MOST_COUNTED - 1], np.int16)


def run_single(op: str, setting: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    """One call of ``op`` and perhaps an invalid one before it; WrongAnswer if it is wrong."""
    runs = {
        "decode_linear": _linear, "dense_attention": _dense, "dequantise": _dequantise, "sample": _sample,
        "soft_attention": _soft,
    }  # fmt: skip
    runs[op](setting, rng, device, tally)


def _reject(call: Call, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    if rng.random() < _INVALID_CALLS:
        check_rejected(call, rng, device, None, {})
        tally.reject(call.op)


def _linear(s: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    op, rows, dtype = "decode_linear", pick(rng, 1, int(rng.integers(0, MOST_ROWS + 1))), s.dtype
    width = min(s.num_heads * s.head_dim, _MOST_CHANNELS)
    depth = pick(rng, s.head_dim, width, int(rng.integers(1, 600)))
    outputs = pick(rng, s.num_kv_heads, width, min(s.vocab, _MOST_CHANNELS))
    many, wide = int(rng.integers(*_MANY_CHANNELS)), 256 * int(rng.integers(1, 5))
    if rng.random() < 0.04 and device.type == "cuda":  # where normed rows of as many have a kernel of their own
        outputs, depth = many, wide
    swiglu, fp32_out = (bool(rng.random() < 0.4) for _ in range(2))
    channels = 2 * outputs if swiglu else outputs
    group = pick(rng, 0, 0, *GROUPS)  # 0: no int4
    if group:
        depth = -(-depth // group) * group
    exact = numbers(rng, (channels, depth), torch.float32) / depth**0.5
    if group:
        weight, scale = _as_int4(exact, group, rng)
        exact = dequantise_int4(weight, scale, torch.float32)
    elif s.kv_dtype == torch.float8_e4m3fn:
        weight, scale = _as_fp8(exact)
    else:
        weight, scale = exact.to(dtype), None

    def perhaps(*shape: int) -> torch.Tensor | None:
        return numbers(rng, shape, dtype) if rng.random() < 0.5 else None

    inputs = {
        "x": numbers(rng, (rows, depth), dtype), "weight": weight, "scale": scale, "bias": perhaps(channels),
        "norm": perhaps(depth), "residual": perhaps(rows, outputs),
    }  # fmt: skip
    options: dict[str, Any] = {"norm_eps": float(rng.choice([1e-5, 1e-6])), "swiglu": swiglu, "fp32_out": fp32_out}
    gaps = {name: (0, s.gap_channels) for name in ("x", "residual") if inputs[name] is not None}
    call = Call(op=op, inputs=inputs, options=options, gaps=gaps)
    _reject(call, rng, device, tally)
    (out,), _ = call.run_kernel(device)
    expected = evaluate(call, None, dtype)
    # What the sums are made of, however they cancel; a kernel rounds the normalised rows, whose sum may be small, too.
    parts = (inputs[name] for name in ("x", "bias", "norm", "residual"))
    x, bias, norm, residual = (None if part is None else part.float().abs() for part in parts)
    assert x is not None
    sizes = linear_reference.decode_linear(
        x, exact.abs(), None, bias, norm, options["norm_eps"], residual, swiglu, True
    )
    terms = depth + 8 + (torch.finfo(dtype).eps / FP32_ROUNDING if norm is not None else 0.0)
    budget = Budget(terms=terms, scale=float(sizes.max()) if rows else 0.0)
    budget.check(op, "output", out, expected.plain[0], expected.truth[0], torch.ones(rows, dtype=torch.bool))
    tally.count(op, rows)


def _as_int4(exact: torch.Tensor, group: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale = quantise_int4(exact, group)
    return weight, scale.to((torch.bfloat16, torch.float16, torch.float32)[int(rng.integers(3))])


def _as_fp8(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float8_e4m3fn
    scale = exact.abs().amax(1).clamp_min(1e-6) / torch.finfo(dtype).max
    return (exact / scale[:, None]).to(dtype), scale


def _dequantise(s: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    op, width = "dequantise", min(s.num_heads * s.head_dim, _MOST_CHANNELS)
    rows, depth = (pick(rng, 1, s.head_dim, width, int(rng.integers(1, 600))) for _ in range(2))
    group = pick(rng, 0, *GROUPS)  # 0: fp8
    if group:
        depth = -(-depth // group) * group
    exact = numbers(rng, (rows, depth), torch.float32) * 10.0 ** float(rng.integers(-6, 3))
    weight, scale = _as_int4(exact, group, rng) if group else _as_fp8(exact)
    call = Call(op=op, inputs={"weight": weight, "scale": scale}, options={"dtype": s.dtype})
    _reject(call, rng, device, tally)
    (out,), _ = call.run_kernel(device)
    (expected,) = call.run(call.inputs, None)
    if not same_bytes(out, expected):
        error = (out.double() - expected.double()).abs()
        raise WrongAnswer(op, f"{int((error != 0).sum())} of {error.numel()} weights differ", float(error.max()))
    tally.count(op, 1)


def _dense(s: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    op, tokens = "dense_attention", pick(rng, 0, *s.chunk_tokens * 3)
    start = pick(rng, 0, int(rng.integers(0, 2 * s.max_positions)))
    spare = int(rng.integers(0, 5))
    shape = (start + tokens + spare, s.num_kv_heads, s.head_dim)
    history = {name: numbers(rng, shape, s.dtype) for name in ("k_history", "v_history")}
    for x in history.values():
        x[start:] = torch.nan
    heads = {name: numbers(rng, (tokens, n, s.head_dim), s.dtype)
             for name, n in (("q", s.num_heads), ("k", s.num_kv_heads), ("v", s.num_kv_heads))}  # fmt: skip
    scale = s.head_dim**-0.5
    gaps = dict.fromkeys(heads, (0, s.gap_heads, s.gap_channels))
    call = Call(op=op, inputs={**heads, **history}, options={"start": start, "sm_scale": scale}, gaps=gaps,
                mutated=tuple(history))  # fmt: skip
    _reject(call, rng, device, tally)
    (out,), written = call.run_kernel(device)
    expected = evaluate(call, None, s.dtype)  # writes to the history, too
    for name, x in history.items():
        if not same_bytes(written[name], x):
            raise WrongAnswer(op, f"{name} is not the old history with the chunk in its place")
    real = torch.ones(tokens, s.num_kv_heads, dtype=torch.bool)
    if tokens:
        seen = {name: x[: start + tokens].float().norm(dim=-1).max() for name, x in history.items()}
        score = scale * float(heads["q"].float().norm(dim=-1).max() * seen["k_history"])
        terms = start + tokens + 2 * (s.head_dim + 4) * max(1.0, score)
        budget = Budget(terms=terms, scale=float(seen["v_history"]))
        budget.check(op, "output", out, expected.plain[0], expected.truth[0], real)
    tally.count(op, s.num_kv_heads)


def _soft(s: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    op, batch, tokens = "soft_attention", pick(rng, 1, 2), min(_SOFT_TOKENS, pick(rng, 1, *s.chunk_tokens))
    dtype, window = s.dtype, pick(rng, s.window_tokens, tokens - 1, 2**40)
    heads = {name: numbers(rng, (batch, n, tokens, s.head_dim), dtype)
             for name, n in (("q", s.num_heads), ("k", s.num_kv_heads), ("v", s.num_kv_heads))}  # fmt: skip
    log_keep = torch.nn.functional.logsigmoid(3 * numbers(rng, (batch, s.num_kv_heads, tokens), torch.float32))
    log_keep[torch.from_numpy(rng.random(log_keep.shape) < rng.choice([0.0, 0.3, 1.0]))] = -torch.inf
    grad_out = numbers(rng, heads["q"].shape, dtype)
    options: dict[str, Any] = {"window_tokens": window, "sm_scale": s.head_dim**-0.5}
    gaps = {name: (0, pick(rng, 0, 1), 0, s.gap_channels) for name in heads}
    call = Call(op=op, inputs={**heads, "log_keep": log_keep}, options=options, gaps=gaps)
    _reject(call, rng, device, tally)
    placed = [x for x in (*call.place(device).values(), Placed(grad_out, device)) if x is not None]
    with kernels(device, op):
        leaves = [x.view.detach().requires_grad_() for x in placed[:4]]
        out = soft_attention(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, placed[4].view)
    if any(x.changed for x in placed):
        raise WrongAnswer(op, "an input was written to")
    given = [*heads.values(), log_keep, grad_out]
    truth, plain = (_soft_in(precision, given, options) for precision in (torch.float64, dtype))
    real = torch.ones(batch, s.num_kv_heads, dtype=torch.bool)
    long = {name: float(x.float().norm(dim=-1).max()) for name, x in (*heads.items(), ("grad", grad_out))}
    score = options["sm_scale"] * long["q"] * long["k"]
    terms = tokens * s.group + 2 * (s.head_dim + 4) * max(1.0, score)
    change = long["grad"] * long["v"]
    scales = (long["v"], options["sm_scale"] * change * long["k"], options["sm_scale"] * change * long["q"],
              long["grad"], change)  # fmt: skip
    for name, mine, rough, exact, scale in zip(
        ("out", "grad q", "grad k", "grad v", "grad log_keep"), (out, *grads), plain, truth, scales, strict=True
    ):
        Budget(terms=terms, scale=scale).check(op, name, mine.detach().cpu(), rough, exact, real)
    tally.count(op, 2 * real.numel())  # forward and backward


def _soft_in(precision: torch.dtype, given: list[torch.Tensor], options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Output and gradients, on the CPU, by the reference in ``precision`` throughout; grad_out comes last in given."""
    *given, grad_out = given
    numeric = list(options.values())
    names = ["q", "k", "v", "log_keep", *options]
    out, lse = in_precision(soft_reference.soft_attention, names, [*given, *numeric], precision)
    args = [grad_out, *given, out, lse, *numeric]
    names = ["grad_out", *names[:4], "out", "lse", *options]
    grads = in_precision(soft_reference.soft_attention_backward, names, args, precision)
    return (out, *grads)


def _sample(s: Setting, rng: np.random.Generator, device: torch.device, tally: Tally) -> None:
    op, batch, vocab = "sample", pick(rng, 0, *s.batch_sizes * 3), s.vocab
    logits = numbers(rng, (batch, vocab), torch.float32) * float(rng.choice([0.1, 1.0, 8.0]))
    if rng.random() < 0.5:
        logits = logits.to(torch.float16).float()  # ties
    logits[torch.from_numpy(rng.random(logits.shape) < rng.choice([0.0, 0.0, 0.4]))] = -torch.inf
    value = float(rng.choice([torch.nan, torch.inf, -torch.inf]))
    places = slice(None) if value == -torch.inf else int(rng.integers(vocab))
    logits[torch.from_numpy(rng.random(batch) < rng.choice([0.0, 0.0, 0.4])), places] = value

    def each(dtype: torch.dtype, *values: float) -> torch.Tensor:
        return torch.from_numpy(rng.choice(values, batch)).to(dtype)

    inputs: dict[str, torch.Tensor | None] = {
        "logits": logits,
        "temperature": each(torch.float32, 0.0, 0.0, 0.1, 0.7, 1.0, 2.0, 100.0),
        "top_k": each(torch.int32, 0, 0, 1, 2, 5, vocab, vocab + 1),
        "top_p": each(torch.float32, 1.0, 1.0, 0.95, 0.5, 0.1, 1e-6),
        "min_p": each(torch.float32, 0.0, 0.0, 0.05, 0.5, 1.0),
        "seeds": torch.from_numpy(rng.integers(0, 2 ** int(rng.integers(1, 64)), batch)),
        "positions": torch.from_numpy(rng.integers(0, 100_000, batch)).int(),
        "end_ids": torch.from_numpy(rng.integers(-1, vocab, (batch, int(rng.integers(0, 4))))).int(),
        "banned_until": each(torch.int32, 0, 50_000, 100_000),
        "penalties": torch.stack([each(torch.float32, *values) for values in _PENALTIES], 1),
        "count_rows": torch.from_numpy(np.where(rng.random(batch) < 0.5, rng.permutation(batch + 1)[:batch], -1)).int(),
        "counts": torch.from_numpy(rng.choice(_COUNTS, (batch + 1, vocab))),
    }
    call = Call(op=op, inputs=inputs, gaps={"logits": (0, s.gap_channels)}, mutated=("counts",))
    _reject(call, rng, device, tally)
    (tokens, ends), written = call.run_kernel(device)
    given = {name: x.clone() for name, x in inputs.items() if x is not None}
    evaluated = evaluate(call, None).outputs[0]  # counts its own tokens
    finite = logits.amax(-1).isfinite()
    for ids in (tokens, evaluated):
        right = torch.where(finite, (ids >= 0) & (ids < vocab), ids == NOT_FINITE)
        if ids.dtype != torch.int64 or not bool(right.all()):
            lost = (~finite).nonzero().flatten().tolist()
            message = f"tokens must be int64 below {vocab}, {NOT_FINITE} in rows {lost}, got {ids.dtype} {ids.tolist()}"
            raise WrongAnswer(op, message)
    for row, (token, expected) in enumerate(zip(tokens.tolist(), evaluated.tolist(), strict=True)):
        if token != expected:
            _check_tie(row, token, expected, {name: x[row] for name, x in given.items()} | {"counts": given["counts"]})
    _check_counted(tokens, ends, written["counts"], given)
    tally.count(op, batch)


def _check_counted(
    tokens: torch.Tensor, ends: torch.Tensor, counts: torch.Tensor, given: dict[str, torch.Tensor]
) -> None:
    """Each token is counted where its row says so and nowhere else, and ends the row if it is one that does.

    A row that is not finite counts any one, and may be ended by it.
    """
    expected = given["counts"].clone()
    for row, token in zip(given["count_rows"].tolist(), tokens.tolist(), strict=True):
        if row >= 0:
            if token == NOT_FINITE:  # the one that was counted, or one that can't be counted any more
                full = (expected[row] & MOST_COUNTED) == MOST_COUNTED
                token = int((2 * (counts[row] != expected[row]) + full.int()).argmax())
            expected[row, token] += int(expected[row, token]) & MOST_COUNTED < MOST_COUNTED
    if not same_bytes(counts, expected):
        raise WrongAnswer("sample", "counts are not what they were and the tokens")
    listed = (given["end_ids"] == tokens[:, None]).any(1)
    wrong = ends != listed & (given["positions"] + 1 >= given["banned_until"])
    if ends.dtype != torch.bool or bool(wrong[tokens != NOT_FINITE].any()):
        raise WrongAnswer("sample", f"these tokens end their rows, it says: {ends.tolist()}")


def _check_tie(row: int, token: int, expected: int, given: dict[str, torch.Tensor]) -> None:
    """Kernel and reference may differ only where fp64 can't tell their tokens apart by more than fp32 errs."""
    x = given["logits"].clone()
    if int(given["count_rows"]) >= 0:
        x = penalised(x, given["counts"][int(given["count_rows"])], given["penalties"])
    if bool(given["positions"] < given["banned_until"]):
        x[given["end_ids"][given["end_ids"] >= 0].long()] = -torch.inf
    largest, temperature = x.max(), given["temperature"]
    if not bool(largest.isfinite()):
        return  # any token will do
    if float(temperature) == 0.0:
        raise WrongAnswer("sample", f"row {row}: token {token} is not the likeliest, which is {expected}")
    scaled = (x - largest) / temperature  # as both compute it
    surely, maybe = _kept(scaled, int(given["top_k"]), float(given["top_p"]), float(given["min_p"]))
    bits = philox(given["seeds"], torch.arange(x.numel()), given["positions"].long())
    uniform = ((bits.double() * 2.0**-32).float() + 2.0**-33).clamp_max(LARGEST_UNIFORM).double()
    score = scaled.double() - torch.log(-torch.log1p(-uniform))
    slack = _NOISE_ERROR + 8 * FP32_ROUNDING * (float(score[token].abs()) + float(scaled[token].abs()))
    behind = float(score[surely].max() - score[token])
    if not bool(maybe[token]) or not behind <= slack:
        message = f"row {row}: token {token} in place of {expected}; it is {'' if maybe[token] else 'not '}a candidate"
        raise WrongAnswer("sample", f"{message}, {behind:.4g} behind the best", max(behind, 0.0))


def _kept(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are surely and which perhaps among the candidates; ``scaled [V]`` fp32 with its maximum at 0."""
    vocab = scaled.numel()
    inside = torch.ones(vocab, dtype=torch.bool)
    if 0 < top_k < vocab:
        inside = scaled >= scaled.sort(descending=True).values[top_k - 1]
    surely, maybe = inside.clone(), inside.clone()
    if top_p < 1.0:
        p = torch.where(inside, scaled.double().exp(), 0.0)
        above = (p * (scaled > scaled[:, None])).sum(1) / p.sum()  # [V], what is likelier
        slack = 4 * (vocab + 16) * FP32_ROUNDING
        surely &= above < top_p - slack
        maybe &= above < top_p + slack
    if min_p > 0.0:
        lowest = float(np.log(np.float64(np.float32(min_p))))
        slack = 8 * FP32_ROUNDING * (1.0 + abs(lowest))
        surely &= scaled >= lowest + slack
        maybe &= scaled >= lowest - slack
    return surely | (scaled == 0), maybe | (scaled == 0)
