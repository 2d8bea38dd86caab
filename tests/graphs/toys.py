"""A step without a model, and a recorder that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastdms.graphs import RowInput, StepBuffers, StepOutput
from fastdms.graphs.capture import Recording


def sorting_step(inputs: StepBuffers) -> StepOutput:
    """Compiles in no time: sorting has no generated code."""
    return torch.sort(inputs.tokens).values, torch.sort(inputs.end_ids).values


def rows(count: int, *, token: int = 0) -> list[RowInput]:
    return [RowInput(row=n, token=token + n, position=n) for n in range(count)]


class FakeRecorder:
    """Runs the step at each replay, writes into the outputs as a graph would, and says that it keeps ``kept_bytes``.

    recorded: batch sizes in the order of their captures.
    """

    def __init__(self, kept_bytes: Callable[[int], int] = lambda bucket: 100 * bucket) -> None:
        self.kept_bytes = kept_bytes
        self.warmed = 0
        self.recorded: list[int] = []

    def warm_up(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        run()
        self.warmed += 1

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recording:
        outputs = run()
        bucket = outputs[0].shape[0]
        self.recorded.append(bucket)

        def replay() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return Recording(replay, outputs, self.kept_bytes(bucket), 1000 if len(self.recorded) == 1 else 0)
