"""Which batch sizes are captured, and which of them serves a batch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["choose_bucket", "decode_buckets"]


def decode_buckets(max_concurrency: int) -> tuple[int, ...]:
    """Powers of two below ``max_concurrency``, and ``max_concurrency`` itself, ascending."""
    if max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
    powers = (1 << n for n in range(max_concurrency.bit_length()))
    return (*(size for size in powers if size < max_concurrency), max_concurrency)


def choose_bucket(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending ``buckets`` that holds ``num_rows``; ValueError if none does."""
    for bucket in buckets:
        if num_rows <= bucket:
            return bucket
    raise ValueError(f"{num_rows} rows exceed the largest bucket, {buckets[-1]}")
