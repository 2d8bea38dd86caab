"""``fastdms fuzz``: every op passes, whatever is broken is found and found again, and it stops when it should."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdms.ops as ops
from fastdms.cli import main
from fastdms.ops import decode_attention, release
from fastdms.ops.decode_attention import kernel as decode_attention_kernel
from fastdms.ops.soft_attention import backward_kernel
from fastdms.ops.soft_attention import reference as soft_reference
from fastdms.tools.fuzz import budget, calls, draw, invalid, run, state
from fastdms.tools.fuzz.budget import Budget, WrongAnswer
from fastdms.tools.fuzz.history import CACHE_OPS
from fastdms.tools.fuzz.run import Outcome, fuzz
from fastdms.tools.fuzz.single import SINGLE_OPS, _check_tie, _kept
from tests.source_tree import ROOT

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is loaded as a compiler, not an interpreter")


def _fuzz(*ops: str, **options: Any) -> Outcome:
    return fuzz(ops, CPU, **{"seed": 0, **options})


def _mutate(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[..., Any], part: str = "kernel") -> None:
    """``change(original, *args)`` runs in place of an op's kernel or reference."""
    module = importlib.import_module(f"fastdms.ops.{op}.{part}")
    original = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: change(original, *args))


def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references stand in for the kernels: a hundred times faster than the interpreter."""
    for op in calls.OPS:
        module, reference = (importlib.import_module(f"fastdms.ops.{op}.{part}") for part in ("kernel", "reference"))
        monkeypatch.setattr(module, op, getattr(reference, op))
    monkeypatch.setattr(backward_kernel, "soft_attention_backward", soft_reference.soft_attention_backward)


def test_the_kernels_are_right_on_some_hundred_cases() -> None:
    outcome = _fuzz(*CACHE_OPS, cases=60)
    assert not outcome.wrong
    assert set(outcome.tally.cases) >= {"decode_append", "decode_attention", "prefill_append", "prefill_attention"}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # sample is given NaN and inf, too
@pytest.mark.parametrize(
    ("op", "cases"),
    [("decode_linear", 40), ("dense_attention", 15), ("dequantise", 10), ("sample", 10), ("soft_attention", 12)],
)
def test_the_ops_without_a_cache_are_right(op: str, cases: int) -> None:
    outcome = _fuzz(op, cases=cases)
    assert not outcome.wrong
    assert outcome.tally.cases[op] + outcome.tally.rejected[op] >= cases


@pytest.fixture
def compiled_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes and dtypes that CUDA gets, fp8 and bf16 among them, with the references as kernels."""
    _interpreted(monkeypatch)
    cuda = torch.device("cuda")
    monkeypatch.setattr(run, "draw_setting", lambda rng, _: draw.draw_setting(rng, cuda))
    monkeypatch.setattr(draw, "_STATE_ELEMENTS", 2**14)
    monkeypatch.setattr(state, "_FAR_ELEMENTS", 2**12)  # the far end of a pool needs no gigabytes here


@pytest.mark.usefixtures("compiled_settings")
def test_a_reference_in_the_kernels_place_is_right_in_every_setting() -> None:
    for chosen, cases in ((CACHE_OPS, 8000), (SINGLE_OPS, 300)):
        outcome = _fuzz(*chosen, cases=cases, seed=1)
        assert not outcome.wrong
        assert set(outcome.tally.cases) == set(chosen)


def test_settings_reach_every_kind() -> None:
    drawn = [draw.draw_setting(np.random.default_rng([0, 1, i]), torch.device("cuda")) for i in range(200)]
    assert {s.kv_dtype for s in drawn} == {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn}
    assert {s.far_pages for s in drawn} == {False, True}
    assert {s.window_tokens for s in drawn} >= {0, 1}
    assert any(s.max_pages * s.page_size < s.max_positions for s in drawn)


def test_pools_run_dry_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpreted(monkeypatch)
    seen = []
    check_append = importlib.import_module("fastdms.tools.fuzz.history").check_append

    def spied(op: str, layer: int, before: state.Snapshot, after: state.Snapshot, *rest: Any) -> None:
        if after.starved.sum() > before.starved.sum():
            seen.append((op, bool((after.live_len != before.live_len).any())))
        check_append(op, layer, before, after, *rest)

    monkeypatch.setattr("fastdms.tools.fuzz.history.check_append", spied)
    assert not _fuzz("decode_append", "prefill_append", cases=1500).wrong
    assert {op for op, _ in seen} == {"decode_append", "prefill_append"}
    assert any(grew for _, grew in seen), "some rows starve while others grow"


def _shortened(original: Any, q: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, *rest: Any) -> Any:
    *pages, live_len, sm_scale = rest
    return original(q, positions, rows, *pages, (live_len - 1).clamp_min(0), sm_scale)


@pytest.mark.parametrize("part", ["kernel", "reference"])
def test_a_wrong_answer_is_found_shown_and_reproduced(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _interpreted(monkeypatch)
    _mutate(monkeypatch, "decode_attention", _shortened, part)
    report = tmp_path / "fuzz.json"
    chosen = ["--device", "cpu", "--seed", "5", "--ops", "decode_append", "decode_attention"]
    assert main(["fuzz", *chosen, "--cases", "200", "--json", str(report)]) == 1
    out = capsys.readouterr().out
    wrong = json.loads(report.read_text())["wrong"]
    assert wrong[-1]["op"] == "decode_attention"
    assert wrong[-1]["difference"] > 0.01
    history = str(wrong[-1]["history"])
    command = f"fastdms fuzz --device cpu --seed 5 --ops decode_append decode_attention --only {history}"
    assert command in out
    assert "head_dim=" in out
    assert main(command.split()[1:]) == 1
    again = capsys.readouterr().out
    assert f"WRONG: decode_attention: {wrong[-1]['message']}" in again
    assert again.count("WRONG") == 1


def _forgets_a_page(original: Any, *args: Any) -> Any:
    out = original(*args)
    args[18].clamp_(min=1).sub_(1)  # num_free
    return out


def _writes_outside(original: Any, *args: Any) -> Any:
    pages = args[10]
    pages.as_strided((1,), (1,), pages.storage_offset() + pages.numel()).zero_()
    return original(*args)


def _writes_to_an_input(original: Any, *args: Any) -> Any:
    out = original(*args)
    args[0].zero_()
    return out


def _writes_to_a_free_slot(original: Any, *args: Any) -> Any:
    out = original(*args)
    args[10][args[17][: int(args[18])].long()] = 0.0
    return out


def _never_starves(original: Any, *args: Any) -> Any:
    before = args[19].clone()
    out = original(*args)
    args[19].copy_(before)
    return out


def _always_starves(original: Any, *args: Any) -> Any:
    out = original(*args)
    args[19].fill_(1)
    return out


def _leaves_its_output(original: Any, q: torch.Tensor, *args: Any) -> Any:
    original(q, *args)
    return torch.empty_like(q)


def _a_value_is_off(original: Any, *args: Any) -> Any:
    return original(*args[:2], args[2] * 1.001, *args[3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_forgets_a_page, "a page is lost"),
        (_writes_outside, "outside k_pages"),
        (_writes_to_an_input, "q is an input"),
        (_writes_to_a_free_slot, "holds no token"),
        (_never_starves, "not marked as starved"),
        (_always_starves, "starved"),
        (_leaves_its_output, "is not zero|is off by up to nan"),
        (_a_value_is_off, "neither what it held nor what it was given"),
    ],
)
def test_every_kind_of_damage_is_noticed(
    change: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interpreted(monkeypatch)
    _mutate(monkeypatch, "decode_append", change)
    monkeypatch.setattr(run, "_MOST_WRONG", 1)
    outcome = _fuzz("decode_append", cases=1500)
    assert re.search(message, outcome.wrong[0].message)


def test_an_op_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(decode_attention_kernel, "decode_attention", broken)
    assert "RuntimeError: boom" in _fuzz("decode_attention", cases=20).wrong[0].message


def test_invalid_calls_that_are_taken_or_leave_a_trace_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpreted(monkeypatch)
    outcome = _fuzz("release", "decode_attention", cases=200)
    assert not outcome.wrong
    assert outcome.tally.rejected["release"]

    def careless(rows: torch.Tensor, *, live_len: torch.Tensor, **others: Any) -> None:
        live_len.zero_()
        release(rows, live_len=live_len, **others)

    monkeypatch.setattr("fastdms.tools.fuzz.history._INVALID_CALLS", 1.0)
    monkeypatch.setattr(ops, "release", careless)
    assert any("wrote to its tensors" in wrong.message for wrong in _fuzz("release", cases=100).wrong)

    def lenient(q: torch.Tensor, **others: Any) -> torch.Tensor:
        try:
            return decode_attention(q, **others)
        except ValueError:
            return torch.zeros_like(q)

    monkeypatch.setattr(ops, "decode_attention", lenient)
    assert any("was not refused" in wrong.message for wrong in _fuzz("decode_attention", cases=50).wrong)


def test_every_invalid_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, rather than those that chance brings."""
    refused: set[tuple[str, str, str]] = set()
    _interpreted(monkeypatch)
    draw_bad = invalid._draw

    def spied(op: str, rng: np.random.Generator, kinds: list[tuple[str, str]], *args: Any) -> Any:
        new = [kind for kind in kinds if (op, *kind) not in refused]
        name, key, bad = draw_bad(op, rng, [*kinds, *new * 20], *args)
        refused.add((op, name, key))
        return name, key, bad

    monkeypatch.setattr(invalid, "_draw", spied)
    monkeypatch.setattr("fastdms.tools.fuzz.history._INVALID_CALLS", 1.0)
    monkeypatch.setattr("fastdms.tools.fuzz.single._INVALID_CALLS", 1.0)
    of_rows = {"decode_linear": 400}  # a call is up to 16 cases
    for chosen, cases in ((CACHE_OPS, 2000), *(((op,), of_rows.get(op, 60)) for op in SINGLE_OPS)):
        assert not _fuzz(*chosen, cases=cases).wrong
    wanted = {
        (op, name, key) for op, inputs in invalid._INPUTS.items() for name, keys in inputs.items() for key in keys
    }
    assert {op for op, _, _ in refused} == set(calls.OPS)
    assert len(wanted - refused) < len(wanted) // 5, wanted - refused


def test_the_same_seed_gives_the_same_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpreted(monkeypatch)
    first, again, other = (_fuzz(*calls.OPS, cases=100, seed=seed).tally for seed in (3, 3, 4))
    assert first == again != other


def test_it_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpreted(monkeypatch)
    shown: list[float] = []
    outcome = _fuzz(*CACHE_OPS, seconds=1.0, report=lambda outcome: shown.append(outcome.seconds))
    assert not outcome.wrong
    assert outcome.histories == len(shown) > 1
    assert shown[-2] < 1.0 <= shown[-1] < 5.0


def test_a_budget_is_twice_the_reference_and_one_rounding() -> None:
    truth = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    plain, real = truth.half() * (1 + 2**-10), torch.ones(1, 1, dtype=torch.bool)
    step = torch.tensor([[0.0, 2.0**-9]], dtype=torch.float64)  # between neighbours at 2

    def check(steps: float) -> None:
        Budget(terms=0, scale=0).check("sample", "x", (truth + steps * step).half(), plain, truth, real)

    check(3)  # 2 * (one step + half a step)
    for steps in (4.0, torch.nan):
        with pytest.raises(WrongAnswer, match="1 of 1 cases: x is off"):
            check(steps)
    with pytest.raises(WrongAnswer, match="shape"):
        Budget(terms=0, scale=0).check("sample", "x", plain[:, :1], plain, truth, real)


def test_a_reference_runs_in_the_precision_asked_for() -> None:
    seen = []

    def reference(x: torch.Tensor, k_scales: torch.Tensor) -> torch.Tensor:
        seen.extend([x.float().dtype, x.to(torch.float32).dtype, k_scales.dtype])
        return x.float() + k_scales

    given = [torch.ones(2).half(), torch.ones(2).bfloat16()]
    for dtype in (torch.float64, torch.bfloat16):
        (out,) = budget.in_precision(reference, ["x", "k_scales"], given, dtype)
        assert seen == [dtype, dtype, torch.bfloat16]
        assert out.dtype == dtype
        seen.clear()


def test_a_sampled_token_may_differ_only_in_a_tie() -> None:
    scaled = torch.tensor([0.0, -1.0, -1.0, -2.0, -9.0])
    for top_k, top_p, min_p, expected in ((2, 1.0, 0.0, 3), (0, 0.3, 0.0, 1), (0, 0.6, 0.0, 3), (0, 1.0, 0.2, 3)):
        surely, maybe = _kept(scaled, top_k, top_p, min_p)
        assert surely.tolist() == maybe.tolist() == [i < expected for i in range(5)], (top_k, top_p, min_p)
    given = {"logits": scaled, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 1, "positions": 0,
             "end_ids": [0], "banned_until": 0, "count_rows": -1}  # fmt: skip
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    behind = []
    for token in range(5):
        try:
            _check_tie(0, token, 0, tensors)
        except WrongAnswer as error:
            behind.append(error.difference)
    assert len(behind) == 4, "one token is the right one"
    assert all(difference > 0.001 for difference in behind)
    with pytest.raises(WrongAnswer, match="not the likeliest"):
        _check_tie(0, 1, 0, {**tensors, "temperature": torch.tensor(0.0)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "sample", "nonsense"], "no op 'nonsense'; there are decode_append"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--cases", "1", "--seconds", "1"], "not allowed with"),
        (["--device", "cuda"], "no CUDA device"),
        (["--sanitize"], "compute-sanitizer is not on PATH"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["fuzz", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_sanitizer_runs_each_op_under_each_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, program = tmp_path / "log", tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$2" in racecheck) echo found it; exit 66;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["fuzz", "--sanitize", "--ops", "sample", "release", "--cases", "7"]) == 1
    lines = log.read_text().splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("-m fastdms.tools.fuzz --device cuda --ops sample --cases 7 --seed 0")
    shown = capsys.readouterr()
    assert shown.out.count("clean") == 4
    assert shown.out.count("FAILED") == 2
    assert "found it" in shown.err


def test_a_process_of_its_own_has_the_interpreter() -> None:
    """As it is called: nothing has been imported or set before."""
    code = "import sys; from fastdms.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["fuzz", "--device", "cpu", "--ops", "release", "--cases", "1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "release on the CPU, in Triton's interpreter, seed 0" in done.stdout
    assert "0 histories with a wrong answer" in done.stdout


def test_triton_loaded_as_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["fuzz", "--device", "cpu", "--cases", "1"]) == 2
    assert "needs a process of its own" in capsys.readouterr().err
