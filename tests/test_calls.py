"""A call with several prompts: what it gives back when one of them fails, and how its progress is counted."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest

from fastdms import IncompleteError, runtime
from fastdms.progress import progress
from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_tokens
from tests.running import check_idle, compiled, many, one

MASKED = dms_config("nvidia", 7)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_the_other_prompts_gave_is_not_lost(weights, bad: int) -> None:
    """One prompt finds no KV memory; those before and after it come back with the error."""
    prompts: list[Any] = [[5, 6, 7], [8, 9], [10]]
    with compiled(weights, dms="off", pages=7) as model:
        alone = [one(model(prompt, GREEDY)).token_ids for prompt in prompts]
        prompts[bad] = tiny_tokens(200)
        with pytest.raises(IncompleteError, match=rf"^prompt {bad} of 3: kv_memory is too small: .* 1 of 3") as failure:
            model(prompts, GREEDY)
        check_idle(model)
        tokens = [None if done is None else done.token_ids for done in failure.value.completions]
        assert tokens == [None if i == bad else ids for i, ids in enumerate(alone)]
        assert isinstance(failure.value.__cause__, ValueError)
        again = pickle.loads(pickle.dumps(failure.value))
        assert (str(again), len(again.completions)) == (str(failure.value), 3)


def test_a_lone_prompt_that_failed(weights) -> None:
    with compiled(weights, dms="off", pages=7) as model:
        for prompts in (tiny_tokens(200), [tiny_tokens(200)]):
            with pytest.raises(IncompleteError, match=r"^kv_memory is too small: .* more kv_memory$") as failure:
                model(prompts, GREEDY)
            assert failure.value.completions == [None]


def test_progress_counts_tokens(weights, monkeypatch) -> None:
    """As they come, rows of unequal length side by side; what a text that ends early leaves out is no longer due."""
    with compiled(weights, dms=MASKED, max_concurrency=2) as model:
        prompts: list[Any] = [[5, 6, 7], [8, 9], [10], [11]]
        stop = one(model(prompts[0], GREEDY)).token_ids[3]
        bars, seen = [], []

        def shown(**given: Any) -> Any:
            bar = progress(**given, show=True)
            update = bar.update

            def watched(count: int) -> None:
                update(count)
                seen.append((bar.n, bar.total))

            bar.update = watched
            bars.append(bar)
            return bar

        monkeypatch.setattr(runtime, "progress", shown)
        completions = many(model(prompts, replace(GREEDY, stop_token_ids=[stop])))
    count = sum(len(done.token_ids) for done in completions)
    most = len(prompts) * GREEDY.max_tokens
    assert count < most
    (bar,) = bars
    assert bar.unit == " tokens"
    assert seen[-1] == (count, count)
    assert seen[0] == (4, most), "two rows, each with a token from its prefill and one of the decode step"
    for (n, total), (later, less) in itertools.pairwise(seen):
        assert n < later <= n + 4
        assert later <= less <= total
