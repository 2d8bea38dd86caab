"""``fastdms bench kernels --ops decode_linear dequantise``: the bytes that it counts, layers of published shapes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastdms.cli import main
from fastdms.tools.bench.cases import build, launch
from fastdms.tools.bench.linears import _size
from fastdms.tools.bench.settings import LINEARS
from fastdms.tools.bench.spec import Spec

CPU = torch.device("cpu")


def _spec(linear: str, weights: str = "bf16") -> Spec:
    return Spec(
        op="decode_linear", head_dim=64, kv_heads=8, group=4, kv_dtype="fp8", page_size=64, window_tokens=256, rows=3,
        linear=linear, weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
def test_layers_count_their_bytes(weights: str) -> None:
    for linear, channels, depth, rest in (
        ("qkv", 128, 64, 3 * (64 + 128) + 64),
        ("o", 64, 64, 3 * (64 + 64 + 64)),
        ("gate_up", 256, 64, 3 * (64 + 128) + 64),
        ("down", 64, 128, 3 * (128 + 64 + 64)),
        ("lm_head", 512, 64, 3 * (64 + 2 * 512) + 64),
    ):
        case = build(_spec(f"tiny.{linear}", weights), CPU, num_sets=1)
        out = launch(case.spec, case.sets[0], None, 0)
        assert 0.2 < float(out.float().std()) < 3
        row = {"bf16": 2 * depth, "fp8": depth + 4, "int4": depth // 2 + 2}[weights]  # one group of 64 or 128
        assert case.num_bytes == channels * row + 2 * rest
        assert case.num_bytes == out.nbytes + sum(x.nbytes for x in case.sets[0].values())


@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_weights_alone_count_their_bytes(weights: str) -> None:
    for layer in ("qkv", "o", "gate_up", "down", "lm_head"):
        linear = build(_spec(f"tiny.{layer}", weights), CPU, num_sets=1).sets[0]
        case = build(replace(_spec(f"tiny.{layer}", weights), op="dequantise"), CPU, num_sets=1)
        assert {name: x.shape for name, x in case.sets[0].items()} == {n: linear[n].shape for n in ("weight", "scale")}
        out = launch(case.spec, case.sets[0], None, 0)
        assert float(out.float().std()) == pytest.approx(out.shape[1] ** -0.5, rel=0.1)
        assert case.num_bytes == out.nbytes + sum(x.nbytes for x in case.sets[0].values())


def test_sizes_are_those_of_the_models() -> None:
    assert _size(_spec("llama-3.2-1b.qkv")) == (3072, 2048)
    assert _size(_spec("llama-3.2-1b.gate_up")) == (8192, 2048)
    assert _size(_spec("qwen3-8b.o")) == (4096, 4096)
    assert _size(_spec("qwen3-8b.down")) == (4096, 12288)
    assert all(_size(_spec(linear)) for linear in LINEARS)


def test_layers_are_timed_beside_the_product_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--ops",
        "decode_linear",
        "--linear",
        "tiny.down",
        "--rows",
        "1",
        "16",
        "--device",
        "cpu",
        "--repeats",
        "2",
    ]
    assert main(["bench", "kernels", *arguments]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["linear"], row["weights"], row["rows"]) for row in rows] == [
        ("tiny.down", weights, count) for weights in ("bf16", "fp8", "int4") for count in (1, 16)
    ]
    assert [list(row["peers"]) for row in rows] == [["product alone"]] * 2 + [[]] * 4


def test_weights_that_need_no_copy_are_refused_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu", "--ops", "dequantise", "--weights", "bf16"]) == 2
    assert "--ops dequantise takes --weights fp8 or int4, got bf16" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--linear", "tiny.up"), ("--weights", "int8")])
def test_unknown_layers_and_weights_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu", option, value]) == 2
    assert f"{option} must be of" in capsys.readouterr().err
