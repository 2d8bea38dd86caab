"""``fastdms::release``: schema and fake. Imports torch only."""

from __future__ import annotations

from fastdms.ops.registry import register

SCHEMA = (
    "release(Tensor rows, Tensor page_table, Tensor(a!) live_len, Tensor(b!) free_pages, Tensor(c!) num_free, "
    "Tensor(d!) starved, int page_size) -> ()"
)


def _fake(*_: object) -> None:
    return None


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.release.reference:release",
    kernel="fastdms.ops.release.kernel:release",
)
