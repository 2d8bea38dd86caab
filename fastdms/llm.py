"""The familiar offline-inference face of the runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fastdms.completion import Completion
from fastdms.prompts import Prompt, is_single
from fastdms.runtime import compile
from fastdms.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LLM"]


class LLM:
    """``LLM(model).generate(prompts, params)``; keyword arguments are those of ``fastdms.compile``.

    ``model`` is the ``CompiledModel`` itself: to stream, to score, and to ``close``.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, **options: Any) -> None:
        self.model = compile(model, **options)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling: Any
    ) -> list[Completion]:
        """One ``Completion`` for each prompt, in order; a single prompt counts as a list of one."""
        listed = [prompts] if is_single(prompts) else prompts
        return cast(list[Completion], self.model(cast(Sequence[Prompt], listed), params, **sampling))

    def chat(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None, **sampling: Any
    ) -> list[Completion]:
        """The answer to one chat, as a list of one."""
        return [self.model.chat(messages, params, **sampling)]
