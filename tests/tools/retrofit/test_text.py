"""Documents from files, and contexts from documents."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from fastdms.tools.retrofit import text
from fastdms.tools.retrofit.text import Document, pack, read_documents, text_digest
from tests.tiny_tokenizers import byte_level


def test_sources_in_order(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "ignored.py").write_text("not text")
    chat = [{"role": "user", "content": "hello"}]
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    contents = [document.content for document in read_documents([str(tmp_path)])]
    assert contents == ["first", "second", "third", chat]
    documents = list(read_documents([str(lines), str(tmp_path / "a.md")]))
    assert [document.content for document in documents] == ["third", chat, "first"]
    assert [document.where for document in documents] == [
        f"{lines}, line 1",
        f"{lines}, line 3",
        str(tmp_path / "a.md"),
    ]


def test_data_set(monkeypatch) -> None:
    asked = []

    def load_dataset(name, **rest):
        asked.append((name, rest))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents = list(read_documents(["dataset:someone/prose:validation"]))
    assert [document.content for document in documents] == ["one", "two"]
    assert asked == [("someone/prose", {"split": "validation", "streaming": True})]


def test_data_set_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="dataset:x needs the package datasets"):
        list(read_documents(["dataset:x"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r'a.jsonl, line 2: needs "text", a string, or "messages"'),
        ("a.jsonl", b"{}\nnot json\n", "a.jsonl, line 1: needs"),
        ("a.jsonl", b"not json\n", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"messages": 5}\n', "a.jsonl, line 1: needs"),
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


def _documents(*contents) -> list[Document]:
    return [Document(f"document {number}", content) for number, content in enumerate(contents)]


def test_pack_keeps_every_token_in_order(monkeypatch) -> None:
    monkeypatch.setattr(text, "_PIECE_CHARS", 20)
    monkeypatch.setattr(text, "_BATCH_PIECES", 2)
    tokenizer = byte_level(adds_bos=False)
    document = "\n\n".join(f"paragraph number {i} says hello" for i in range(9))
    short = "a second document"
    contexts = pack(_documents(document, short), tokenizer, 16)
    end = tokenizer.eos_token_id
    expected = [*tokenizer(document, add_special_tokens=False)["input_ids"], end]
    expected += [*tokenizer(short, add_special_tokens=False)["input_ids"], end]
    assert contexts.dtype == np.int32
    assert contexts.shape == (len(expected) // 16, 16)
    assert contexts.ravel().tolist() == expected[: contexts.size]


def test_pack_writes_chats_by_the_template() -> None:
    tokenizer = byte_level(adds_bos=False)
    chat = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert pack(_documents(chat), tokenizer, len(expected))[0].tolist() == expected


def test_each_context_begins_as_each_prompt_will() -> None:
    tokenizer = byte_level(adds_bos=True)
    contexts = pack(_documents("a longer text that fills a few contexts"), tokenizer, 8)
    assert len(contexts) > 2
    assert contexts[:, 0].tolist() == [tokenizer.bos_token_id] * len(contexts)
    without = pack(_documents("a longer text that fills a few contexts"), byte_level(adds_bos=False), 7)
    assert contexts[:, 1:].tolist() == without.tolist()


def test_lines_of_jsonl_end_only_where_json_says(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [document.content for document in read_documents([str(path)])] == ["one\u2028two\u0085three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ud800", "document 0: .*surrogates not allowed"),
        ([], "document 0: messages must be a list of at least one"),
        ([{"role": "user", "content": None}], "document 0: the content of message 0 must be a string"),
        ([{"role": 5, "content": "x"}], "document 0: the role of message 0"),
    ],
)
def test_documents_that_make_no_text_are_named(content, message) -> None:
    with pytest.raises(ValueError, match=message):
        pack(_documents(content), byte_level(), 8)


def test_a_template_that_refuses_a_chat_is_named() -> None:
    tokenizer = byte_level(template="{{ raise_exception('no such turn') }}")
    with pytest.raises(ValueError, match="document 0: the chat template refuses these messages: no such turn"):
        pack(_documents([{"role": "user", "content": "x"}]), tokenizer, 8)


def test_less_than_one_context_is_named() -> None:
    with pytest.raises(ValueError, match="less than one context of 512"):
        pack(_documents("short"), byte_level(adds_bos=False), 512)


def test_digest_sees_text_and_shape() -> None:
    contexts = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert text_digest(contexts) == text_digest(contexts.copy())
    assert text_digest(contexts) != text_digest(contexts.reshape(4, 3))
    assert text_digest(contexts) != text_digest(contexts + 1)
