"""What holds for every test: poisoned uninitialised memory, fixed seeds, one thread, no GPU test without a GPU; and
the model that most of them run."""

from __future__ import annotations

import gc
import os
import random
import sys
from typing import TYPE_CHECKING

import hypothesis
import numpy
import pytest
import torch

from tests.interpreter import make_fast
from tests.poison import poisoned_empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if torch.cuda.is_available():
    import torch._inductor.config

    # Else each of many workers that compile starts a pool of as many processes as there are cores.
    torch._inductor.config.compile_threads = 1
else:
    # Triton reads this when a kernel is defined, so it has to be set before anything imports one.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py could ask for its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    make_fast()

# One thread: the models are tiny, and two cores are better used by two workers (`pytest -n 2`).
torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="module")
def weights() -> PreTrainedModel:
    """A tiny Qwen3 with random weights, each file's own."""
    from tests.models import tiny_model  # not above: it takes transformers, which tests of ops do without

    return tiny_model("qwen3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    _thin_out(config, items)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _thin_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked ``wide(n)`` keep every n-th case: a GPU runs all of them, the interpreter would take minutes."""
    seen: dict[str, int] = {}
    dropped = []
    for item in items:
        mark = item.get_closest_marker("wide")
        if mark and not item.get_closest_marker("gpu"):
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % mark.args[0]:
                dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what torch and transformers have made by now stays: each collection would look through all of it


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}", file=sys.stderr, flush=True)  # at once: a run that is stopped has no summary


def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> object:
    """For the whole session: a function-scoped fixture would not be undone between the examples of a @given test."""
    with pytest.MonkeyPatch.context() as patch:
        poisoned_empty(patch)
        yield
