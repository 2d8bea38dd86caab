"""Documents from files, and contexts from documents."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from fastdms.tools.retrofit import text
from fastdms.tools.retrofit.text import pack, read_documents, text_digest
from tests.tiny_tokenizers import byte_level


def test_sources_in_order(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "ignored.py").write_text("not text")
    chat = [{"role": "user", "content": "hello"}]
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    assert list(read_documents([str(tmp_path)])) == ["first", "second", "third", chat]
    assert list(read_documents([str(lines), str(tmp_path / "a.md")])) == ["third", chat, "first"]


def test_data_set(monkeypatch) -> None:
    asked = []

    def load_dataset(name, **rest):
        asked.append((name, rest))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_documents(["dataset:someone/prose:validation"])) == ["one", "two"]
    assert asked == [("someone/prose", {"split": "validation", "streaming": True})]


def test_data_set_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="dataset:x needs the package datasets"):
        list(read_documents(["dataset:x"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r'a.jsonl, line 2: needs "text", or "messages"'),
        ("a.jsonl", b"{}\nnot json\n", "a.jsonl, line 1: needs"),
        ("a.jsonl", b"not json\n", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a.jsonl, line 1: needs"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents([str(tmp_path / name)]))


def test_no_text_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="no text to train on"):
        list(read_documents([]))
    with pytest.raises(ValueError, match="is no file or folder"):
        list(read_documents([str(tmp_path / "missing.txt")]))
    with pytest.raises(ValueError, match=r"holds no \.txt, \.md or \.jsonl"):
        list(read_documents([str(tmp_path)]))


def test_pack_keeps_every_token_in_order(monkeypatch) -> None:
    monkeypatch.setattr(text, "_PIECE_CHARS", 20)
    monkeypatch.setattr(text, "_BATCH_PIECES", 2)
    tokenizer = byte_level()
    document = "\n\n".join(f"paragraph number {i} says hello" for i in range(9))
    short = "a second document"
    contexts = pack(iter([document, short]), tokenizer, 16)
    end = tokenizer.eos_token_id
    expected = [*tokenizer(document, add_special_tokens=False)["input_ids"], end]
    expected += [*tokenizer(short, add_special_tokens=False)["input_ids"], end]
    assert contexts.dtype == np.int32
    assert contexts.shape == (len(expected) // 16, 16)
    assert contexts.ravel().tolist() == expected[: contexts.size]


def test_pack_writes_chats_by_the_template() -> None:
    tokenizer = byte_level()
    chat = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert pack(iter([chat]), tokenizer, len(expected))[0].tolist() == expected


def test_less_than_one_context_is_named() -> None:
    with pytest.raises(ValueError, match="less than one context of 512"):
        pack(iter(["short"]), byte_level(), 512)


def test_digest_sees_text_and_shape() -> None:
    contexts = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert text_digest(contexts) == text_digest(contexts.copy())
    assert text_digest(contexts) != text_digest(contexts.reshape(4, 3))
    assert text_digest(contexts) != text_digest(contexts + 1)
