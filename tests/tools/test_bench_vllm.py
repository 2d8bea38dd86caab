"""``fastdms bench decode --peer``: a vLLM of our own making, which moves a clock of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdms.cli import main
from fastdms.options import resolve_options
from fastdms.tools.bench import vllm_peer, vllm_run
from fastdms.tools.bench.settings import EngineSettings
from fastdms.tools.bench.vllm_peer import measure_vllm
from fastdms.tools.shapes import SHAPES

# 2 s for a prompt and 0.5 s for each further token; a second more in the third of three turns.
VLLM = """
import json, os, time, types
from pathlib import Path

__version__ = "0.26.0"
HERE = Path(__file__).parent
now = [0.0]
time.perf_counter = lambda: now[0]

def record(**call):
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + chr(10))

class SamplingParams:
    def __init__(self, **fields):
        vars(self).update(fields)

class LLM:
    def __init__(self, model, **options):
        now[0] += 60.0
        print("noise on stdout")
        environment = {name: os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE")}
        record(config=json.loads(Path(model, "config.json").read_text()), options=options, environment=environment)
        cache = types.SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=16)
        self.llm_engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(cache_config=cache))
        self.calls = 0

    def generate(self, prompts, params, use_tqdm):
        self.calls += 1
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        record(lengths=[len(row) for row in ids], most=max(map(max, ids)), **vars(params))
        now[0] += 2.0 + 0.5 * (params.max_tokens - 1) + (self.calls == 7)
        WHILE_RUNNING
        output = types.SimpleNamespace(token_ids=[1] * params.max_tokens)
        return [types.SimpleNamespace(outputs=[output]) for _ in prompts]
"""
ARGUMENTS = [
    "bench", "decode", "--shape", "tiny", "--device", "cpu", "--window", "32", "--context", "40", "--new-tokens", "11",
    "--concurrency", "1", "2", "--repeats", "3",
]  # fmt: skip
BF16 = ["--dtype", "bf16"]


def _write_vllm(folder: Path, blocks: int | None = 999, running: str = "pass") -> None:
    (folder / "vllm").mkdir()
    source = VLLM.replace("BLOCKS", str(blocks)).replace("WHILE_RUNNING", running)
    (folder / "vllm" / "__init__.py").write_text(source)


def _rows(
    folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, blocks: int | None = 999, running: str = "pass"
) -> list[dict[str, Any]]:
    _write_vllm(folder, blocks, running)
    assert main([*ARGUMENTS, *BF16, "--peer", str(folder), *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "vllm" / "calls.jsonl").read_text().splitlines()]


def test_the_same_protocol_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *theirs, one, two = _rows(tmp_path, capsys)
    assert [(row["peer"], row["rows"], row["context"]) for row in theirs] == [("vllm", 1, 40), ("vllm", 2, 40)]
    for row in theirs:
        assert (row["bench"], row["model"], row["version"], row["new_tokens"]) == ("decode", "tiny", "0.26.0", 11)
        assert (row["decode_tok_s"], row["step_ms"]) == (row["rows"] * 10 / 5.0, 500.0)
        assert (row["kv_dtype"], row["dtype"], row["kv_tokens"], row["start_s"]) == ("bfloat16", "bfloat16", 15984, 60)
        assert (row["prefill_tok_s"], row["repeats"]) == (row["rows"] * 40 / 2.0, 3)
        assert row["command"].startswith("fastdms bench decode --shape tiny")
    assert theirs[0]["step_ms_spread"] == {"p20": 500.0, "p50": 500.0, "p80": 560.0}, "one of three took longer"
    for ours, other in zip((one, two), theirs, strict=True):
        assert ours["times_faster"] == pytest.approx(ours["decode_tok_s"] / other["decode_tok_s"], abs=1e-4)
        assert ours["times_faster_median"] == pytest.approx(
            ours["decode_tok_s_median"] / other["decode_tok_s_median"], abs=1e-4
        )
        assert "peer" not in ours
    start, *runs = _calls(tmp_path)
    assert start["environment"] == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    assert start["options"] == {
        "tokenizer": None, "skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16",
        "kv_cache_dtype": "auto", "max_model_len": 52, "max_num_seqs": 2, "enable_prefix_caching": False,
        "disable_log_stats": True, "gpu_memory_utilization": start["options"]["gpu_memory_utilization"],
    }  # fmt: skip
    assert 0 < start["options"]["gpu_memory_utilization"] <= 0.85
    assert (start["config"]["architectures"], start["config"]["num_key_value_heads"]) == (["LlamaForCausalLM"], 2)
    for rows, part in ((1, runs[:7]), (2, runs[7:])):
        assert [run["max_tokens"] for run in part] == [8, 1, 11, 1, 11, 1, 11]
        for run in part:
            assert run["lengths"] == [40] * rows
            assert run["most"] < 512
            assert run["min_tokens"] == run["max_tokens"]
            assert (run["temperature"], run["ignore_eos"], run["detokenize"]) == (0.0, True, False)


def test_a_process_for_each_context_serves_every_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--context", "40", "50", "--new-tokens", "4", "--concurrency", "1", "--kept", "0.5", "0.25"]
    rows = _rows(tmp_path, capsys, *given, "--repeats", "1", blocks=None)
    assert [(row.get("peer"), row["context"]) for row in rows] == [
        ("vllm", 40), ("vllm", 50), (None, 40), (None, 50), (None, 40), (None, 50),
    ]  # fmt: skip
    assert rows[0]["kv_tokens"] is None
    starts = [call["options"] for call in _calls(tmp_path) if "options" in call]
    assert [options["max_model_len"] for options in starts] == [45, 55]


def test_a_context_that_fills_the_positions(tmp_path: Path) -> None:
    _write_vllm(tmp_path)
    settings = EngineSettings(
        shape="tiny", concurrency=(1,), contexts=(16380,), new_tokens=4, repeats=1, peer=str(tmp_path)
    )
    options = resolve_options(
        SHAPES["tiny"], device="cpu", dtype="bf16", kv_dtype="auto", weights="auto", max_concurrency=1,
        max_context=16384, kv_memory=None, prefill_chunk=2048, mode=None,
    )  # fmt: skip
    (row,) = measure_vllm(settings, SHAPES["tiny"], options)
    assert row["error"] == "ValueError: the KV cache holds 15,984 tokens and 1 rows take 16,384"
    (start,) = _calls(tmp_path)
    assert start["config"]["max_position_embeddings"] == start["options"]["max_model_len"] == 16385


@pytest.mark.parametrize(("asked", "stored"), [("auto", "auto"), ("bf16", "auto"), ("fp8", "fp8")])
def test_kv_is_stored_alike_with_eviction_off(
    asked: str, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = _rows(tmp_path, capsys, "--kv-dtype", asked, "--dms", "off", "--concurrency", "1", "--repeats", "1")
    assert _calls(tmp_path)[0]["options"]["kv_cache_dtype"] == stored
    assert theirs["kv_dtype"] == ours["kv_dtype"] == ("float8_e4m3fn" if asked == "fp8" else "bfloat16")
    assert (ours["dms"], ours["live_share"]) == ("off", 1.0)
    assert ours["times_faster"] > 0


@pytest.mark.parametrize(
    ("running", "message"),
    [
        ("if len(prompts) == 2: raise RuntimeError('no' + chr(10) + 'memory')", "RuntimeError: no memory"),
        ("if len(prompts) == 2: os.write(2, b'killed' + bytes([10])); os._exit(9)", "killed"),
        ("if len(prompts) == 2: os._exit(9)", "exit code 9"),
        (
            "params.max_tokens -= len(prompts) == 2",
            "ValueError: 8 tokens were asked of each of 2 rows, got [7, 7]",
        ),
    ],
)
def test_a_run_that_fails_costs_its_own_row_alone(
    running: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, one, two = _rows(tmp_path, capsys, running=running)
    assert good["decode_tok_s"] == 2.0
    assert one["times_faster"] > 0
    assert (bad["peer"], bad["rows"], bad["error"]) == ("vllm", 2, message)
    assert two["times_faster"] is two["times_faster_median"] is None
    assert two["decode_tok_s"] is not None


def test_rows_that_would_wait_for_each_other_are_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, *_ = _rows(tmp_path, capsys, blocks=6)
    assert good["kv_tokens"] == 96
    assert bad["error"] == "ValueError: the KV cache holds 96 tokens and 2 rows take 102"


@pytest.mark.parametrize("how", ["absent", "broken", "slow"])
def test_a_peer_that_does_not_start_costs_only_its_rows(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = "ModuleNotFoundError: No module named 'vllm'"
    (tmp_path / "vllm.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'vllm'\")"
    )  # also where it is installed
    if how == "broken":
        (tmp_path / "vllm.py").write_text("__version__ = '9'\ndef LLM(**_):\n    raise OSError('two\\nlines')")
        error = "OSError: two lines"
    if how == "slow":
        monkeypatch.setattr(vllm_peer, "_PATIENCE_S", 0.001)
        error = "the process took more than 0.001 s"
    assert main([*ARGUMENTS, *BF16, "--peer", str(tmp_path)]) == 0
    *theirs, one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["error"] for row in theirs] == [error] * 2
    assert theirs[0].get("version") == ("9" if how == "broken" else None)
    assert one["times_faster"] is two["times_faster"] is None


def test_the_process_sees_one_device_and_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings(shape="tiny", peer=str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    environment = vllm_peer._environment(settings, torch.device("cuda:1"))
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["PYTHONPATH"] == f"{tmp_path.resolve()}{os.pathsep}before"


def test_the_script_needs_nothing_of_fastdms() -> None:
    script = f"import runpy, sys; runpy.run_path({vllm_run.__file__!r}); print('fastdms' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--peer compares models with weights in bf16 (--weights bf16), got float32"),
        ([*BF16, "--weights", "fp8"], "(--weights bf16), got float8_e4m3fn"),
        ([*BF16, "--weights", "int4"], "(--weights bf16), got "),
        ([*BF16, "--kv-dtype", "fp32"], "--peer compares KV in bf16 or fp8 (--kv-dtype), got float32"),
        ([*BF16, "--temperature", "0.5"], "--peer decodes greedily: --temperature must be 0, got 0.5"),
        ([*BF16, "--mode", "graphs"], "mode 'graphs' needs a CUDA device"),
        ([*BF16, "--peer", "no-such-folder"], "--peer no-such-folder is no folder"),
    ],
)
def test_what_is_not_compared(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "--peer", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_checkpoint_has_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--model", "x", "--peer", str(tmp_path)]) == 2
    assert "--peer is for random weights (--shape)" in capsys.readouterr().err
    assert main(["bench", "prefill", "--peer", str(tmp_path)]) == 2
    assert "unrecognized arguments: --peer" in capsys.readouterr().err
