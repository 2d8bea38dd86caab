"""What an engine has its runner do, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import fastdms
from fastdms.graphs import RowInput
from fastdms.runner import FirstTokens, Flight
from tests.running import engine_of


class Calls:
    """``starts``: of each decode step, the rows that the host filled in, or 0 where it went on by itself.
    ``events``: "start", "land", "release", "prefill" and "sample" as they come."""

    def __init__(self, model: fastdms.CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: list[int] = []
        self.events: list[str] = []
        runner = engine_of(model).runner
        decode = runner.decode

        def started(inputs: Sequence[RowInput] | None, first: FirstTokens | None = None) -> Flight:
            self.starts.append(0 if inputs is None else len(inputs))
            self.events.append("start")
            return decode(inputs, first)

        monkeypatch.setattr(runner, "decode", started)
        for owner, name, event in (
            (runner, "prefill", "prefill"),
            (runner, "release", "release"),
            (runner, "sample", "sample"),
            (Flight, "land", "land"),
        ):
            monkeypatch.setattr(owner, name, self.noted(getattr(owner, name), event))

    def noted(self, call: Any, event: str) -> Any:
        """``call``, with ``event`` before it."""

        def noted(*args: Any) -> Any:
            self.events.append(event)
            return call(*args)

        return noted
