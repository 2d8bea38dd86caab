"""Steps that start before the first tokens of prompts are read, which are fed to them on the device."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fastdms
from fastdms import engine as engine_module
from fastdms.graphs import send
from fastdms.ops import NOT_FINITE
from fastdms.runner import FirstTokens
from fastdms.sampling_params import SamplingParams
from tests.calls import Calls
from tests.models import tiny_tokens
from tests.running import Watch, check_idle, compiled, drain, engine_of, one, submit
from tests.tiny_tokenizers import byte_level

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [tiny_tokens(length, seed=length) for length in (40, 63, 5, 90, 1, 64, 17, 30)]


@pytest.fixture(scope="module")
def alone(weights: PreTrainedModel) -> list[fastdms.Completion]:
    with compiled(weights, dms="off", max_concurrency=1, tokenizer=byte_level()) as model:
        return [one(model(prompt, GREEDY)) for prompt in PROMPTS]


def note_reads(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events "read": of what a turn of chunks gave."""

    def sent(x: torch.Tensor) -> Any:
        return types.SimpleNamespace(read=calls.noted(send(x).read, "read"))

    monkeypatch.setattr(engine_module, "send", sent)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_step_starts_before_first_tokens_are_read(weights, alone, monkeypatch, logprobs: int | None) -> None:
    """But not where logits are read as well, which the step overwrites."""
    with compiled(weights, dms="off", max_concurrency=4) as model:
        engine_of(model)._run_ahead = True
        requests = [submit(model, PROMPTS[n], replace(GREEDY, logprobs=logprobs)) for n in range(3)]
        calls = Calls(model, monkeypatch)
        note_reads(calls, monkeypatch)
        engine_of(model).step()
        then = ["start", "read"] if logprobs is None else ["read", "start", "land"]
        assert calls.events == ["prefill", "sample", *then]
        drain(model, requests)
        check_idle(model)
    assert [request.output_ids for request in requests] == [done.token_ids for done in alone[:3]]


@pytest.mark.parametrize("by", ["length", "id", "string", "not finite"])
def test_who_ends_with_the_first_token_is_padding_in_the_step_behind(weights, alone, monkeypatch, by: str) -> None:
    """Unless only the host knows: then the others are filled in anew."""
    tokenizer = byte_level()
    begins = [tokenizer.decode(done.token_ids[:1]) for done in alone[:8]]
    numbers = sorted(range(8), key=lambda n: begins[n].isprintable() and "\ufffd" not in begins[n])[-4:]
    with compiled(weights, dms="off", max_concurrency=4, tokenizer=tokenizer) as model:
        Watch(model)
        engine = engine_of(model)
        engine._run_ahead = True
        ids, text = alone[numbers[-1]].token_ids, begins[numbers[-1]]
        ending = {
            "length": replace(GREEDY, max_tokens=1), "id": replace(GREEDY, stop_token_ids=ids[:1]),
            "string": replace(GREEDY, stop=text),
        }.get(by, GREEDY)  # fmt: skip
        *others, ended = [
            submit(model, PROMPTS[n], params) for n, params in zip(numbers, [GREEDY] * 3 + [ending], strict=True)
        ]
        if by == "not finite":
            sample = engine.runner.sample

            def sampled(logits: torch.Tensor, inputs: Any) -> FirstTokens:
                given = sample(logits, inputs)
                return FirstTokens(given.tokens.index_fill(0, torch.tensor(3), NOT_FINITE), given.ends)

            monkeypatch.setattr(engine.runner, "sample", sampled)
        calls = Calls(model, monkeypatch)
        engine.step()
        assert engine.running == others
        for request in others:
            assert (engine.cache.live_len[:, request.row] == len(request.prompt_ids) + 1).all(), "of the step behind"
        drain(model, others)
        check_idle(model)
    assert calls.starts[:3] == ([4, 3, 0] if by == "string" else [4, 0, 0])
    assert (ended.error is not None) == (by == "not finite")
    assert ended.output_ids == ([] if by == "not finite" else ids[:1])
    assert ended.usage is not None
    assert ended.usage.num_tokens == ended.usage.live_tokens.max() == len(ended.prompt_ids) + (by == "string")
    assert [request.output_ids for request in others] == [alone[n].token_ids for n in numbers[:3]]


def test_nobody_goes_on_from_a_single_token(weights, alone, monkeypatch) -> None:
    with compiled(weights, dms="off", max_concurrency=4) as model:
        engine_of(model)._run_ahead = True
        requests = [submit(model, PROMPTS[n], replace(GREEDY, max_tokens=1)) for n in range(3)]
        calls = Calls(model, monkeypatch)
        drain(model, requests)
        check_idle(model)
    assert calls.starts == []
    assert [request.output_ids for request in requests] == [done.token_ids[:1] for done in alone[:3]]
