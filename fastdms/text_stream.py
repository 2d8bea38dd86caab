"""The text of one request as it grows: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastdms.detokenizer import make_detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]


class TextStream:
    """Turns one request's token ids into pieces of text.

    The joined pieces, with that of ``finish``, are the decoded ids without special tokens, up to the stop string that
    is completed first (of several completed by the same character: the longest). A character split over tokens comes
    out whole with its last byte; bytes that are no UTF-8 come out as U+FFFD. The cost of a token doesn't depend on
    how many came before.

    stop: strings that end the text. min_tokens: a stop completed before so many tokens doesn't count.
    prompt_ids: what the text continues, if anything: after it, a sentencepiece vocabulary's first space is kept.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: str | Sequence[str] | None = (),
        prompt_ids: Iterable[int] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = make_detokenizer(tokenizer, prompt_ids)
        self._matcher = _StopMatcher((stop,) if isinstance(stop, str) else tuple(stop or ()))
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text; what is pushed after that is ignored."""
        return self._matcher.matched

    @property
    def text(self) -> str:
        """All that has come out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, possibly empty."""
        if self.stopped or self._finished:
            return ""
        self._num_tokens += 1
        return self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """What was held back; call once, when no token will follow. ``stopped`` may become true."""
        if self.stopped or self._finished:
            return ""
        self._finished = True
        piece = self._release(self._detokenizer.finish())
        return piece if self.stopped else piece + self._keep(self._matcher.flush())

    def _release(self, text: str) -> str:
        return self._keep(self._matcher.feed(text, armed=self._num_tokens >= self._min_tokens))

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class _StopMatcher:
    """Knuth-Morris-Pratt for each stop: its state is the longest end of the text that begins the stop."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.matched = False
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""

    def feed(self, text: str, *, armed: bool) -> str:
        """The text that can't belong to a stop any more. Unless ``armed``, a completed stop is passed over."""
        if not self._stops:
            return text
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            longest = self._advance(character)
            if longest and armed:
                self.matched = True
                self._held = ""
                return buffer[: end - longest]
        keep = len(buffer) - max(self._states)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """The length of the longest stop that this character completes, or 0."""
        longest = 0
        for i, (stop, borders) in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != character:
                state = borders[state - 1]
            state += stop[state] == character
            if state == len(stop):
                longest = max(longest, state)
                state = borders[-1]
            self._states[i] = state
        return longest


def _borders(text: str) -> list[int]:
    """For each beginning of ``text``: how long its longest proper beginning is that also ends it."""
    borders = [0] * len(text)
    for i in range(1, len(text)):
        border = borders[i - 1]
        while border and text[border] != text[i]:
            border = borders[border - 1]
        borders[i] = border + (text[border] == text[i])
    return borders
