"""One model, several threads; and models that can't carry a prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdms
from fastdms.graphs import RowInput
from fastdms.runner import FirstTokens
from tests.models import save_checkpoint, tiny_model, tiny_tokens
from tests.running import check_idle, compiled, engine_of, one
from tests.tiny_tokenizers import CHATML, sentencepiece

PROMPTS = [tiny_tokens(40, seed=seed) for seed in range(6)]


def test_threads_share_a_model() -> None:
    """Calls, streams and scores from six threads give what they give alone, and leave nothing held."""
    model = compiled(tiny_model("llama"), prefill_chunk=16, max_concurrency=3)
    alone = [one(model(prompt, temperature=0, max_tokens=20, ignore_eos=True)).token_ids for prompt in PROMPTS]
    logits = model.score(PROMPTS[0], 30)
    got: dict[int, list[int]] = {}
    scores: list[torch.Tensor] = []

    def work(index: int) -> None:
        if index % 2:
            done = one(model(PROMPTS[index], temperature=0, max_tokens=20, ignore_eos=True))
            got[index] = done.token_ids
        else:
            pieces = model.stream(PROMPTS[index], temperature=0, max_tokens=20, ignore_eos=True)
            got[index] = [token for piece in pieces for token in piece.token_ids]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    scores.append(model.score(PROMPTS[0], 30))
    assert [got[index] for index in range(len(PROMPTS))] == alone
    assert torch.equal(scores[0], logits)
    check_idle(model)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}])
def test_logits_that_are_not_finite_are_an_error(sampling: dict[str, Any]) -> None:
    weights = tiny_model("llama_bias")
    weights.model.embed_tokens.weight.data[5] = torch.nan
    model = compiled(weights)
    with pytest.raises(ValueError, match="logits are not finite"):
        model([5], **sampling)
    with pytest.raises(ValueError, match="logits are not finite"):
        model.score([5, 7], 1)
    check_idle(model)
    assert one(model([7, 8], temperature=0, max_tokens=3, ignore_eos=True)).finish_reason == "length"


def test_a_rule_given_by_hand_leaves_the_declared_one_unread(tmp_path: Path) -> None:

    folder = save_checkpoint(tiny_model("llama"), tmp_path)
    (folder / "dms_metadata.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dms_metadata\.json"):
        compiled(folder)
    assert compiled(folder, dms=fastdms.DMSConfig(window_tokens=3)).dms == fastdms.DMSConfig(window_tokens=3)


def test_an_answer_does_not_begin_with_the_space_of_a_continuation() -> None:
    """A sentencepiece word brings its space: right where a text goes on, wrong where a chat is answered."""
    tokenizer = sentencepiece(template=CHATML)
    word = next(ids for ids in range(3, 300) if tokenizer.convert_ids_to_tokens(ids).startswith("\u2581"))
    weights = tiny_model("llama_bias")
    weights.lm_head.weight.data.zero_()
    model = compiled(weights, tokenizer=tokenizer)
    chat: list[dict[str, str]] = [{"role": "user", "content": "a"}]
    fixed: dict[str, Any] = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}
    runner = engine_of(model).runner
    sample = runner.sample

    def sampled(logits: torch.Tensor, inputs: Sequence[RowInput]) -> FirstTokens:
        given = sample(logits, inputs)
        return FirstTokens(torch.full_like(given.tokens, word), given.ends)

    runner.sample = sampled  # type: ignore[method-assign]
    answers = [
        model.chat(chat, **fixed).text,
        one(model(chat, **fixed)).text,
        "".join(piece.text for piece in model.stream(chat, **fixed)),
    ]
    continued = one(model(model._prompts.read(chat), **fixed)).text
    assert continued.startswith(" ")
    assert answers == [continued[1:]] * 3
