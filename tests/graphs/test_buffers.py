"""The static buffers of a step: what is written where, and that padding stays padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastdms.graphs import MAX_END_IDS, RowInput, Staging, StepBuffers, make_buffers

CPU = torch.device("cpu")
DTYPES = {
    "tokens": torch.int64,
    "positions": torch.int32,
    "slots": torch.int64,
    "rows": torch.int32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "end_ids": torch.int32,
    "banned_until": torch.int32,
    "penalties": torch.float32,
    "count_rows": torch.int32,
    "last_positions": torch.int32,
}


def entry(n: int) -> RowInput:
    """Every field has a value of its own."""
    return RowInput(
        row=n, token=n + 10, position=n + 20, temperature=n + 0.5, top_k=n + 30, top_p=1 / (n + 2), min_p=1 / (n + 3),
        seed=2**62 + n, end_ids=tuple(range(n)), banned_until=n + 40,
        penalties=(n + 0.25, n - 0.5, n + 1.5) if n % 2 else None, last_position=n + 50,
    )  # fmt: skip


def read(buffers: StepBuffers, index: int) -> RowInput:
    """An entry as ``RowInput`` again."""
    b: dict[str, Any] = {name: tensor[index].tolist() for name, tensor in buffers._asdict().items()}
    assert b["count_rows"] in (-1, b["rows"])
    if b["count_rows"] == -1:
        assert b["penalties"] == [0.0, 0.0, 1.0]
    return RowInput(
        row=b["rows"], token=b["tokens"], position=b["positions"], temperature=b["temperature"], top_k=b["top_k"],
        top_p=b["top_p"], min_p=b["min_p"], seed=b["seeds"], end_ids=tuple(i for i in b["end_ids"] if i != -1),
        banned_until=b["banned_until"], penalties=tuple(b["penalties"]) if b["count_rows"] >= 0 else None,
        last_position=b["last_positions"],
    )  # fmt: skip


def fill(buffers: StepBuffers, entries: Sequence[RowInput], slot: int = 0, staging: Staging | None = None) -> None:
    """As the graph cache does it."""
    staging = staging or Staging(len(buffers.tokens), CPU)
    to, placed = buffers.words(), staging.placed.words()
    staging.pack(entries, slot)
    torch._foreach_copy_(to, placed)


def close(one: RowInput, other: RowInput) -> bool:
    """Equal, fp32 numbers as far as fp32 goes."""
    floats = ("temperature", "top_p", "min_p")
    values = zip(RowInput._fields, one, other, strict=True)
    return all(a == (pytest.approx(b) if name in floats else b) for name, a, b in values)


def test_a_fresh_buffer_is_all_padding() -> None:
    buffers = make_buffers(5, CPU)
    assert {name: tensor.dtype for name, tensor in buffers._asdict().items()} == DTYPES
    assert all(tensor.shape[0] == 5 for tensor in buffers)
    assert buffers.end_ids.shape == (5, MAX_END_IDS)
    assert buffers.positions.tolist() == [-1] * 5
    assert (buffers.end_ids == -1).all()
    assert buffers.count_rows.tolist() == [-1] * 5


def test_fill_writes_every_field_and_pads_the_rest() -> None:
    buffers = make_buffers(4, CPU)
    addresses, staging = [tensor.data_ptr() for tensor in buffers], Staging(4, CPU)
    for count in (4, 1, 3, 0, 2):  # fewer after more: nothing of the earlier ones may stay
        entries = [entry(n + count) for n in range(count)]
        fill(buffers, entries, count, staging)
        assert buffers.slots.tolist() == [count] * 4, "of padding, too"
        for index, expected in enumerate(entries):
            assert close(read(buffers, index), expected)
        for index in range(count, 4):
            assert read(buffers, index) == RowInput(row=0, token=0, position=-1)
    assert [tensor.data_ptr() for tensor in buffers] == addresses, "a captured graph would read the old place"


def test_what_is_padding_is_not_written_again() -> None:
    """Filling for a row takes no longer where many have room; the slot alone is that of padding, too."""
    staging = Staging(4, CPU)
    staging.pack([entry(n) for n in range(3)])
    positions = staging.pack([entry(1)], slot=1).positions
    assert positions[1:].tolist() == [-1] * 3
    staging._columns[StepBuffers._fields.index("positions")][3:] = 99
    for count in (1, 2, 0, 0, 2):
        packed = staging.pack([entry(n) for n in range(count)], slot=count)
        assert packed.slots.tolist() == [count] * 4
        assert packed.positions.tolist() == [entry(n).position for n in range(count)] + [-1] * (3 - count) + [99]


def test_filling_that_breaks_off_leaves_no_row_behind() -> None:
    staging = Staging(4, CPU)
    staging.pack([])
    with pytest.raises(OverflowError):
        staging.pack([entry(1), entry(2), entry(3)._replace(last_position=2**31)])
    assert staging.pack([entry(1)]).positions[1:].tolist() == [-1] * 3


def test_filling_takes_one_copy_to_the_device_and_one_launch_there(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers, staging = make_buffers(3, CPU), Staging(3, CPU)
    to, placed = buffers.words(), staging.placed.words()
    copied: list[Any] = []
    copy = torch.Tensor.copy_

    def seen(tensor: torch.Tensor, source: torch.Tensor, **options: Any) -> torch.Tensor:
        copied.append((source.device, options))
        return copy(tensor, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        staging.pack([entry(1), entry(2)], slot=2)
        torch._foreach_copy_(to, placed)
    assert copied == [(CPU, {"non_blocking": True})]
    launches = {event.key: event.count for event in profile.key_averages()}
    assert launches["aten::_foreach_copy_"] == 1
    assert not {"aten::fill_", "aten::zero_", "aten::cat", "aten::clone", "aten::to", "aten::empty"} & set(launches)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_what_is_packed_lies_in_one_piece_and_aligned(count: int) -> None:
    """As kernels were compiled for; and buffers that a graph reads lie in pieces of their own."""
    packed = Staging(count, CPU).pack([entry(n) for n in range(count)], slot=3)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1
    assert all(tensor.storage_offset() * tensor.itemsize % 16 == 0 and tensor.is_contiguous() for tensor in packed)
    assert all(close(read(packed, n), entry(n)) for n in range(count))
    assert packed.slots.tolist() == [3] * count
    assert len({tensor.untyped_storage().data_ptr() for tensor in make_buffers(count, CPU)}) == len(packed)


def test_a_buckets_buffers_are_views() -> None:
    buffers = make_buffers(4, CPU)
    first = buffers.first(2)
    assert [tensor.data_ptr() for tensor in first] == [tensor.data_ptr() for tensor in buffers]
    fill(buffers, [entry(n) for n in range(4)])
    assert all(close(read(first, n), entry(n)) for n in range(2))
    fill(first, [entry(9)])
    assert close(read(buffers, 0), entry(9))
    assert read(buffers, 1).position == -1
    assert close(read(buffers, 2), entry(2)), "a smaller bucket writes beyond itself"


def test_the_largest_values() -> None:
    buffers = make_buffers(1, CPU)
    largest = RowInput(
        row=255, token=2**31 - 1, position=2**31 - 2, temperature=1e30, top_k=2**31 - 1, top_p=1e-30, seed=2**63 - 1,
        end_ids=tuple(range(MAX_END_IDS)), banned_until=2**31 - 1, last_position=2**31 - 1,
    )  # fmt: skip
    fill(buffers, [largest])
    back = read(buffers, 0)
    assert (back.top_k, back.seed, back.end_ids, back.position) == largest[4:5] + largest[7:9] + largest[2:3]
    assert back.last_position == largest.last_position
    assert 0 < back.top_p < 1e-29
    assert back.temperature < float("inf")
