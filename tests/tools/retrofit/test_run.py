"""Whole runs through the command line: what they leave behind, and how they end before their time."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import fastdms
from fastdms.checkpoint import open_checkpoint
from fastdms.cli import main
from fastdms.tools.retrofit.run_folder import RunFolder
from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.trainer import Trainer
from tests.models import save_checkpoint, tiny_model
from tests.tiny_tokenizers import byte_level

_RECIPE = [
    *("--context", "48", "--window-tokens", "4", "--sequences", "4", "--micro-batch", "4", "--ramp-steps", "12"),
    *("--anneal-steps", "4", "--target-compression", "3", "--learning-rate", "3e-3", "--aux-weight", "50"),
    *("--device", "cpu"),
]


@pytest.fixture
def base(tmp_path):
    folder = save_checkpoint(tiny_model("llama_group3"), tmp_path / "base")
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("\n\n".join(f"In year {n} the harvest was said to be {n % 7} parts good." for n in range(99)))
    return path


def _train(base, prose, out, *extra) -> int:
    return main(["retrofit", str(base), "--text", str(prose), "--out", str(out), *_RECIPE, *extra])


def _adapter_bytes(out):
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["adapter", "nvidia", "shisa"])
def test_the_result_is_a_checkpoint_that_evicts(base, prose, tmp_path, capsys, layout) -> None:
    out = tmp_path / "run"
    extra = [] if layout == "adapter" else ["--zeroing-steps", "4"]
    assert _train(base, prose, out, "--layout", layout, *extra) == 0
    assert str(out / "final") in capsys.readouterr().out
    log = RunFolder(out).log()
    assert [line["step"] for line in log] == list(range(16 + len(extra) * 2))
    assert {"kl", "compression", "compression_asked", "tokens_per_s", "trained_s"} <= log[0].keys()
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "state.pt").exists()
    checkpoint = open_checkpoint(out / "final")
    expected = RetrofitSettings(layout=layout, window_tokens=4, target_compression=3.0, context=48).rule
    assert checkpoint.dms == expected
    with fastdms.compile(out / "final", device="cpu", max_concurrency=1, max_context=400) as model:
        ids = [3 + i % 250 for i in range(300)]
        model.score(ids, 200)
        assert model.kv_report().live_share < 0.9


def test_interrupted_then_resumed_is_the_same_as_never_stopped(base, prose, tmp_path, monkeypatch, capsys) -> None:
    assert _train(base, prose, tmp_path / "whole") == 0
    step = Trainer.step

    def interrupted(self, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    out = tmp_path / "stopped"
    assert _train(base, prose, out) == 130
    assert f"stopped after step 7; go on with: fastdms retrofit --resume {out}" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["retrofit", "--resume", str(out), "--device", "cpu"]) == 0
    assert _adapter_bytes(out) == _adapter_bytes(tmp_path / "whole")
    unclocked = [
        [{k: v for k, v in line.items() if k not in ("tokens_per_s", "trained_s")} for line in RunFolder(path).log()]
        for path in (out, tmp_path / "whole")
    ]
    assert unclocked[0] == unclocked[1]


def test_killed_between_saves_goes_back_to_the_last_state(base, prose, tmp_path, monkeypatch) -> None:
    """What was logged after the state, half a line included, happens again."""
    assert _train(base, prose, tmp_path / "whole") == 0
    step = Trainer.step

    def killed(self, number):
        if number == 9:
            raise RuntimeError("power cut")
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", killed)
    monkeypatch.setattr("fastdms.tools.retrofit.runner.SAVE_EVERY_STEPS", 5)
    out = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="power cut"):
        _train(base, prose, out)
    with RunFolder(out).log_path.open("a") as file:
        file.write('{"step": 9, "kl": 0.')
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["retrofit", "--resume", str(out), "--device", "cpu"]) == 0
    assert [line["step"] for line in RunFolder(out).log()] == list(range(16))
    assert _adapter_bytes(out) == _adapter_bytes(tmp_path / "whole")


def test_a_full_disk_keeps_the_last_state(base, prose, tmp_path, monkeypatch, capsys) -> None:
    assert _train(base, prose, tmp_path / "whole") == 0
    monkeypatch.setattr("fastdms.tools.retrofit.runner.SAVE_EVERY_STEPS", 4)
    save, saves = torch.save, []

    def full_at_the_second(state, path):
        saves.append(path)
        if len(saves) == 2:
            path.write_bytes(b"half a state")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    out = tmp_path / "full"
    assert _train(base, prose, out) == 2
    assert "No space left on device" in capsys.readouterr().err
    state = RunFolder(out).load_state()
    assert state is not None
    assert state["done"] == 4
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "run.json", "state.pt"]
    assert main(["retrofit", "--resume", str(out), "--device", "cpu"]) == 0
    assert _adapter_bytes(out) == _adapter_bytes(tmp_path / "whole")


def _error(arguments, capsys):
    capsys.readouterr()
    assert main(["retrofit", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_runs_are_one_line_and_leave_nothing(base, prose, tmp_path, capsys) -> None:
    out, sparse = tmp_path / "out", save_checkpoint(tiny_model("llama"), tmp_path / "sparse", "nvidia")
    byte_level().save_pretrained(sparse)
    given = ["--text", prose, "--out", out]
    cases = {
        (base, *given, *_RECIPE, "--target-compression", "0.5"): "target_compression must be a number > 1, got 0.5",
        (base, *given, *_RECIPE, "--context", "99999"): "less than one context of 99,999",
        (sparse, *given, *_RECIPE): "already has DMS (window 7); give its base model",
        (base, *given, *_RECIPE, "--layout", "other"): "layout must be adapter, nvidia or shisa, got 'other'",
        (base, "--text", tmp_path / "none.txt", "--out", out, *_RECIPE): "is no file or folder",
        (tmp_path / "none", *given, *_RECIPE): "is no existing folder",
        (base, "--out", out): "--text and --out are needed",
        ("--resume", out): f"{out} holds no training run",
        ("--resume", out, *given): "give nothing besides --device",
    }
    for arguments, message in cases.items():
        assert message in _error(arguments, capsys)
        assert not out.exists()


def test_unsupported_family_is_named(base, prose, tmp_path, capsys) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    assert "GPT2LMHeadModel" in _error([base, "--text", prose, "--out", tmp_path / "out"], capsys)


def test_folders_of_other_runs_are_left_alone(base, prose, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert _train(base, prose, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "is not empty" in _error([base, "--text", prose, "--out", out, *_RECIPE], capsys)
    assert "is done" in _error(["--resume", out], capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_needs_the_same_text_and_a_whole_state(base, prose, tmp_path, monkeypatch, capsys) -> None:
    step = Trainer.step

    def interrupted(self, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    out = tmp_path / "out"
    assert _train(base, prose, out) == 130
    capsys.readouterr()
    text = prose.read_text()
    prose.write_text(text.replace("harvest", "weather"))
    assert "has changed since it began" in _error(["--resume", out, "--device", "cpu"], capsys)
    prose.write_text(text)
    (out / "state.pt").write_bytes(b"not a state")
    assert "state.pt is damaged" in _error(["--resume", out, "--device", "cpu"], capsys)
    (out / "run.json").write_text("{}")
    assert "doesn't describe a training run" in _error(["--resume", out], capsys)
