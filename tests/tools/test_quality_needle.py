"""The needle probe: what it puts where, and how it scores."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fastdms.tools.quality import needle
from fastdms.tools.quality.needle import CANDIDATES, DEPTHS, candidate_scores, measure_needles, needle_prompt
from fastdms.tools.quality.settings import Settings
from tests.tiny_tokenizers import byte_level
from tests.tools.test_quality import sparse_checkpoint, wikitext

CONTEXT = 200


def test_scores_are_the_log_likelihoods_of_the_answers() -> None:
    """A scorer that gives token i after token j the probability (i + j + 1) / (sum over i)."""
    weights = torch.arange(4)[:, None] + torch.arange(4) + 1.0
    table = (weights / weights.sum(-1, keepdim=True)).log()

    def score(sequences: list[list[int]], prompt_lens: list[int]) -> list[torch.Tensor]:
        return [table[ids[length - 1 :]] for ids, length in zip(sequences, prompt_lens, strict=True)]

    answers = [[1, 2], [3], [0, 0, 0]]
    expected = [table[3, 1] + table[1, 2], table[3, 3], table[3, 0] + 2 * table[0, 0]]
    assert candidate_scores(score, [2, 3], answers) == pytest.approx([float(value) for value in expected])


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_lies_at_its_depth(depth: float, adds_bos: bool) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    filler = ([tokenizer.bos_token_id] if adds_bos else []) + [100] * CONTEXT
    prompt, answers = needle_prompt(tokenizer, filler, depth, random.Random(0), CONTEXT)
    assert len(answers) == len({tuple(answer) for answer in answers}) == CANDIDATES
    assert {len(answer) for answer in answers} == {8}  # a space and seven digits
    assert len(prompt) + 8 == CONTEXT
    text = tokenizer.decode(prompt[adds_bos:])
    told, _, asked = text.partition(tokenizer.decode(answers[0]))
    city = told.split()[-2]
    assert told.endswith(f"\nThe secret number of {city} is")
    assert asked.startswith(".\n")
    assert asked.endswith(f"\nThe secret number of {city} is")
    before, after = told.rindex("\n"), asked.rindex("\n") - 2
    assert abs(before + adds_bos - depth * (before + after + adds_bos)) <= 1
    assert (prompt[0] == tokenizer.bos_token_id) == adds_bos


def test_a_needle_needs_room() -> None:
    with pytest.raises(ValueError, match="a context of 70 tokens is too short for a needle"):
        needle_prompt(byte_level(), [5] * 70, 0.5, random.Random(0), 70)


def test_the_probe_runs_and_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "_NEEDLES_PER_DEPTH", 2)
    folder = sparse_checkpoint(tmp_path, "adapter")
    settings = Settings(context=CONTEXT, prompt_tokens=100, device="cpu")
    results = measure_needles(folder, [wikitext()], settings)
    assert [row["depth"] for row in results] == list(DEPTHS)
    for row in results:
        assert (row["text"], row["kv_dtype"], row["needles"]) == ("wikitext", "fp32", 2)
        assert 0 <= row["accuracy_off"] <= 1
        assert row["margin_off"] != row["margin_on"], "eviction must change what a random model says"
    assert measure_needles(folder, [wikitext()], settings) == results
