"""Scoring while requests hold the rows: they are carried on to their ends, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_tokens
from tests.running import check_idle, compiled, drain, engine_of, one, submit
from tests.tolerance import assert_logits_close

MASKED = dms_config("nvidia", 7)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_scoring_waits_for_rows(weights: PreTrainedModel, count: int, ahead: bool) -> None:
    """Streams that hold them are carried on to their ends, those that wait for one not let in before."""
    prompts = [tiny_tokens(length, seed=length) for length in (3, 50, 90, 120, 7, 20)]
    with compiled(weights, dms=MASKED) as model:
        engine_of(model)._run_ahead = ahead
        expected = [one(model(prompt, GREEDY)).token_ids for prompt in prompts]
        alone = model.score_batch(prompts[:count], [2] * count)
        streams = [model.stream(prompt, GREEDY) for prompt in prompts]
        pieces = [[next(stream)] for stream in streams[:4]]
        waiting = submit(model, prompts[0], GREEDY)
        scored = model.score_batch(prompts[:count], [2] * count)
        assert not waiting.output_ids
        drain(model, [waiting])
        for logits, others in zip(scored, alone, strict=True):
            assert_logits_close(logits, others)
        pieces += [[], []]
        tokens = [
            [token for piece in [*before, *stream] for token in piece.token_ids]
            for before, stream in zip(pieces, streams, strict=True)
        ]
        assert tokens == expected
        check_idle(model)


@pytest.mark.parametrize("ahead", [False, True])
def test_scoring_waits_for_no_one_who_is_gone(weights: PreTrainedModel, ahead: bool) -> None:
    """A cancelled request gives its row up, and rows that nobody gives back are no reason to wait."""
    with compiled(weights, dms=MASKED, max_concurrency=2) as model:
        engine = engine_of(model)
        engine._run_ahead = ahead
        long = submit(model, [5, 6, 7], replace(GREEDY, max_tokens=200))
        engine.step()
        step = engine._step

        def cancelling() -> None:
            step()
            engine.cancel(long)

        engine._step = cancelling  # type: ignore[method-assign]
        rows = engine.take_rows(2)
        assert len(long.output_ids) < 5
        with pytest.raises(ValueError, match="1 rows are needed, and the others are taken"):
            engine.take_rows(1)
        engine.return_rows(rows)
        del engine._step
        check_idle(model)
