"""The real default model: what it says is what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fastdms

TEXT = (Path(__file__).parent / "data" / "wikitext.txt").read_text(encoding="utf-8")
NEW_TOKENS = 256
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="module")
def plain() -> tuple[PreTrainedModel, list[int]]:
    """The model in transformers, in fp32 on the CPU, and the text's tokens by its tokenizer."""
    folder = fastdms.default_model(adapter=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def greedy_choices(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[int]:
    """What transformers takes for each token of the answer, given those before it.

    Equal to the answer exactly where its own greedy generation is: the first token it would choose otherwise differs.
    One pass over the whole sequence finds that in a tenth of the time.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logits[:, model.generation_config.eos_token_id] = -torch.inf  # the answer has its length, whatever comes
    choices: list[int] = logits.argmax(-1).tolist()
    return choices


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_equal_transformers(plain: tuple[PreTrainedModel, list[int]], device: str) -> None:
    folder = fastdms.default_model(adapter=False)
    with fastdms.compile(
        folder, device=device, dtype="fp32", kv_dtype="fp32", max_context=1024, max_concurrency=2
    ) as model:
        completion = model(TEXT, temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    assert isinstance(completion, fastdms.Completion)
    theirs, prompt = plain
    assert completion.prompt_tokens == len(prompt)
    assert len(completion.token_ids) == NEW_TOKENS
    assert completion.token_ids == greedy_choices(theirs, prompt, completion.token_ids)
    assert completion.kv.tokens == completion.prompt_tokens + NEW_TOKENS - 1
    assert completion.kv.live_share == 1.0
