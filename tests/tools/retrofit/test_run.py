"""Whole runs through the command line: what they leave behind, and how they end before their time."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdms
from fastdms.checkpoint import open_checkpoint
from fastdms.cli import main
from fastdms.tools.retrofit.run_folder import RunFolder
from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.trainer import Trainer
from tests.int4_folder import int4_model, pack_folder
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


@contextmanager
def _interrupted_in_step_6(number: int):
    step = Trainer.step

    def interrupted(self, done):
        if done == 6:
            os.kill(os.getpid(), number)
        return step(self, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        yield


def test_interrupted_then_resumed_is_the_same_as_never_stopped(base, prose, tmp_path, capsys) -> None:
    assert _train(base, prose, tmp_path / "whole") == 0
    out = tmp_path / "stopped"
    with _interrupted_in_step_6(signal.SIGINT):
        assert _train(base, prose, out) == 130
    assert f"stopped after step 7; go on with: fastdms retrofit --resume {out}" in capsys.readouterr().err
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
        file.write('[]\n{"step": 9, "kl": 0.')
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
    stored = pack_folder(save_checkpoint(int4_model("llama"), tmp_path / "stored"), 32)
    given = ["--text", prose, "--out", out]
    cases = {
        (
            base,
            *given,
            *_RECIPE,
            "--target-compression",
            "0.5",
        ): "target_compression must be a number > 1, at most 1,000, got 0.5",
        (base, *given, *_RECIPE, "--context", "99999"): "context 99,999 exceeds the 1,024 positions of",
        (sparse, *given, *_RECIPE): "already has DMS (window 7); give its base model",
        (stored, *given, *_RECIPE): "has int4 weights, which training can't read",
        (base, *given, *_RECIPE, "--layout", "other"): "layout must be adapter, nvidia or shisa, got 'other'",
        (base, "--text", tmp_path / "none.txt", "--out", out, *_RECIPE): "is no file or folder",
        (tmp_path / "none", *given, *_RECIPE): "is no existing folder",
        (base, "--out", out): "--text and --out are needed",
        ("--resume", out): f"{out} holds no training run",
        ("--resume", out, *given): "give nothing besides --device",
        ("--resume", out, "--learning-rate", "9"): "give nothing besides --device",
        (base, *given, *_RECIPE, "--context", "1024", "--text", tmp_path / "short.txt"): "is no file or folder",
        (base, *given, *_RECIPE, "--trainable", "q_proj"): "trainable is for a borrowed channel",
        (base, "--text", prose.parent, "--out", out, *_RECIPE): f"--out {out} lies within the text",
        (base, "--text", prose, "--out", prose, *_RECIPE): f"{prose} is a file; choose another --out",
    }
    for arguments, message in cases.items():
        assert message in _error(arguments, capsys)
        assert not out.exists()


def test_weights_that_do_not_exist_are_named(base, prose, tmp_path, capsys) -> None:
    arguments = [
        base,
        "--text",
        prose,
        "--out",
        tmp_path / "out",
        *_RECIPE,
        "--layout",
        "shisa",
        "--trainable",
        "nothing",
    ]
    assert "trainable: no weight has 'nothing' in its name" in _error(arguments, capsys)


def test_dms_that_is_declared_unused_is_still_no_base(base, prose, tmp_path, capsys) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dms_window_size": 4, "dms_disable_eviction": True}))
    assert "already has DMS, which it declares not to use" in _error(
        [base, "--text", prose, "--out", tmp_path / "out", *_RECIPE], capsys
    )


def test_a_base_that_transformers_cannot_load_is_named(base, prose, tmp_path, capsys) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    assert "transformers can't load" in _error([base, "--text", prose, "--out", tmp_path / "out", *_RECIPE], capsys)


@pytest.mark.parametrize("layout", ["nvidia", "shisa"])
def test_what_was_trained_is_what_is_written(base, prose, tmp_path, monkeypatch, layout) -> None:
    trainers: list[Trainer] = []
    made = Trainer.__init__

    def kept(self, *arguments):
        trainers.append(self)
        made(self, *arguments)

    monkeypatch.setattr(Trainer, "__init__", kept)
    assert _train(base, prose, tmp_path / "run", "--layout", layout, "--zeroing-steps", "2") == 0
    written, before = load_file(tmp_path / "run" / "final" / "model.safetensors"), load_file(base / "model.safetensors")
    assert written.keys() == before.keys()
    for name, parameter in trainers[0].trained.items():
        assert torch.equal(written[name], parameter), name
    assert not all(torch.equal(written[name], before[name]) for name in written)


def test_a_head_that_is_stored_although_it_is_the_embedding_is_written_as_trained(prose, tmp_path) -> None:
    base = save_checkpoint(tiny_model("llama"), tmp_path / "base")
    byte_level().save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    assert _train(base, prose, tmp_path / "run", "--layout", "shisa", "--zeroing-steps", "2") == 0
    written = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_picture_that_cannot_be_drawn_loses_nothing(base, prose, tmp_path, monkeypatch, capsys) -> None:
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdms.tools.retrofit.runner.plot_log", full)
    assert _train(base, prose, tmp_path / "run") == 0
    assert "no picture of the run: [Errno 28]" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_a_result_that_cannot_be_written_is_written_by_resuming(base, prose, tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastdms.tools.retrofit.runner.write_result", lambda *rest: (_ for _ in ()).throw(ValueError("full"))
        )
        assert _train(base, prose, tmp_path / "run") == 2
    steps: list[int] = []
    step = Trainer.step

    def counted(self, number):
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", counted)
    assert main(["retrofit", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert steps == []
    assert _train(base, prose, tmp_path / "whole") == 0
    assert _adapter_bytes(tmp_path / "run") == _adapter_bytes(tmp_path / "whole")


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


def test_resume_needs_the_same_text_and_a_whole_state(base, prose, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    with _interrupted_in_step_6(signal.SIGTERM):
        assert _train(base, prose, out) == 130
    capsys.readouterr()
    text = prose.read_text()
    prose.write_text(text.replace("harvest", "weather"))
    assert "has changed since it began" in _error(["--resume", out, "--device", "cpu"], capsys)
    prose.write_text(text)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors")
    assert "the base of the run" in _error(["--resume", out, "--device", "cpu"], capsys)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    torch.save([1, 2], out / "state.pt")
    assert "state.pt is damaged" in _error(["--resume", out, "--device", "cpu"], capsys)
    (out / "state.pt").write_bytes(b"not a state")
    assert "state.pt is damaged" in _error(["--resume", out, "--device", "cpu"], capsys)
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"device": "NVIDIA H100"}))
    assert "began on NVIDIA H100, and computes otherwise on cpu" in _error(["--resume", out, "--device", "cpu"], capsys)
    (out / "run.json").write_text("{}")
    assert "doesn't describe a training run" in _error(["--resume", out], capsys)
