"""``fastdms::prefill_append``: schema and fake. Imports torch only."""

from __future__ import annotations

from fastdms.ops.registry import register

SCHEMA = (
    "prefill_append(Tensor k, Tensor v, Tensor decisions, Tensor positions, Tensor rows, Tensor chunk_indptr, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor(e!) page_table, "
    "Tensor(f!) live_len, Tensor(g!) ring, Tensor free_pages, Tensor(h!) num_free, Tensor(i!) starved, int shift) -> ()"
)


def _fake(*_: object) -> None:
    return None


register(
    SCHEMA,
    fake=_fake,
    reference="fastdms.ops.prefill_append.reference:prefill_append",
    kernel="fastdms.ops.prefill_append.kernel:prefill_append",
)
