"""Whether a fact that was told far back is still found, by likelihood: a small model need not be able to chat.

A needle is the sentence "The secret number of <city> is <digits>." at some depth of other text; the question repeats it
up to the digits. The answer counts as found when its log-likelihood is above that of seven other numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastdms.progress import progress
from fastdms.tokenizer import encode_prompt
from fastdms.tools.quality.measure import engines, open_subject
from fastdms.tools.quality.settings import Settings
from fastdms.tools.quality.texts import Text, encode_plain, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CANDIDATES", "DEPTHS", "candidate_scores", "measure_needles", "needle_prompt"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
CANDIDATES = 8
_NEEDLES_PER_DEPTH = 8
_DIGITS = 7
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Boston", "Dublin", "Athens")

Score = Callable[[list[list[int]], list[int]], Sequence[torch.Tensor]]


def measure_needles(source: str | os.PathLike[str], texts: Sequence[Text], settings: Settings) -> list[dict[str, Any]]:
    """One dict for each text, KV dtype and depth: how often the answer ranks first, and by how much.

    ``accuracy_off``, ``accuracy_on``: share of needles whose answer is likelier than the seven other numbers;
    ``margin_off``, ``margin_on``: mean of its log-likelihood less that of the likeliest other number, nats. Prompt and
    answer fill ``settings.context``; the prompt goes through prefill, the answer through the decode path.
    """
    subject = open_subject(source, settings)
    fillers = {
        text.name: token_windows(subject.tokenizer, text, settings.context + 1, _NEEDLES_PER_DEPTH) for text in texts
    }
    results = []
    for kv_dtype in subject.options:
        with engines(subject, settings, kv_dtype) as pair:
            total = len(fillers) * len(DEPTHS) * _NEEDLES_PER_DEPTH
            with progress(total=total, desc=f"needles, {kv_dtype} pages", unit=" needles") as bar:
                for name, windows in fillers.items():
                    for depth in DEPTHS:
                        margins = []
                        for number in range(_NEEDLES_PER_DEPTH):
                            filler = windows[number % len(windows)]
                            prompt, answers = needle_prompt(
                                subject.tokenizer, filler, depth, random.Random(f"{depth} {number}"), settings.context
                            )
                            scores = [candidate_scores(model.score_batch, prompt, answers) for model in pair]
                            margins.append([right - max(others) for right, *others in scores])
                            bar.update()
                        results.append({"text": name, "kv_dtype": kv_dtype, "depth": depth} | _figures(margins))
    return results


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], depth: float, dice: random.Random, num_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """A prompt of ids, and the ids of ``CANDIDATES`` different answers, the right one first.

    filler: at least ``num_tokens`` ids; its beginning is what prompt and longest answer leave of ``num_tokens``.
    depth: share of the filler that stands before the needle. Raises ValueError where there is no room for any.
    """
    city = dice.choice(_CITIES)
    numbers = dice.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), CANDIDATES)
    question = f"The secret number of {city} is"
    answers = [encode_plain(tokenizer, f" {number}") for number in numbers]
    needle = encode_plain(tokenizer, f"\n{question} {numbers[0]}.\n")
    asked = encode_plain(tokenizer, f"\n{question}")
    room = num_tokens - len(needle) - len(asked) - max(map(len, answers))
    if room < 1:
        raise ValueError(f"a context of {num_tokens} tokens is too short for a needle, its question and an answer")
    before = max(len(encode_prompt(tokenizer, "")), round(depth * room))  # a BOS stays in front
    return [*filler[:before], *needle, *filler[before:room], *asked], answers


def candidate_scores(score: Score, prompt: list[int], answers: Sequence[list[int]]) -> list[float]:
    """The log-likelihood of each of ``answers`` after ``prompt``, nats.

    score: as ``CompiledModel.score_batch``.
    """
    sequences = [prompt + answer[:-1] for answer in answers]
    logits = score(sequences, [len(prompt)] * len(answers))
    totals = []
    for rows, answer in zip(logits, answers, strict=True):
        logprobs = rows.double().log_softmax(-1)
        totals.append(float(logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum()))
    return totals


def _figures(margins: Sequence[Sequence[float]]) -> dict[str, Any]:
    off, on = ([pair[i] for pair in margins] for i in (0, 1))
    return {
        "needles": len(margins),
        "accuracy_off": sum(margin > 0 for margin in off) / len(off),
        "accuracy_on": sum(margin > 0 for margin in on) / len(on),
        "margin_off": sum(off) / len(off),
        "margin_on": sum(on) / len(on),
    }
