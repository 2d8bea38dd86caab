"""Any history of the cache against a plain Python model, by the reference and by the kernels."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.ops.harness import DEVICE
from tests.ops.machine import CacheMachine


class _KernelMachine(CacheMachine):
    backend = "kernel"


def test_reference() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=80, stateful_step_count=25))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CUDA machine runs more")
def test_kernels_in_the_interpreter() -> None:
    run_state_machine_as_test(_KernelMachine, settings=settings(max_examples=5, stateful_step_count=12))


@pytest.mark.gpu
def test_kernels_on_the_gpu() -> None:
    run_state_machine_as_test(_KernelMachine, settings=settings(max_examples=50, stateful_step_count=25))
