"""Which bucket serves how many rows."""

from __future__ import annotations

import pytest

from fastdms.graphs import choose_bucket, decode_buckets


@pytest.mark.parametrize(
    ("rows", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (6, (1, 2, 4, 6)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
    ],
)
def test_buckets(rows: int, buckets: tuple[int, ...]) -> None:
    assert decode_buckets(rows) == buckets


def test_every_batch_has_the_smallest_bucket_that_holds_it() -> None:
    for most in range(1, 257):
        buckets = decode_buckets(most)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] == most
        for rows in range(1, most + 1):
            bucket = choose_bucket(rows, buckets)
            assert rows <= bucket < 2 * rows
            assert all(smaller < rows for smaller in buckets if smaller < bucket)


def test_refused() -> None:
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"max_concurrency must be at least 1, got {rows}"):
            decode_buckets(rows)
    with pytest.raises(ValueError, match="9 rows exceed the largest bucket, 8"):
        choose_bucket(9, (1, 2, 4, 8))
