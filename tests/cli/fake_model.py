"""A stand-in for the runtime behind the command line."""

from __future__ import annotations

from typing import Any

from fastdms.completion import Completion, StreamPiece
from fastdms.sampling_params import SamplingParams
from tests.tiny_tokenizers import byte_level


class FakeModel:
    """Answers every prompt with the letters of "ok", and keeps what it was asked."""

    def __init__(self):
        self.tokenizer = byte_level()
        self.dms: Any = None
        self.opened: list[tuple[object, dict[str, object]]] = []
        self.asked: list[tuple[object, SamplingParams]] = []
        self.allowed: list[bool] = []
        self.closed = False
        self.pieces: list[object] = ["o", "", "k"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def __call__(self, prompt, params):
        self.asked.append((prompt, params))
        logprobs = None if params.logprobs is None else [{3: -0.5, 4: -1.5}, {5: -0.25}]
        return Completion(
            text="ok", token_ids=[4, 5], finish_reason="stop", prompt_tokens=1, logprobs=logprobs, kv=self.kv_report()
        )

    def chat(self, messages, params, *, allow_control_tokens=False):
        self.allowed.append(allow_control_tokens)
        return self(messages, params)

    def stream(self, prompt, params, *, allow_control_tokens=False):
        self.asked.append((prompt, params))
        self.allowed.append(allow_control_tokens)
        for piece in self.pieces:
            if isinstance(piece, BaseException) or (isinstance(piece, type) and issubclass(piece, BaseException)):
                raise piece
            yield StreamPiece(text=str(piece), token_ids=[1], finish_reason="length" if piece == "k" else None)

    def kv_report(self):
        return "KV REPORT"


def one_error_line(stderr):
    lines = [line for line in stderr.splitlines() if "no trained eviction" not in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("fastdms: error: ")
    return lines[0]
