"""``fastdms bench kernels``: the bytes it counts, and that it times nothing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdms import ops
from fastdms.cache import CompactCache
from fastdms.cli import main
from fastdms.tools.bench import cases, linears, prompts, spec
from fastdms.tools.bench.cases import build, launch, restorer
from fastdms.tools.bench.check import check_op
from fastdms.tools.bench.kernels import specs
from fastdms.tools.bench.peers import find_flash_attention
from fastdms.tools.bench.settings import OPS, KernelSettings
from fastdms.tools.bench.spec import Spec
from fastdms.tools.bench.timing import time_launches
from tests.ops.definition import attend
from tests.ops.harness import DEVICE, on, read_span
from tests.tolerance import rounding_band

CPU = torch.device("cpu")
LAST_OF = {"decode_layer": "decode_attention"}  # that of its ops whose result is looked at
SPEC = Spec(
    op="decode_attention", head_dim=16, kv_heads=2, group=3, kv_dtype="fp8", page_size=4, window_tokens=7, rows=3,
    live=30, length=50, kept=0.4,
)  # fmt: skip
STORED = {"dequantise": "int4"}  # in what weights are stored, where not in bf16
SMALL = [
    "kernels", "--device", "cpu", "--rows", "2", "--live", "20", "--length", "40", "--head-dim", "16", "--kv-heads",
    "2", "--group", "2", "--window", "7", "--page-size", "4", "--repeats", "2",
    "--linear", "tiny.gate_up", "tiny.lm_head",
]  # fmt: skip


def test_decode_attention_reads_what_is_counted() -> None:
    case = build(replace(SPEC, spans="one-keeps-all"), CPU, num_sets=2)
    assert case.cache is not None
    out = launch(case.spec, case.sets[1], case.cache, 1)
    live, q = case.cache.live_len[1], case.sets[1]["q"].double()
    for row in range(3):
        for head in range(2):
            keys, values = read_span(case.cache, 1, row, head)
            expected = attend(q[row, 3 * head : 3 * head + 3], list(keys), list(values), 0.25)
            error = (out[row, 3 * head : 3 * head + 3].double() - expected).abs()
            assert bool((error <= rounding_band(expected, torch.bfloat16) + 1e-5).all())
    tokens, pages = int(live.sum()), int((-(-live // 4)).sum())
    assert tokens == 180
    # K and V: 16 fp8 numbers and a bf16 scale; a page number for each page, a length for each span; q and out in bf16.
    assert case.num_bytes == tokens * 2 * (16 + 2) + 4 * pages + 4 * 6 + 2 * 3 * 6 * 16 * 2
    assert case.longest == int(live.max()) > 100


def test_append_and_release_count_their_bytes() -> None:
    case = build(replace(SPEC, op="decode_append", kv_dtype="bf16"), CPU, num_sets=1)
    q, kv, stored = 3 * 6 * 16 * 2, 2 * 3 * 2 * 16 * 2, 6 * 2 * 16 * 2
    assert case.num_bytes == 2 * q + kv + stored + 6 * (8 + 8 + 4) + 3 * 2 * 8 * 4
    layer = build(replace(SPEC, op="decode_layer", kv_dtype="bf16"), CPU, num_sets=1)
    attention = build(replace(SPEC, op="decode_attention", kv_dtype="bf16"), CPU, num_sets=1)
    assert layer.num_bytes == case.num_bytes + attention.num_bytes
    case = build(replace(SPEC, op="release"), CPU)
    assert case.num_bytes == 8 * (16 * 6 * 8 + 16 * 6 + 3), "30 tokens lie in 8 pages, in each of 16 layers"


@pytest.mark.parametrize("chunk", [0, 20, 49, 50, 80])
def test_prompts_count_visible_pairs_and_survivors(chunk: int) -> None:
    start = {0: 0, 20: 30, 49: 1, 50: 0, 80: 0}[chunk]
    tokens = 50 - start
    case = build(replace(SPEC, op="prefill_attention", chunk=chunk), CPU, num_sets=1)
    assert case.cache is not None
    held = int(case.cache.live_len.sum())
    assert 2 * min(start, 8) <= held <= 2 * start
    assert case.num_bytes == (
        2 * tokens * 6 * 16 * 2 + 2 * tokens * 2 * 16 * 2 + 2 * tokens + held * 2 * (16 + 2) + 4 * -(-held // 4)
    )
    assert case.dense_flops == 4 * 16 * 3 * 2 * sum(range(start + 1, 51))
    if not start:
        flags = case.sets[0]["decisions"]
        pairs = [i - j <= 7 or not flags[j, head] for head in range(2) for i in range(50) for j in range(i + 1)]
        assert case.flops == 4 * 16 * 3 * sum(map(int, pairs))
        assert case.kept == 1 - float(flags.float().mean())

    case = build(replace(SPEC, op="prefill_append", chunk=chunk), CPU, num_sets=1)
    before = _stored(case.cache)
    launch(case.spec, case.sets[0], case.cache, 0)
    assert case.cache is not None
    assert not case.cache.starved.any()
    survivors = len(_stored(case.cache) - before)
    recent = min(start, 8) + min(tokens, 8)
    bookkeeping = 2 * tokens + 2 * 4 * (recent + 1) + 4 * -(-survivors // 4)
    assert case.num_bytes == survivors * (2 * 16 * 2 + 2 * (16 + 2)) + bookkeeping


def _stored(cache: CompactCache | None) -> set[tuple[int, float]]:
    """Head and first channel sum of each token held: random numbers tell the tokens apart."""
    assert cache is not None
    return {(head, float(key.sum())) for head in range(2) for key in read_span(cache, 0, 0, head)[0]}


def test_pairs_of_a_chunk_add_up_to_those_of_the_prompt() -> None:
    """The flags are the same random numbers whatever the chunk."""
    whole = build(replace(SPEC, op="prefill_attention"), CPU, num_sets=1)
    last = build(replace(SPEC, op="prefill_attention", chunk=20), CPU, num_sets=1)
    flags = whole.sets[0]["decisions"]
    assert torch.equal(last.sets[0]["decisions"], flags[30:])
    pairs = [i - j <= 7 or not flags[j, head] for head in range(2) for i in range(30, 50) for j in range(i + 1)]
    assert last.flops == 4 * 16 * 3 * sum(map(int, pairs))


@pytest.mark.parametrize("op", ["decode_append", "decode_layer", "prefill_append", "release"])
def test_a_launch_can_be_repeated_after_a_restore(op: str) -> None:
    case = build(replace(SPEC, op=op, kept=1.0), CPU, num_sets=1)
    assert case.cache is not None
    restore, states = restorer(case.cache), []
    before = case.cache.live_len.clone()
    for _ in range(2):
        launch(case.spec, case.sets[0], case.cache, 0)
        states.append((case.cache.live_len.clone(), case.cache.num_free.clone(), case.cache.ring.clone()))
        assert not torch.equal(case.cache.live_len, before)
        restore()
        assert torch.equal(case.cache.live_len, before)
    assert all(map(torch.equal, *states))


def test_time_is_that_of_the_launches_alone() -> None:
    now = [0.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    launches = [lambda: advance(0.002), lambda: advance(0.004)]
    us = time_launches(launches, lambda: advance(100.0), CPU, 3, clock=lambda: now[0])
    assert us == pytest.approx([3000.0] * 3)


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_is_wrong_is_not_timed(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_op(replace(SPEC, op=op, weights=STORED.get(op, "bf16")), CPU)
    last = LAST_OF.get(op, op)
    right, calls = getattr(ops, last), []

    def wrong(*args: Any, **kwargs: Any) -> Any:
        """The first call is the kernel's, the second one the reference's."""
        calls.append(op)
        if len(calls) > 1:
            return right(*args, **kwargs)
        if op == "prefill_append":
            kwargs["k"] = kwargs["k"] * 1.2
        if op == "release":
            kwargs["rows"] = kwargs["rows"][:-1]
        out = right(*args, **kwargs)
        return out if out is None else out * 1.05

    monkeypatch.setattr(ops, last, wrong)
    assert main(["bench", *SMALL, "--ops", op]) == 2
    printed = capsys.readouterr()
    assert not printed.out, "nothing was timed"
    (line,) = printed.err.splitlines()
    assert line.startswith(f"fastdms: error: {op} on cpu differs from its reference at head_dim 16")
    assert len(calls) == 2


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_themselves_pass_the_check(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, which Triton's interpreter computes rightly."""
    last = LAST_OF.get(op, op)
    right, backends = getattr(ops, last), iter(("kernel", "reference"))

    def either(*args: Any, **kwargs: Any) -> Any:
        with on(next(backends)):
            return right(*args, **kwargs)

    for module in (cases, linears, prompts, spec):
        monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(ops, last, either)
    check_op(replace(SPEC, op=op, kv_dtype="fp32", page_size=16, weights=STORED.get(op, "bf16")), DEVICE)
    assert not list(backends), "both have run"


def test_a_lost_page_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = ops.decode_append, []

    def losing(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs)
        calls.append(out)
        if len(calls) == 1:
            free = kwargs["cache"].free_pages
            free[0] = free[1]
        return out

    monkeypatch.setattr(ops, "decode_append", losing)
    with pytest.raises(ValueError, match="a page is lost, or has two owners"):
        check_op(replace(SPEC, op="decode_append"), CPU)


def test_unchecked_figures_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ops, "decode_attention", lambda *args, **kwargs: None)
    assert main(["bench", *SMALL, "--ops", "decode_attention", "--spans", "zipf", "--no-check"]) == 0
    printed = capsys.readouterr()
    assert "the figures are unchecked" in printed.err
    assert "\nUNCHECKED: " in printed.out
    rows = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    assert [row["checked"] for row in rows] == [False, False]


def test_every_op_is_a_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert main(["bench", *SMALL, "--kept", "0.5", "--bandwidth", "0.1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    printed, table = out.split("\n\n")
    assert [json.loads(line) for line in printed.splitlines()] == rows
    assert len(table.splitlines()) == 1 + len(rows)
    assert {row["op"] for row in rows} == set(OPS)
    assert all((row["own_dense"] is not None) == (row["op"] == "decode_attention") for row in rows)
    assert len(rows) == 2 * 3 + 2 * 3 + 2 * 2 + 1 + 2 + 2 * 3 + 2 + 3 + 1 + 1
    for row, line in zip(rows, table.splitlines()[1:], strict=True):
        assert line.startswith(row["op"])
        assert row["us"]["p20"] <= row["us"]["p50"] <= row["us"]["p80"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"]["p50"] / 1e3, rel=0.01, abs=0.001)
        assert row["floor_us"] == pytest.approx(row["bytes"] / 1e5, abs=1e-4)
        assert row["checked"]
        assert row["dense_kernel"] == ("reference" if row["op"] == "dense_attention" else None)
        assert line.startswith("dense_attention (reference)") == (row["op"] == "dense_attention")
        assert (row["tflop_s"] is not None) == (row["op"] in ("prefill_attention", "dense_attention", "soft_attention"))
        if row["op"] in ("prefill_attention", "dense_attention"):
            (peer,) = row["peers"].values()
            assert row["times_faster_than_best_peer"] == peer["times_faster"] > 0


def test_a_chunk_follows_what_is_kept_of_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "prefill_attention", "dense_attention", "--kept", "0.5", "--chunk", "0", "16"]
    assert main(["bench", *SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(row["op"], row["kv_dtype"], row["chunk"]) for row in rows] == [
        ("prefill_attention", "fp8", 0),
        ("prefill_attention", "fp8", 16),
        ("prefill_attention", "bf16", 16),
        ("dense_attention", None, 0),
        ("dense_attention", None, 16),
    ]
    assert "40 tokens, last 16" in out
    assert rows[1]["peers"] == {}, "torch's causal mask does not let a chunk follow other tokens"
    assert rows[1]["bytes"] < rows[2]["bytes"], "fp8 pages against bf16 pages"


def test_attention_beside_its_own_dense_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 20 live tokens 7 are of the window, 13 are a quarter of those before it; a launch takes 1 ms for 10 tokens."""
    lengths: list[tuple[int, ...]] = []

    def timed(launches: Any, restore: Any, device: torch.device, samples: int) -> list[float]:
        time_launches(launches, restore, device, 1)
        live = launches[0].args[2].live_len
        lengths.append(tuple(sorted(live[0].flatten().tolist())))
        return [float(live[0].sum()) * 100] * samples

    monkeypatch.setattr("fastdms.tools.bench.kernels.time_launches", timed)
    arguments = ["--ops", "decode_attention", "--kv-dtype", "fp8", "--spans", "zipf", "--kept", "1", "0.25"]
    assert main(["bench", *SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    whole, part = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert lengths[0] == lengths[1] != lengths[2] == (59,) * 4
    assert (whole["own_dense"], whole["kept_asked"], part["kept_asked"]) == (None, 1.0, 0.25)
    dense = part["own_dense"]
    assert (dense["tokens"], dense["us"]["p50"], dense["times_faster"]) == (59, 4 * 59 * 100, 59 / 20)
    # K and V of 4 spans: 16 fp8 numbers and a bf16 scale; a length for each span, and a page number for 4 tokens.
    assert dense["bytes"] == 4 * (59 * 2 * (16 + 2) + 4 + 4 * 15) + 2 * 2 * 4 * 16 * 2
    assert dense["compression"] == pytest.approx(dense["bytes"] / part["bytes"], abs=1e-4)
    assert dense["of_compression"] == pytest.approx(dense["times_faster"] / dense["compression"], abs=1e-3)
    assert dense["gb_s"] == pytest.approx(dense["bytes"] / dense["us"]["p50"] / 1e3, abs=1e-3)
    assert out.splitlines()[-1].endswith(
        f"own dense: 2.95x, {dense['of_compression']:.0%} of {dense['compression']:.2f}x"
    )


def test_nothing_past_the_window_is_left_of_nothing_more() -> None:
    assert replace(SPEC, live=7, kept=0.1).logical == 7
    assert replace(SPEC, live=8, kept=0.1).logical == 17
    assert replace(SPEC, live=16384, kept=0.125, window_tokens=256).logical == 129280


def test_each_op_varies_only_what_it_depends_on() -> None:
    found = specs(KernelSettings())
    assert len(found) == len(set(found))
    by_op = {op: [spec for spec in found if spec.op == op] for op in OPS}
    assert {op: len(cases) for op, cases in by_op.items()} == {
        "decode_attention": 2 * 2 * 2 * 2 * 3,
        "prefill_attention": 2 * 3 * 2,
        "decode_append": 2 * 2 * 2 * 2,
        "decode_layer": 2 * 2 * 2 * 2 * 3 * 2,
        "decode_linear": 10 * 3 * 2,
        "dequantise": 10 * 2,
        "prefill_append": 2 * 2 * 3 * 2,
        "release": 2 * 2 * 3,
        "dense_attention": 2 * 3,
        "soft_attention": 2 * 3 * 2,
    }


_PEER = """
import torch
import torch.nn.functional as F

def flash_attn_varlen_func(q, k, v, *, max_seqlen_q, cu_seqlens_q, max_seqlen_k, softmax_scale, causal,
                           cu_seqlens_k=None, seqused_k=None, block_table=None):
    assert causal and q.dtype == k.dtype == torch.bfloat16
    if block_table is None:
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q]
        return q
    assert max_seqlen_q == 1 and k.shape[2:] == (2, 16) and block_table.shape[0] == q.shape[0] == 2
    assert (seqused_k == max_seqlen_k).all() and block_table.shape[1] * k.shape[1] >= max_seqlen_k
    calls.append(max_seqlen_k)
    return q

calls = []
"""


def test_peers_from_a_folder_move_as_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(_PEER)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    arguments = ["--ops", "decode_attention", "prefill_attention", "--kv-dtype", "fp8", "--spans", "uniform"]
    assert main(["bench", *SMALL, *arguments, "--kept", "1", "--peer", str(tmp_path)]) == 0
    decode, prefill = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert decode["peers"].keys() == {"FA3"}
    assert decode["peers"]["FA3"]["bytes"] == pytest.approx(decode["bytes"], rel=0.05)
    assert prefill["peers"].keys() == {"SDPA (math)", "FA3"}
    assert prefill["times_faster_than_best_peer"] == min(peer["times_faster"] for peer in prefill["peers"].values())


def test_a_peer_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    monkeypatch.setattr("sys.modules", dict(__import__("sys").modules))
    __import__("sys").modules.pop("flash_attn_interface", None)
    assert "flash_attn_interface: ModuleNotFoundError" in find_flash_attention(str(tmp_path)).missing
    (tmp_path / "flash_attn_interface.py").write_text("def flash_attn_varlen_func(*a, **k):\n    raise TypeError('no')")
    arguments = ["--ops", "decode_attention", "--kv-dtype", "fp8", "--spans", "uniform", "--peer", str(tmp_path)]
    assert main(["bench", *SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[0])["peers"] == {"FA3": {"error": "TypeError: no"}}
    assert out.splitlines()[-1].endswith("FA3: failed")
