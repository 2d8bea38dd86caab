"""The same history through the reference and through the kernel, compared after every call."""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.harness import assert_close_to_definition, assert_same_state
from tests.ops.rig import Results, Rig
from tests.tolerance import assert_within_error_budget


class Pair:
    """Two rigs of the same options and inputs, as a context manager. Integer state must agree exactly after every call,
    numbers within the error budget over all calls at the end: of a few numbers the largest error is mere chance.
    """

    def __init__(self, **options: Any) -> None:
        self.reference, self.kernel = Rig("reference", **options), Rig("kernel", **options)
        self._results: list[tuple[Results, Results]] = []

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            reference, kernel = (
                Results(*map(torch.cat, zip(*results, strict=True))) for results in zip(*self._results, strict=True)
            )
            compare_results(reference, kernel)

    def decode(self, rows: list[int]) -> None:
        self._compare(self.reference.decode(rows), self.kernel.decode(rows))

    def prefill(self, pieces: list[tuple[int, int]], padding: int = 0) -> None:
        self._compare(self.reference.prefill(pieces, padding), self.kernel.prefill(pieces, padding))

    def release(self, rows: list[int]) -> None:
        for rig in (self.reference, self.kernel):
            rig.release(rows)

    def _compare(self, reference: Results, kernel: Results) -> None:
        for rig in (self.reference, self.kernel):
            rig.check()
        assert_same_state(self.kernel.cache, self.reference.cache)
        self._results.append((reference, kernel))


def compare_results(reference: Results, kernel: Results) -> None:
    """Reference against its fp64 oracle; kernel against its own within what the reference's error allows."""
    assert_close_to_definition(reference.q, reference.q_oracle)
    assert_close_to_definition(reference.out, reference.out_oracle)
    assert_within_error_budget(kernel.q, reference.q, reference.q_oracle)
    # Each oracle attends with its rig's own rotated queries and stored tokens, so move the reference's error over.
    moved = kernel.out_oracle + (reference.out.double() - reference.out_oracle)
    assert_within_error_budget(kernel.out, moved, kernel.out_oracle)


def check_results(results: Results) -> None:
    """A single rig's numbers against fp64."""
    assert_close_to_definition(results.q, results.q_oracle)
    assert_close_to_definition(results.out, results.out_oracle)


def random_step(generator: torch.Generator, rows: int) -> list[int]:
    """A decode batch: some of the rows in any order, with padding among them."""
    order = torch.randperm(rows, generator=generator).tolist()
    keep = [row for row in order if torch.rand((), generator=generator) < 0.7]
    keep.insert(int(torch.randint(len(keep) + 1, (), generator=generator)), -1)
    return keep
