"""The command line in a process of its own, and with a real model."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from fastdms.cli import main
from fastdms.cli.main import COMMANDS
from tests.cli.fake_model import one_error_line
from tests.models import save_checkpoint, tiny_model
from tests.tiny_tokenizers import byte_level


def run(*arguments, **options):
    command = [sys.executable, "-m", "fastdms", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_help_is_quick_and_loads_no_model_library():
    script = f"""
import sys
from fastdms.cli import main
for command in ["", *{list(COMMANDS)!r}]:
    assert main([*command.split(), "--help"]) == 0
heavy = {{"torch", "transformers", "numpy", "safetensors", "tokenizers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"usage: fastdms {command} " in done.stdout


def test_the_module_runs():
    done = run("generate", "hi", "--top-p", "7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "top_p must be" in one_error_line(done.stderr)


def test_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastdms", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = save_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("model"), "shisa")
    byte_level().save_pretrained(folder)
    return str(folder)


def test_cuda_where_there_is_none(tiny_folder):
    done = run("generate", tiny_folder, "hi", "--device", "cuda", env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cuda" in one_error_line(done.stderr).lower()


def test_a_real_model_generates_and_chats(tiny_folder, monkeypatch, capsys):
    flags = ["--device", "cpu", "--max-tokens", "5", "--ignore-eos", "--temperature", "0"]
    assert main(["generate", tiny_folder, "hello", "--kv", *flags]) == 0
    plain = capsys.readouterr()
    assert "tokens" in plain.err
    assert main(["generate", tiny_folder, "hello", "--stream", *flags]) == 0
    assert capsys.readouterr().out == plain.out
    assert main(["generate", tiny_folder, "hello", "--chat", *flags]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", tiny_folder, *flags]) == 0
    assert capsys.readouterr().out == answer
