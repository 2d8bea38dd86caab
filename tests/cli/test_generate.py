"""``fastdms generate``: what reaches the runtime and what is printed; its options are those of ``fastdms chat`` too."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from fastdms.cli import main
from fastdms.sampling_params import SamplingParams

EVERY_FLAG: dict[str, dict[str, Any]] = {
    "--temperature 0.5": {"temperature": 0.5},
    "--top-p 0.9": {"top_p": 0.9},
    "--top-k 7": {"top_k": 7},
    "--min-p 0.1": {"min_p": 0.1},
    "--presence-penalty 0.5": {"presence_penalty": 0.5},
    "--frequency-penalty -0.5": {"frequency_penalty": -0.5},
    "--repetition-penalty 1.2": {"repetition_penalty": 1.2},
    "--max-tokens 9": {"max_tokens": 9},
    "--min-tokens 3": {"min_tokens": 3},
    "--stop a --stop b": {"stop": ("a", "b")},
    "--stop-token-id 3 --stop-token-id 4": {"stop_token_ids": (3, 4)},
    "--seed 11": {"seed": 11},
    "--ignore-eos": {"ignore_eos": True},
}
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "--dms off": {"dms": "off"},
    "--device cpu": {"device": "cpu"},
    "--dtype bf16": {"dtype": "bf16"},
    "--weights fp8": {"weights": "fp8"},
    "--kv-dtype fp8": {"kv_dtype": "fp8"},
    "--kv-memory 1000": {"kv_memory": 1000},
    "--kv-memory 0.5": {"kv_memory": 0.5},
    "--kv-memory 1.5GiB": {"kv_memory": 3 * 2**29},
    "--kv-memory 2mb": {"kv_memory": 2_000_000},
    "--max-context 64": {"max_context": 64},
    "--prefill-chunk 5": {"prefill_chunk": 5},
    "--mode eager": {"mode": "eager"},
}


def test_generate_with_the_default_model(model, capsys):
    assert main(["generate", "Hello there"]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert model.opened == [("the default model", {"max_concurrency": 1})]
    assert model.asked == [("Hello there", SamplingParams(max_tokens=256))]
    assert model.closed


@pytest.mark.parametrize("words", ["MODEL hi --seed 1", "--seed 1 MODEL hi", "MODEL --seed 1 hi"])
def test_generate_with_a_model(model, words):
    assert main(["generate", *words.split()]) == 0
    assert model.opened[0][0] == "MODEL"
    assert model.asked == [("hi", SamplingParams(seed=1))]


@pytest.mark.parametrize("flags", EVERY_FLAG)
@pytest.mark.parametrize("command", ["generate hi --stream", "chat"])
def test_every_sampling_field(model, monkeypatch, flags, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main([*command.split(), *flags.split()]) == 0
    defaults: dict[str, Any] = {"max_tokens": 256 if "generate" in command else 1024}
    assert model.asked[0][1] == SamplingParams(**(defaults | EVERY_FLAG[flags]))


def test_every_sampling_field_has_a_flag():
    fields = {name for change in EVERY_FLAG.values() for name in change} | {"logprobs"}
    assert fields == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("flags", MODEL_FLAGS)
@pytest.mark.parametrize("command", ["generate hi", "chat"])
def test_model_options(model, monkeypatch, flags, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([*command.split(), *flags.split()]) == 0
    assert model.opened[0][1] == {"max_concurrency": 1} | MODEL_FLAGS[flags]


def test_streaming_is_for_terminals(model, monkeypatch, capsys):
    def streamed(*flags):
        model.allowed.clear()
        assert main(["generate", "hi", *flags]) == 0
        assert capsys.readouterr().out.startswith("ok\n")
        return bool(model.allowed)

    assert not streamed()
    assert streamed("--stream")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert streamed()
    assert not streamed("--no-stream")
    assert not streamed("--logprobs", "2")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("allow", [[], ["--allow-control-tokens"]])
def test_generate_answers_a_message(model, stream, allow):
    assert main(["generate", "--chat", "hi", stream, *allow]) == 0
    assert model.asked[0][0] == [{"role": "user", "content": "hi"}]
    assert model.allowed == [bool(allow)]


def test_the_prompt_from_stdin(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(["generate", "-"]) == 0
    assert model.asked[0][0] == "two\nlines\n"


def test_logprobs_are_listed(model, capsys):
    assert main(["generate", "hi", "--logprobs", "2"]) == 0
    assert capsys.readouterr().out == "ok\n-1.5000 '\"'\t-0.5000 '!'\t-1.5000 '\"'\n-0.2500 '#'\t-0.2500 '#'\n"


def test_the_text_alone_goes_to_stdout(model, capsys):
    assert main(["generate", "hi", "--kv"]) == 0
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "its KV cache keeps every token" in err
    assert "KV REPORT" in err
    assert main(["generate", "hi", "--dms", "off"]) == 0
    assert capsys.readouterr().err == ""
