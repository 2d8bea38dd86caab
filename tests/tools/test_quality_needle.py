"""The needle probe: what it puts where, and how it scores."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdms.tools.quality import needle
from fastdms.tools.quality.measure import open_subject
from fastdms.tools.quality.needle import (
    CANDIDATES,
    DEPTHS,
    Needle,
    candidate_scores,
    hide_needle,
    hide_needles,
    measure_needles,
)
from fastdms.tools.quality.report import document, markdown
from fastdms.tools.quality.settings import Settings
from tests import oracle
from tests.models import adapter_weights, dms_config, tiny_model
from tests.tiny_tokenizers import byte_level
from tests.tolerance import LOGITS_RELATIVE
from tests.tools.test_quality import sparse_checkpoint, wikitext

CONTEXT = 200
SETTINGS = Settings(context=CONTEXT, prompt_tokens=100, rows=3, device="cpu")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_scores_are_the_log_likelihoods_of_the_answers(rows: int) -> None:
    """A scorer that gives token i after token j the probability (i + j + 1) / (sum over i)."""
    weights = torch.arange(4)[:, None] + torch.arange(4) + 1.0
    table = (weights / weights.sum(-1, keepdim=True)).log()

    def score(sequences: list[list[int]], prompt_lens: list[int]) -> list[torch.Tensor]:
        assert len(sequences) <= rows
        return [table[ids[length - 1 :]] for ids, length in zip(sequences, prompt_lens, strict=True)]

    asked = Needle(prompt=[2, 3], start=0, answers=[[1, 2], [3], [0, 0, 0]])
    expected = [table[3, 1] + table[1, 2], table[3, 3], table[3, 0] + 2 * table[0, 0]]
    assert candidate_scores(score, asked, rows) == pytest.approx([float(value) for value in expected])


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_lies_at_its_depth(depth: float, adds_bos: bool) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    filler = ([tokenizer.bos_token_id] if adds_bos else []) + [100] * CONTEXT
    hidden = hide_needle(tokenizer, filler, depth, random.Random(0), CONTEXT)
    prompt, answers = hidden.prompt, hidden.answers
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
    assert hidden.start == before + adds_bos
    assert abs(hidden.start - depth * (before + after + adds_bos)) <= 1
    assert (prompt[0] == tokenizer.bos_token_id) == adds_bos


def test_a_needle_needs_room() -> None:
    with pytest.raises(ValueError, match="a context of 70 tokens is too short for a needle"):
        hide_needle(byte_level(), [5] * 70, 0.5, random.Random(0), 70)


def test_a_needle_is_inside_the_window_if_no_query_is_past_it() -> None:
    hidden = Needle(prompt=list(range(10)), start=4, answers=[[0], [0, 1, 2]])
    assert hidden.is_inside(7)  # the last query is at 11: it says which token the answer ends with
    assert not hidden.is_inside(6)


def test_the_figures_are_those_of_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "_NEEDLES_PER_DEPTH", 6)
    monkeypatch.setattr(needle, "DEPTHS", (0.25, 0.75))
    subject = open_subject(sparse_checkpoint(tmp_path, "adapter"), [wikitext()], SETTINGS)
    hidden = hide_needles(subject, [wikitext()])
    results = measure_needles(subject, hidden)
    assert hide_needles(subject, [wikitext()]) == hidden, "chance comes from a seed"
    assert [(row["text"], row["kv_dtype"], row["depth"]) for row in results] == [
        ("wikitext", "fp32", 0.25),
        ("wikitext", "fp32", 0.75),
    ]
    model = tiny_model("llama")

    def margin(asked: Needle, window_tokens: int) -> float:
        likelihoods = []
        for answer in asked.answers:
            ids = asked.prompt + answer
            rule = dms_config("adapter", window_tokens)
            logits = oracle.dms_logits(model, ids, rule, adapter_weights(model)).double().log_softmax(-1)
            likelihoods.append(sum(logits[at - 1, ids[at]].item() for at in range(len(asked.prompt), len(ids))))
        return likelihoods[0] - max(likelihoods[1:])

    for row in results:
        needles = hidden["wikitext"][row["depth"]]
        assert row["needles"] == len(needles) == 6
        assert row["inside_window"] is False
        for name, window_tokens in (("off", 10**6), ("on", 7)):
            margins = [margin(asked, window_tokens) for asked in needles]
            assert row[f"margin_{name}"] == pytest.approx(sum(margins) / 6, rel=LOGITS_RELATIVE)
            assert row[f"accuracy_{name}"] == sum(each > 0 for each in margins) / 6
    assert results[0]["accuracy_off"] != results[0]["accuracy_on"], "else swapping the two would not show"


def test_what_lies_inside_the_window_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "_NEEDLES_PER_DEPTH", 2)
    folder = sparse_checkpoint(tmp_path, "adapter", dms_window_size=130)
    subject = open_subject(folder, [wikitext()], replace(SETTINGS, rows=8))
    hidden = hide_needles(subject, [wikitext()])
    results = measure_needles(subject, hidden)
    for row in results:
        for asked in hidden["wikitext"][row["depth"]]:
            ids = asked.prompt + asked.answers[0][:-1]
            live = oracle.kept(
                tiny_model("llama"), ids, dms_config("adapter", 130), adapter_weights(tiny_model("llama"))
            )
            told = live[..., asked.start : asked.start + 40]
            assert row["inside_window"] == bool(told.all())
    printed = markdown(document(subject, [], needles=results))
    depths = [line.split(" | ")[2] for line in printed.splitlines() if line.startswith("| wikitext | fp32")]
    assert depths == ["0%", "25%", "50%", "75%, inside the window", "95%, inside the window"]
