"""What one request asks of the sampler, and when it ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

__all__ = ["SamplingParams"]

MAX_TOKENS = 2**31
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next tokens are chosen, and when to stop.

    temperature: divides the logits; 0 takes the most likely token (greedy). Finite, >= 0.
    top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this, in (0, 1]; 1: all.
    top_k: keep this many most likely tokens; 0 or -1: all. More than the vocabulary is the same as all.
    min_p: drop tokens less likely than this share of the most likely token's probability, in [0, 1]; 0: none.
    presence_penalty: subtracted from the logit of each token that is in the output so far, in [-2, 2]; 0: none.
    frequency_penalty: subtracted as many times as the token is in the output (up to 32767), in [-2, 2]; 0: none.
    repetition_penalty: divides the logit of each token that is in prompt or output if it is positive, multiplies it if
        it is negative, in (0, 2]; 1: none. It comes before the other two, and all three before the temperature: greedy
        heeds them, and what logprobs reports is without them.
    max_tokens: tokens generated at most, in [1, 2**31].
    min_tokens: tokens generated before an end token or a stop may end the text, in [0, max_tokens].
    stop: one string or up to 16, each of 1 to 1024 characters; the text ends before the first one completed.
    stop_token_ids: up to 16 token ids that end the text as an end-of-text token does.
    seed: in [0, 2**63); the tokens then depend on it and not on other requests. None: a fresh one for each request.
    logprobs: report the log-probabilities of this many most likely tokens at each step, in [0, 20], besides the chosen
        token's. None: no report.
    ignore_eos: do not end at the model's end-of-text tokens.

    Numbers of other types (numpy's) become int and float; ``stop`` and ``stop_token_ids`` become tuples, empty for
    None. Raises ValueError, naming the field, its value and what is allowed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._set_float("temperature", 0.0, math.inf, "a finite number >= 0")
        self._set_float("top_p", math.ulp(0.0), 1.0, "a number in (0, 1]")
        self._set_float("min_p", 0.0, 1.0, "a number in [0, 1]")
        self._set_float("presence_penalty", -2.0, 2.0, "a number in [-2, 2]")
        self._set_float("frequency_penalty", -2.0, 2.0, "a number in [-2, 2]")
        self._set_float("repetition_penalty", math.ulp(0.0), 2.0, "a number in (0, 2]")
        self._set_int("top_k", -1, None, "an integer >= 1, or 0 or -1 for all")
        self._set_int("max_tokens", 1, MAX_TOKENS, f"an integer in [1, {MAX_TOKENS}]")
        self._set_int("min_tokens", 0, self.max_tokens, f"an integer in [0, max_tokens = {self.max_tokens}]")
        if self.seed is not None:
            self._set_int("seed", 0, 2**63 - 1, "None or an integer in [0, 2**63)")
        if self.logprobs is not None:
            self._set_int("logprobs", 0, MAX_LOGPROBS, f"None or an integer in [0, {MAX_LOGPROBS}]")
        if not isinstance(self.ignore_eos, bool):
            raise self._refusal("ignore_eos", "True or False")
        object.__setattr__(self, "stop", self._checked_stop())
        object.__setattr__(self, "stop_token_ids", self._checked_stop_token_ids())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as the tuple that it has become."""
        return cast(tuple[str, ...], self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` as the tuple that it has become."""
        return cast(tuple[int, ...], self.stop_token_ids)

    @property
    def penalties(self) -> tuple[float, float, float] | None:
        """Presence, frequency and repetition penalty; None where they change nothing."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return None if penalties == (0.0, 0.0, 1.0) else penalties

    def _set_float(self, name: str, low: float, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self._refusal(name, allowed)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not low <= number <= high:
            raise self._refusal(name, allowed)
        object.__setattr__(self, name, number)

    def _set_int(self, name: str, low: int, high: int | None, allowed: str) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < low or (high is not None and value > high):
            raise self._refusal(name, allowed)
        object.__setattr__(self, name, int(value))

    def _checked_stop(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        allowed = f"None, a string, or at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARACTERS} characters"
        if stops is None:
            return ()
        if not isinstance(stops, (list, tuple)) or len(stops) > MAX_STOPS:
            raise self._refusal("stop", allowed)
        if any(not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise self._refusal("stop", allowed)
        return tuple(stops)

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        ids = self.stop_token_ids
        allowed = f"None or at most {MAX_STOPS} token ids, each an integer in [0, 2**31)"
        if ids is None:
            return ()
        if not isinstance(ids, (list, tuple)) or len(ids) > MAX_STOPS:
            raise self._refusal("stop_token_ids", allowed)
        if any(not _is_int(token_id) or not 0 <= token_id < 2**31 for token_id in ids):
            raise self._refusal("stop_token_ids", allowed)
        return tuple(int(token_id) for token_id in ids)

    def _refusal(self, name: str, allowed: str) -> ValueError:
        shown = repr(getattr(self, name))
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ValueError(f"{name} must be {allowed}, got {shown}")


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
