"""Whether a fact that was told far back is still found, by likelihood: a small model need not be able to chat.

A needle is the sentence "The secret number of <city> is <digits>." at some depth of other text; the question repeats it
up to the digits. The answer counts as found when its log-likelihood is above that of seven other numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastdms.progress import progress
from fastdms.tokenizer import encode_prompt
from fastdms.tools.quality.measure import Subject, engines
from fastdms.tools.quality.texts import Text, encode_plain, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CANDIDATES", "DEPTHS", "Needle", "candidate_scores", "hide_needle", "hide_needles", "measure_needles"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
CANDIDATES = 8
_NEEDLES_PER_DEPTH = 8
_DIGITS = 7
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Boston", "Dublin", "Athens")

Score = Callable[[list[list[int]], list[int]], Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A prompt of ids, where in it the needle begins, and the ids of ``CANDIDATES`` answers, the right one first."""

    prompt: list[int]
    start: int
    answers: list[list[int]]

    def is_inside(self, window_tokens: int) -> bool:
        """Whether all of it is within the window of the last query of every answer, so that none can be evicted."""
        last_query = len(self.prompt) + max(map(len, self.answers)) - 2  # an answer's last token is only predicted
        return last_query - self.start <= window_tokens


def hide_needles(subject: Subject, texts: Sequence[Text]) -> dict[str, dict[float, list[Needle]]]:
    """By text and depth, what ``measure_needles`` asks; prompt and longest answer fill ``settings.context``.

    Raises ValueError where a text or the context is too short.
    """
    tokenizer, context = subject.tokenizer, subject.settings.context
    hidden = {}
    for text in texts:
        fillers = token_windows(tokenizer, text, context, _NEEDLES_PER_DEPTH)
        hidden[text.name] = {
            depth: [
                hide_needle(tokenizer, fillers[i % len(fillers)], depth, random.Random(f"{depth} {i}"), context)
                for i in range(_NEEDLES_PER_DEPTH)
            ]
            for depth in DEPTHS
        }
    return hidden


def measure_needles(subject: Subject, hidden: dict[str, dict[float, list[Needle]]]) -> list[dict[str, Any]]:
    """One dict for each text, KV dtype and depth: how often the answer ranks first, and by how much.

    hidden: of ``hide_needles``. ``accuracy_off``, ``accuracy_on``: share of needles whose answer is likelier than the
    seven other numbers; ``margin_off``, ``margin_on``: mean of its log-likelihood less that of the likeliest other
    number, nats. ``inside_window``: no needle can be evicted. The prompt goes through prefill, the answer through the
    decode path.
    """
    results = []
    for kv_dtype in subject.options:
        total = sum(len(needles) for depths in hidden.values() for needles in depths.values())
        with (
            engines(subject, kv_dtype) as pair,
            progress(total=total, desc=f"needles, {kv_dtype} pages", unit=" needles") as bar,
        ):
            for name, depths in hidden.items():
                for depth, needles in depths.items():
                    margins = []
                    for needle in needles:
                        scores = [candidate_scores(model.score_batch, needle, subject.settings.rows) for model in pair]
                        margins.append([right - max(others) for right, *others in scores])
                        bar.update()
                    results.append({
                        "text": name,
                        "kv_dtype": kv_dtype,
                        "depth": depth,
                        "inside_window": all(needle.is_inside(subject.dms.window_tokens) for needle in needles),
                        **_figures(margins),
                    })  # fmt: skip
    return results


def hide_needle(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], depth: float, dice: random.Random, num_tokens: int
) -> Needle:
    """A needle in ``filler``, at least ``num_tokens`` ids; its beginning is what needle, question and answer leave.

    depth: share of the filler that stands before the needle. Raises ValueError where there is no room for any.
    """
    city = dice.choice(_CITIES)
    numbers = dice.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), CANDIDATES)
    question = f"The secret number of {city} is"
    answers = [encode_plain(tokenizer, f" {number}") for number in numbers]
    told = encode_plain(tokenizer, f"\n{question} {numbers[0]}.\n")
    asked = encode_plain(tokenizer, f"\n{question}")
    room = num_tokens - len(told) - len(asked) - max(map(len, answers))
    if room < 1:
        raise ValueError(f"a context of {num_tokens} tokens is too short for a needle, its question and an answer")
    start = max(len(encode_prompt(tokenizer, "")), round(depth * room))  # a BOS stays in front
    return Needle(prompt=[*filler[:start], *told, *filler[start:room], *asked], start=start, answers=answers)


def candidate_scores(score: Score, needle: Needle, rows: int) -> list[float]:
    """The log-likelihood of each answer after the prompt, nats.

    score: as ``CompiledModel.score_batch``; it gets at most ``rows`` sequences at once.
    """
    totals = []
    for first in range(0, len(needle.answers), rows):
        answers = needle.answers[first : first + rows]
        logits = score([needle.prompt + answer[:-1] for answer in answers], [len(needle.prompt)] * len(answers))
        for steps, answer in zip(logits, answers, strict=True):
            logprobs = steps.double().log_softmax(-1)
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
