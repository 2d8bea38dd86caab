"""Draws histories until the time or the number of cases is reached."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastdms.tools.fuzz.budget import WrongAnswer
from fastdms.tools.fuzz.draw import draw_setting
from fastdms.tools.fuzz.history import CACHE_OPS, CacheHistory
from fastdms.tools.fuzz.single import run_single
from fastdms.tools.fuzz.tally import Tally

__all__ = ["Outcome", "Wrong", "fuzz"]

_MOST_WRONG = 10  # failing histories after which more would tell nothing new
_CACHE_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """One history that failed: what was wrong, and in which setting."""

    history: int
    op: str
    message: str
    difference: float
    setting: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """tally: what was tried in ``seconds``. wrong: the histories that failed, at most ten."""

    tally: Tally = field(default_factory=Tally)
    wrong: list[Wrong] = field(default_factory=list)
    histories: int = 0
    seconds: float = 0.0


def fuzz(
    ops: tuple[str, ...], device: torch.device, *, seed: int, seconds: float | None = None, cases: int | None = None,
    only: int | None = None, report: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Throw random calls of ``ops`` at their kernels until ``seconds`` or ``cases`` are reached, or ten are wrong.

    only: run this history alone. report: called after each history; the one under way is always finished.
    """
    outcome, start = Outcome(), time.monotonic()
    index = 0 if only is None else only
    with _two_threads_at_most():
        while True:
            wrong = _history(ops, device, seed, index, outcome.tally)
            outcome.wrong += [wrong] if wrong else []
            outcome.histories += 1
            outcome.seconds = time.monotonic() - start
            report(outcome)
            index += 1
            if (
                only is not None
                or (seconds is not None and outcome.seconds >= seconds)
                or (cases is not None and outcome.tally.total >= cases)
                or len(outcome.wrong) >= _MOST_WRONG
            ):
                return outcome


def _history(ops: tuple[str, ...], device: torch.device, seed: int, index: int, tally: Tally) -> Wrong | None:
    """Histories of one round share a setting, for which kernels are compiled once."""
    per_round = 32 if device.type == "cuda" else 1
    setting = draw_setting(np.random.default_rng([seed, 1, index // per_round]), device)
    rng = np.random.default_rng([seed, 2, index])
    of_cache, alone = ([op for op in ops if (op in CACHE_OPS) == wanted] for wanted in (True, False))
    running = "draw"
    try:
        if of_cache and (not alone or rng.random() < _CACHE_SHARE):
            running = "cache history"
            CacheHistory(setting, rng, device, tuple(of_cache), tally).run(24 if device.type == "cuda" else 8)
        else:
            running = str(rng.choice(alone))
            for _ in range(8 if device.type == "cuda" else 2):
                run_single(running, setting, rng, device, tally)
    except Exception as error:  # an op that raises on valid input is as wrong as one that computes nonsense
        known = isinstance(error, WrongAnswer)
        fields = [(name, getattr(setting, name)) for name in setting.__slots__]
        return Wrong(
            history=index,
            op=error.op if isinstance(error, WrongAnswer) else running,
            message=str(error) if known else f"{type(error).__name__}: {error}",
            difference=error.difference if isinstance(error, WrongAnswer) else 0.0,
            setting={name: str(value) if isinstance(value, torch.dtype) else value for name, value in fields},
        )
    return None


@contextlib.contextmanager
def _two_threads_at_most() -> Iterator[None]:
    """The references' tensors are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
