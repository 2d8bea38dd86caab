"""``fastdms chat`` over a pipe."""

from __future__ import annotations

import io
import sys

from fastdms.cli import main
from tests.cli.fake_model import one_error_line
from tests.tiny_tokenizers import byte_level


def chat(monkeypatch, *lines, flags=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", *flags])


def contents(messages):
    return [message["content"] for message in messages]


def test_chat_keeps_the_history(model, monkeypatch, capsys):
    assert chat(monkeypatch, "one", "", "  two  ", "/reset", "three", "/exit", "four") == 0
    assert [contents(prompt) for prompt, _ in model.asked] == [["one"], ["one", "ok", "two"], ["three"]]
    assert [message["role"] for message in model.asked[1][0]] == ["user", "assistant", "user"]
    out, err = capsys.readouterr()
    assert out == "ok\nok\nok\n"
    assert err.count("the answer was cut (length)") == 3
    assert model.closed


def test_chat_has_a_system_message(model, monkeypatch):
    assert chat(monkeypatch, "one", "/reset", "two", flags=["MODEL", "--system", "Be brief."]) == 0
    assert [contents(prompt) for prompt, _ in model.asked] == [["Be brief.", "one"], ["Be brief.", "two"]]
    assert model.opened[0][0] == "MODEL"


def test_chat_goes_on_after_a_message_that_cannot_be_answered(model, monkeypatch, capsys):
    model.pieces = [ValueError("the prompt has 9 tokens")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat"]) == 2
    assert [contents(prompt) for prompt, _ in model.asked] == [["one"], ["two"]]
    assert capsys.readouterr().err.count("fastdms: error: the prompt has 9 tokens") == 2


def test_chat_needs_a_template(model, monkeypatch, capsys):
    model.tokenizer = byte_level(template=None)
    assert chat(monkeypatch, "one") == 2
    assert "no chat template" in one_error_line(capsys.readouterr().err)
    assert model.closed
