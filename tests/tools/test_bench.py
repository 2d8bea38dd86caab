"""``fastdms bench``: the protocol under a clock of our own, every subcommand in small, and what is refused."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import fastdms
from fastdms.cli import main
from fastdms.decoder import Decoder
from fastdms.kv_report import CacheGeometry, KVReport, RowUsage
from fastdms.ops.int4 import INT4
from fastdms.options import resolve_options
from fastdms.runtime import CompiledModel
from fastdms.sampling_params import SamplingParams
from fastdms.tools.bench import settings as bench_settings
from fastdms.tools.bench import start
from fastdms.tools.bench.engine import Subject, measure_subject, weight_bytes
from fastdms.tools.bench.figures import decode_figures, floor_ms, spread
from fastdms.tools.bench.settings import EngineSettings
from fastdms.tools.provenance import commit
from fastdms.tools.shapes import SHAPES
from tests.models import save_checkpoint, tiny_model

TINY = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--window", "32"]
EVERYWHERE = {"card", "driver", "torch", "triton", "python", "fastdms", "commit", "command", "bench"}


class FakeModel:
    """Takes 2 s for a prompt and 0.5 s for each further token, by a clock that nothing else moves."""

    def __init__(self, rows: int, slow_call: int) -> None:
        self.slow_call = slow_call
        self.now, self.rows, self.new_tokens, self.calls = 0.0, rows, 0, list[int]()
        self.config = SHAPES["tiny"]
        self.dms = fastdms.DMSConfig(window_tokens=7)
        self.dense_kernel = None
        self.graphs, self.runs = self, {1: 0, 2: 0}
        self.options = resolve_options(
            self.config, device="cpu", dtype=None, kv_dtype="fp8", weights="auto", max_concurrency=rows,
            max_context=200, kv_memory=None, prefill_chunk=64, mode=None,
        )  # fmt: skip

    def clock(self) -> float:
        return self.now

    def __call__(self, prompts: list[list[int]], params: SamplingParams) -> None:
        max_tokens = params.max_tokens
        assert (len(prompts), params.temperature, params.ignore_eos) == (self.rows, 0.0, True)
        self.calls.append(max_tokens)
        slow = 1.0 if len(self.calls) == self.slow_call else 0.0
        self.now += 2.0 + 0.5 * (max_tokens - 1) + slow
        self.new_tokens = max_tokens
        self.runs[2] += max_tokens - 1
        self.runs[1] += 2 * (max_tokens > 1)  # the first row was alone at first, and the second at last

    def stats(self) -> dict[str, dict[int, int]]:
        return {"runs": dict(self.runs)}

    def kv_report(self) -> KVReport:
        """Half of the tokens are live in each of 2 x 2 spans."""
        seen = 100 + self.new_tokens - 1
        row = RowUsage(num_tokens=seen, live_tokens=np.full((2, 2), seen // 2, dtype=np.int64))
        geometry = CacheGeometry(
            page_size=4, page_bytes=4 * 36, bytes_pool=9999, bytes_metadata=77, dense_token_bytes=256
        )
        return KVReport.of([row] * self.rows, geometry, (2, 2))


def _fake_rows(what: str) -> dict[str, Any]:
    # The first call warms up; in the second of three repeats the machine is disturbed for a second.
    model = FakeModel(rows=2, slow_call={"decode": 5, "prefill": 3, "memory": 0}[what])
    subject = Subject(
        name="fake",
        model=cast(CompiledModel, model),
        kept=0.5,
        start_s=1.5,
        weight_bytes=6_000_000,
        kv_token_bytes=36,
    )
    settings = EngineSettings(
        shape="tiny", concurrency=(2,), contexts=(100,), new_tokens=11, repeats=3, kept=(0.5,), bandwidth_tb_s=0.001
    )
    (row,) = measure_subject(what, subject, settings, model.clock)
    return row


def test_decode_is_measured_between_one_token_and_all() -> None:
    row = _fake_rows("decode")
    assert row["decode_tok_s"] == 2 * 10 / (7.0 - 2.0)
    assert row["decode_tok_s_median"] == 4.0
    assert row["step_ms"] == 500.0
    assert row["step_ms_spread"] == {"p20": 500.0, "p50": 500.0, "p80": 560.0}
    assert row["prefill_tok_s"] == 100.0
    assert row["rows_a_step"] == round(2 * 10 / 12, 3)
    # Live tokens of 2 rows x 4 spans: 50 each after one token, 55 after all.
    assert row["live_bytes"] == 8 * 52.5 * 36
    assert row["floor_ms"] == pytest.approx((6_000_000 + 15_120) / 1e9 * 1e3)
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / 500.0, abs=1e-4)
    assert row["kv_bytes"] == 2 * 4 * 14 * 144, "55 tokens lie in 14 pages"
    assert (row["kept_asked"], row["window"], row["live_share_outside_window"]) == (0.5, 7, round(47 / 102, 4))


def test_prefill_reports_best_and_median() -> None:
    row = _fake_rows("prefill")
    assert row["prefill_tok_s"] == row["prefill_tok_s_median"] == 100.0
    assert row["prefill_s_spread"] == {"p20": 2.0, "p50": 2.0, "p80": 2.6}, "one of three took 3 s"


def test_memory_compares_with_a_dense_cache() -> None:
    row = _fake_rows("memory")
    assert row["kv_bytes"] == 2 * 4 * 13 * 144
    assert row["dense_bf16_bytes"] == 2 * 100 * 256
    assert row["dense_over_kv"] == round(51_200 / 14_976, 4)
    assert row["dense_over_kv_and_metadata"] == round(51_200 / 15_053, 4)


def test_noise_that_swallows_the_decoding_gives_no_figure() -> None:
    figures = decode_figures(1, 5, [2.0, 2.1], [1.9, 2.0], 1.0)
    assert figures["decode_tok_s"] is figures["step_ms"] is figures["floor_share"] is None


def test_spread_interpolates() -> None:
    assert spread([5.0]) == {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    assert spread([3.0, 1.0, 2.0, 6.0, 4.0, 5.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}
    assert floor_ms(3e9, 3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float8_e4m3fn, INT4])
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_that_a_step_reads(tied: bool, weights: torch.dtype) -> None:
    config = replace(SHAPES["tiny"], tie_word_embeddings=tied)
    decoder = Decoder(
        config, None, num_positions=50, dtype=torch.bfloat16, weight_dtype=weights, device=torch.device("cpu"),
    )  # fmt: skip
    # 4 query and 2 KV heads of 16, hidden 64, MLP 128, 2 layers, 512 tokens; the output layer is read, a table of its
    # own is only looked up.
    linears = 512 * 64 + 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
    channels = 512 + 2 * ((64 + 2 * 32) + 64 + 2 * 128 + 64)
    stored = {
        torch.bfloat16: 2 * linears,
        torch.float8_e4m3fn: linears + 4 * channels,
        INT4: linears // 2 + 2 * linears // 64,  # groups of 64, each with a scale in bf16
    }
    assert weight_bytes(decoder) == stored[weights] + 2 * (2 * 2 * 64 + 64)


@pytest.mark.parametrize("what", ["decode", "prefill", "memory"])
def test_each_subcommand_measures_a_random_model(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"before": 1}\n')
    arguments = [what, *TINY, "--context", "300", "--concurrency", "1", "2", "--new-tokens", "3", "--json", str(file)]
    assert main(["bench", *arguments, "--kept", "1", "0.25"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"before": 1}, *rows]
    assert [(row["kept_asked"], row["rows"]) for row in rows] == [(1.0, 1), (1.0, 2), (0.25, 1), (0.25, 2)]
    for row in rows:
        assert row.keys() > EVERYWHERE | {"kv_bytes", "peak_bytes", "live_share", "mode", "kv_dtype"}
        assert (row["bench"], row["context"], row["card"]) == (what, 300, "cpu")
        assert row["peak_bytes"] > 2**20
        assert row["kv_bytes"] <= row["kv_pool_bytes"]
        assert row["command"].startswith(f"fastdms bench {what} --shape tiny")
        assert row["dense_kernel"] == ("reference" if row["kept_asked"] == 1 else None)
        if row["kept_asked"] == 1:
            assert (row["live_share"], row["live_share_outside_window"], row["dms"]) == (1.0, None, "off")
        else:
            assert 0.1 < row["live_share_outside_window"] < 0.4
            assert row["kv_bytes"] < rows[row["rows"] - 1]["kv_bytes"]


def test_answers_that_end_while_later_prompts_are_prefilled(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--context", "64", "--concurrency", "8", "--prefill-chunk", "8", "--new-tokens", "5"]
    assert main(["bench", "decode", *TINY, *given]) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row["rows_a_step"] == 1.0, "4 steps of a row, and 8 for the next prompt"


@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_fewer_bits_are_measured(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--weights", weights, "--context", "20", "--concurrency", "1", "--kept", "1"]
    assert main(["bench", "memory", *TINY, *given]) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (row["weights"], row["dtype"]) == (weights, "float32")


def test_start_runs_cold_then_warm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", *TINY, "--context", "20", "--concurrency", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert row.keys() > EVERYWHERE
        assert row["buckets"] == [1, 2]
        assert 0 < row["ready_s"] < row["process_s"]
        assert (row["mode"], row["artifacts"]) == ("eager", "off")
        parts = [row[f"{part}_s"] for part in ("weights", "trace", "compile", "warm_up", "capture", "chunks")]
        assert sum(parts) == pytest.approx(row["ready_s"], abs=0.01)
        made = [row[f"{part}_s"] for part in ("trace", "compile", "capture", "chunks")]
        assert made == [0.0] * 4, "in mode eager nothing is made, if a first run takes a moment"


def test_a_cold_start_finds_empty_caches_and_a_warm_one_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, list[str]]] = []

    def run(command: list[str], *, input: str, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        caches = Path(json.loads(input)["caches"])
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            assert Path(env[name]).parent == caches
        found.append((str(caches), [path.name for path in caches.iterdir()]))
        (caches / "compiled").touch()
        return subprocess.CompletedProcess(command, 0, stdout='{"ready_s": 1.0}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    rows = list(start.measure_starts(EngineSettings(shape="tiny", repeats=2)))
    assert [(row["state"], row["repeats"]) for row in rows] == [("cold", 2), ("warm", 2)]
    assert [names for _, names in found] == [[], [], ["compiled"], ["compiled"]]
    folders = [folder for folder, _ in found]
    assert folders[0] == folders[2] != folders[1] == folders[3]
    assert not any(Path(folder).exists() for folder in folders)


def test_start_tells_why_the_process_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", *TINY, "--mode", "graphs"]) == 2
    assert "mode 'graphs' needs a CUDA device" in _one_line(capsys)


@pytest.mark.parametrize("what", ["decode", "prefill", "memory"])
def test_quick_takes_the_default_model(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    folder = save_checkpoint(model, tmp_path / "model", "adapter", window_tokens=7)
    monkeypatch.setattr(fastdms, "default_model", lambda: folder)
    assert main(["bench", what, "--quick", "--context", "40"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    quick = bench_settings.ENGINE_QUICK[what]
    assert [row["rows"] for row in rows] == list(quick["concurrency"])  # type: ignore[call-overload]
    for row in rows:
        assert (row["model"], row["context"], row["kept_asked"], row["window"]) == (str(folder), 40, None, 7)
    assert main(["bench", what, "--quick", "--context", "40", "--concurrency", "1", "--dms", "off"]) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (row["dms"], row["live_share"]) == ("off", 1.0)


def test_commit_says_when_the_tree_differs(tmp_path: Path) -> None:
    assert commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{head}+dirty"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: WHAT"),
        (["everything"], "invalid choice: 'everything'"),
        (["decode", "--shape", "gpt-5"], "--shape must be one of llama-3.2-1b"),
        (["decode", "--shape", "tiny", "--model", "x"], "give either --shape or --model"),
        (["decode", "--model", "x", "--kept", "0.5"], "--kept is for random weights"),
        (["decode", "--dms", "off", "--kept", "0.5"], "give one of them"),
        (["decode", *TINY, "--kept", "0"], "--kept must be in (0, 1], got 0.0"),
        (["decode", *TINY, "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["decode", *TINY, "--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
        (["decode", *TINY, "--context", "8", "0"], "--context must be at least 1, got 0"),
        (["decode", *TINY, "--bandwidth", "0"], "--bandwidth must be a positive number of TB/s, got 0.0"),
        (["decode", *TINY, "--weights", "fp3"], "weights must be one of"),
        (["decode", *TINY, "--temperature", "-1"], "temperature must be a finite number >= 0, got -1.0"),
        (["decode", *TINY, "--json", "no-such-folder/rows.jsonl"], "no-such-folder/rows.jsonl"),
        (["memory", "--rows"], "unrecognized arguments: --rows"),
        (["kernels", "--ops", "sort"], "--ops must be of decode_attention"),
        (["kernels", "--spans", "even"], "--spans must be of uniform, zipf, one-keeps-all, got 'even'"),
        (["kernels", "--head-dim", "65"], "--head-dim must be even"),
        (["kernels", "--quick", "--peer", "no-such-folder"], "--peer no-such-folder is no folder"),
        (["decode", "--quick", "--peer="], "--peer (empty) is no folder"),
        (["kernels", "--device", "cpu"], "--length 131072: the CPU runs the plain references, at most 4096"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in _one_line(capsys)


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdms: error: ")
    return line
