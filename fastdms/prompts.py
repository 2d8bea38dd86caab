"""From what a user passes as a prompt to checked token ids."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from fastdms.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "PromptReader", "is_chat", "is_single"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]


def is_single(prompts: object) -> bool:
    """Whether this is one prompt, rather than a list of prompts: text, token ids or chat messages."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, (torch.Tensor, bytes, bytearray, memoryview)) or not isinstance(prompts, Sequence):
        raise ValueError(f"a prompt is text, a list of token ids or a list of messages, got {type(prompts).__name__}")
    return bool(prompts) and isinstance(prompts[0], (numbers.Integral, Mapping))


def is_chat(prompt: object) -> bool:
    """Whether this prompt is a list of messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


class PromptReader:
    """Turns prompts into token ids within the vocabulary and the context; ValueError says what is wrong with one."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, max_context: int) -> None:
        self._config, self._tokenizer, self._max_context = config, tokenizer, max_context

    def read(self, prompt: Prompt, *, allow_control_tokens: bool = False) -> list[int]:
        """Token ids of one prompt, with room for at least one more."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty")
            from fastdms.tokenizer import encode_prompt

            ids = encode_prompt(self._need_tokenizer(), prompt)
        elif not is_single(prompt):
            raise ValueError(
                "the prompt is empty" if not prompt else f"a prompt can't be a list of {type(prompt[0]).__name__}"
            )
        elif isinstance(prompt[0], Mapping):
            return self.read_chat(cast(Sequence[Mapping[str, str]], prompt), allow_control_tokens=allow_control_tokens)
        else:
            ids = list(cast(Sequence[int], prompt))
        ids = self._checked(ids)
        if len(ids) >= self._max_context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; max_context {self._max_context} must leave room for one more"
            )
        return ids

    def read_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt of a list; the error says which prompt it is about."""
        if not prompts:
            raise ValueError("the prompt is empty: got a list of nothing")
        ids = []
        for index, prompt in enumerate(prompts):
            try:
                ids.append(self.read(prompt))
            except ValueError as error:
                raise ValueError(f"prompt {index} of {len(prompts)}: {error}") from error
        return ids

    def read_chat(self, messages: Sequence[Mapping[str, str]], *, allow_control_tokens: bool = False) -> list[int]:
        """Token ids of a chat by the tokenizer's template, up to where the answer begins."""
        from fastdms.tokenizer import encode_chat

        return self.read(encode_chat(self._need_tokenizer(), messages, allow_control_tokens=allow_control_tokens))

    def read_scored(self, token_ids: Sequence[int], prompt_len: int) -> list[int]:
        """Token ids to score; they may fill the context."""
        if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
            raise ValueError(f"what to score must be a list of token ids, got {type(token_ids).__name__}")
        ids = self._checked(list(token_ids))
        if len(ids) > self._max_context:
            raise ValueError(f"{len(ids)} tokens exceed max_context {self._max_context}")
        if isinstance(prompt_len, bool) or not isinstance(prompt_len, int) or not 1 <= prompt_len <= len(ids):
            raise ValueError(f"prompt_len must be an integer in [1, {len(ids)}], got {prompt_len!r}")
        return ids

    def _checked(self, ids: Sequence[object]) -> list[int]:
        if not ids:
            raise ValueError("the prompt is empty")
        if {int} == set(map(type, ids)):  # one by one, thousands take as long as their prefill
            plain = cast("Sequence[int]", ids)
            if min(plain) >= 0 and max(plain) < self._config.vocab_size:
                return list(plain)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, numbers.Integral):
                raise ValueError(f"token ids must be integers, got {token!r}")
            if not 0 <= int(token) < self._config.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self._config.vocab_size}")
        return [int(cast(int, token)) for token in ids]

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer: pass tokenizer= to compile, or prompts of token ids")
        return self._tokenizer
