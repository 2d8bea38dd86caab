"""Which prompts are prefilled densely, what that holds beside the cache, and that it sees no rounded keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastdms
from fastdms.decoder import DenseHistory
from fastdms.ops import dense_attention
from fastdms.runner import PrefillPiece, fill_chunk
from fastdms.sampling_params import SamplingParams
from tests.models import dms_config, tiny_tokens
from tests.running import check_idle, compiled, drain, engine_of, many, one, submit
from tests.tolerance import assert_logits_close

MASKED = dms_config("nvidia", 7)
assert MASKED is not None
DENSE = replace(MASKED, prefill="dense")
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and end of every chunk that a first layer prefills densely."""
    found: list[tuple[int, int]] = []
    calls = [0]

    def seen(q: torch.Tensor, *args: Any, start: int, **options: Any) -> torch.Tensor:
        if calls[0] % 2 == 0:  # of two layers
            found.append((start, start + q.shape[0]))
        calls[0] += 1
        return dense_attention(q, *args, start=start, **options)

    monkeypatch.setattr("fastdms.decoder.dense_attention", seen)
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("off", [(0, 50), (50, 64), (0, 50)]),
        (DENSE, [(0, 1), (0, 50), (50, 64), (0, 49), (0, 50), (0, 3)]),
        (MASKED, []),
    ],
    ids=["off", "dense", "masked"],
)
def test_which_prompts_are(weights, spans, rule: Any, expected: list[tuple[int, int]]) -> None:
    """Without eviction those that fill a chunk; where the rule asks for it, all."""
    prompts = [tiny_tokens(length) for length in (1, 64, 49, 50, 3)]
    with compiled(weights, dms=rule, prefill_chunk=50, max_concurrency=5) as model:
        model(prompts, GREEDY)
        assert spans == expected
        spans.clear()
        model.score_batch([[*prompt, 5] for prompt in prompts], [len(prompt) for prompt in prompts])
        assert spans == expected
        assert model.dense_kernel == ("reference" if expected else None)
        check_idle(model)


def test_what_was_generated_is_recomputed_densely_only_without_eviction(weights, spans) -> None:
    for rule, expected in (("off", [(0, 20), (20, 33)]), (DENSE, [(0, 20), (20, 30)])):
        spans.clear()
        with compiled(weights, dms=rule, prefill_chunk=20) as model:
            engine = engine_of(model)
            request = submit(model, tiny_tokens(30), replace(GREEDY, max_tokens=6))
            while len(request.output_ids) < 4:
                engine.step()
            spans.clear()
            engine._starve(request, alone=False, lost_tokens=0)
            drain(model, [request])
            assert spans == expected
            again = submit(model, tiny_tokens(30), replace(GREEDY, max_tokens=6))
            drain(model, [again])
            assert again.output_ids == request.output_ids


@pytest.mark.parametrize("rule", ["off", DENSE], ids=["off", "dense"])
def test_one_history_at_a_time(weights, rule: Any) -> None:
    """Two prompts are admitted at once; a score between two chunks of the first has a history of its own."""
    with compiled(weights, dms=rule, prefill_chunk=20, max_concurrency=3) as model:
        engine = engine_of(model)
        held = engine.runner._histories
        expected = model.score(tiny_tokens(70, seed=5), 60)
        assert not held
        requests = [submit(model, tiny_tokens(60, seed=seed), GREEDY) for seed in (1, 2)]
        steps = []
        while not all(request.finished for request in requests):
            engine.step()
            steps.append([(request.computed, request.row in held) for request in requests if request.row is not None])
            assert len(held) <= 1
            if len(steps) == 1:
                assert torch.equal(model.score(tiny_tokens(70, seed=5), 60), expected)
                assert len(held) == 1
        assert steps[0] == [(20, True), (0, False)]
        cancelled = submit(model, tiny_tokens(60), GREEDY)
        engine.step()
        assert len(held) == 1
        engine.cancel(cancelled)
        assert not held
        check_idle(model)


def test_rounded_pages_are_not_seen(weights) -> None:
    """A prompt's own logits are those of fp32 pages, whatever the pages are: its chunks see unrounded keys."""
    ids = tiny_tokens(60)
    with compiled(weights, dms="off") as model:
        expected = model.score(ids, 60)
    for chunk in (20, 33, 60):
        with compiled(weights, dms="off", kv_dtype="fp8", prefill_chunk=chunk) as model:
            assert_logits_close(model.score(ids, 60), expected)


def test_no_memory_for_a_history(weights, monkeypatch) -> None:
    """Only the prompt that needs it fails; what runs beside it goes on."""
    with compiled(weights, dms=DENSE, prefill_chunk=20) as model:
        expected = [done.token_ids for done in many(model([tiny_tokens(30), tiny_tokens(5)], GREEDY))]
        make = DenseHistory.__init__

        def made(self: DenseHistory, config: Any, num_tokens: int, *args: Any) -> None:
            if num_tokens > 80:
                raise torch.OutOfMemoryError("CUDA out of memory")
            make(self, config, num_tokens, *args)

        monkeypatch.setattr(DenseHistory, "__init__", made)
        for _ in range(2):
            with pytest.raises(
                fastdms.IncompleteError, match="no memory on cpu to prefill 90 tokens densely"
            ) as caught:
                model([tiny_tokens(30), tiny_tokens(90), tiny_tokens(5)], GREEDY)
            first, none, last = caught.value.completions
            assert none is None
            assert first is not None
            assert last is not None
            assert [first.token_ids, last.token_ids] == expected
            with pytest.raises(ValueError, match="no memory on cpu"):
                model.score(tiny_tokens(90), 85)
            check_idle(model)


def test_a_dense_piece_stands_alone() -> None:
    def piece(row: int, tokens: int, dense: bool) -> PrefillPiece:
        return PrefillPiece(row=row, token_ids=[7] * tokens, start=0, dense_tokens=tokens if dense else 0)

    masked, dense = [piece(i, 4, False) for i in range(3)], piece(9, 12, True)
    assert [(p.row, len(p.token_ids)) for p in fill_chunk(masked, 10)] == [(0, 4), (1, 4)]
    assert [(p.row, len(p.token_ids)) for p in fill_chunk([dense, *masked], 10)] == [(9, 10)]
    assert [(p.row, len(p.token_ids)) for p in fill_chunk([masked[0], dense, masked[1]], 10)] == [(0, 4)]


def test_rows_are_cut_at_multiples_of_the_chunk() -> None:
    """Whatever they share their chunks with."""
    pieces = [PrefillPiece(row=i, token_ids=[7] * 25, start=start) for i, start in enumerate((8, 20, 0))]
    assert [(p.row, len(p.token_ids)) for p in fill_chunk(pieces, 10)] == [(0, 2)]
    assert [(p.row, len(p.token_ids)) for p in fill_chunk(pieces[1:], 10)] == [(1, 10)]
    short = [replace(piece, token_ids=[7] * 3) for piece in pieces]
    assert [(p.row, len(p.token_ids)) for p in fill_chunk(short, 10)] == [(0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("rule", ["off", MASKED], ids=["off", "masked"])
def test_neighbours_do_not_show_where_pages_are_rounded(weights, rule: Any) -> None:
    """A prompt that shares its chunks sees its own keys as unrounded as it does alone."""
    prompts, params = [tiny_tokens(length, seed=length) for length in (37, 49, 12, 61)], replace(GREEDY, logprobs=3)
    with compiled(weights, dms=rule, kv_dtype="fp8", prefill_chunk=50, max_concurrency=4) as model:
        alone = [one(model(prompt, params)) for prompt in prompts]
        together = many(model(prompts, params))
    for one_, other in zip(alone, together, strict=True):
        assert one_.token_ids == other.token_ids
        assert one_.logprobs is not None
        assert other.logprobs is not None
        for mine, theirs in zip(one_.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
