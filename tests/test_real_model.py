"""The real default model: what it says is what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdms

TEXT = (Path(__file__).parent / "data" / "wikitext.txt").read_text(encoding="utf-8")
NEW_TOKENS = 256
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers itself generates, greedily, in fp32 on the CPU."""
    folder = fastdms.default_model(adapter=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    out = plain.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    ids: list[int] = out[0, prompt.shape[1] :].tolist()
    return ids


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_equal_transformers(expected: list[int], device: str) -> None:
    folder = fastdms.default_model(adapter=False)
    with fastdms.compile(
        folder, device=device, dtype="fp32", kv_dtype="fp32", max_context=1024, max_concurrency=2
    ) as model:
        completion = model(TEXT, temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    assert isinstance(completion, fastdms.Completion)
    assert completion.token_ids == expected
    assert completion.kv.tokens == completion.prompt_tokens + NEW_TOKENS - 1
    assert completion.kv.live_share == 1.0
