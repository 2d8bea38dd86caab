"""What is to be measured; light enough to be read by ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One measurement of one checkpoint, over any number of texts.

    context: tokens of a sequence that are run; one more is only predicted. prompt_tokens: how many of them go through
    prefill, the others go through the decode path. sequences: of each text, fewer where it is too short for so many.
    rows: how many of them may run at once.
    prefill_points: prompt lengths of each sequence at which prefill alone is measured, evenly spaced: the first of N is
    an N-th of ``decode_tokens`` above ``prompt_tokens``, the last is ``context``; 0 leaves that out. kv_dtypes, device,
    dtype: as ``fastdms.compile`` takes them.

    Raises ValueError for a value outside its range.
    """

    context: int = 2048
    prompt_tokens: int = 1024
    sequences: int = 4
    rows: int = 8
    prefill_points: int = 8
    kv_dtypes: tuple[str, ...] = ("auto",)
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("prompt_tokens", 1), ("sequences", 1), ("rows", 1), ("prefill_points", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.prompt_tokens >= self.context:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} of a context of {self.context} leave none for the decode path"
            )
        if not self.kv_dtypes:
            raise ValueError("kv_dtypes must name at least one KV dtype")

    @property
    def decode_tokens(self) -> int:
        """Tokens of a sequence that go through the decode path."""
        return self.context - self.prompt_tokens


PRESETS = {
    "first-release": Settings(context=1040, prompt_tokens=1024),
    "2k": Settings(),
    "8k": Settings(context=8192, prompt_tokens=7168),
}
