"""The page of ``fastdms bench profile --html``: valid, whole, escaped, and also without what older files lack."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from fastdms.tools.bench.page import profile_page
from fastdms.tools.bench.profile import by_kernel
from fastdms.tools.bench.timeline import Launch, median_step

LAMBDA = "void at::kernel<float, at::{<lambda>#1}::operator()(\"a\" && 'b')>"
LAYER = ("qkv", "_decode_append_kernel", LAMBDA, "down")


def _row(rows: int, **other: Any) -> dict[str, Any]:
    """Three steps of two layers; a launch lasts 10 us, the next begins 2 us before its end; a step 5 us after one."""
    launches, now = [], 0.0
    for _ in range(3):
        now += 5
        for name in ("embed", *LAYER, *LAYER, "head", "_draw_kernel"):
            launches.append(Launch(name, max(now - 2, 0.0), now + 8))
            now += 8
    return {
        "bench": "profile", "model": "a<b>&c", "rows": rows, "context": 8192, "steps": 3, "step_us": 93.0,
        "idle_us": 3.0, "floor_us": 31.0, "floor_share": 0.3333, "bandwidth_tb_s": 4.3,
        "kernels": by_kernel(launches, 3), "timeline": median_step(launches, 3), "card": "NVIDIA <H200>",
        "fastdms": "0.1.0", "commit": "abc", "mode": "graphs", "command": "fastdms bench profile --model 'a<b>&c'",
        **other,
    }  # fmt: skip


def _older(rows: int) -> dict[str, Any]:
    return {key: value for key, value in _row(rows).items() if not key.startswith(("timeline", "floor"))}


def _parse(page: str) -> ElementTree.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page)


def _text(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def _names(table: ElementTree.Element) -> list[str]:
    return [_text(cell) for cell in table.iterfind(".//td[@class='name']")]


def test_each_kernel_stands_once_in_its_table() -> None:
    measured = [_row(1), _row(8)]
    root = _parse(profile_page(measured))
    tables = root.findall(".//table[@class='kernels']")
    assert [_names(table) for table in tables] == [[kernel["name"] for kernel in row["kernels"]] for row in measured]
    assert LAMBDA in _names(tables[0])
    (beside,) = root.findall(".//table[@class='buckets']")
    assert sorted(_names(beside)) == sorted(kernel["name"] for kernel in measured[0]["kernels"])


def test_the_header_and_the_floor() -> None:
    said = _text(_parse(profile_page([_row(1)])))
    for part in ("a<b>&c", "NVIDIA <H200>", "fastdms 0.1.0", "abc", "--model 'a<b>&c'", "a<b>&c, 1 rows x 8,192"):
        assert part in said
    assert "step 93.0 us: busy 90.0, idle 3.0; floor 31.0, 33.3% of the step: weights and live KV at 4.3 TB/s" in said
    assert "beside each other" not in said


def test_bars_are_to_scale() -> None:
    root = _parse(profile_page([_row(1), _row(8, step_us=186.0, idle_us=96.0)]))
    widths = [float(rect.get("width", 0)) for rect in root.iterfind(".//rect[@class='busy']")]
    assert widths == pytest.approx([850 * 90 / 93, 850 * 90 / 186, 850 * 90 / 186, 850 * 90 / 186], abs=0.01)


def test_the_timeline_has_a_row_for_each_layer_to_one_scale() -> None:
    row = _row(1)
    (drawn,) = _parse(profile_page([row])).findall(".//svg[@class='timeline']")
    assert [_text(label).split(" us")[0] for label in drawn.findall("text")] == [
        "head 11.0", "layer 0 32.0", "layer 1 32.0", "tail 18.0"
    ]  # fmt: skip
    rects = [rect for rect in drawn.findall("rect") if rect.get("class") != "track"]
    assert [_text(rect).split(": ")[0] for rect in rects] == [launch["name"] for launch in row["timeline"]]
    assert len({rect.get("width") for rect in rects}) == 1, "each lasts 10 us"
    by_name: dict[str, set[str | None]] = {}
    for rect in rects:
        by_name.setdefault(_text(rect).split(": ")[0], set()).add(rect.get("class"))
    assert sorted(map(len, by_name.values())) == [1] * len(by_name)
    assert len(set.union(*by_name.values())) == len(by_name), "few enough for a colour of its own for each"


def test_launches_that_overlap_lie_in_lanes() -> None:
    (drawn,) = _parse(profile_page([_row(1)])).findall(".//svg[@class='timeline']")
    boxes = [
        tuple(float(rect.get(key, 0)) for key in ("x", "y", "width"))
        for rect in drawn.findall("rect") if rect.get("class") != "track"
    ]  # fmt: skip
    for i, (x, y, width) in enumerate(boxes):
        assert all(y != below or x + width <= right + 0.05 for right, below, _ in boxes[i + 1 :])


def test_more_kernels_than_colours() -> None:
    kernels = [{"name": f"k{i}", "launches": 1.0, "us": 1.0, "added_us": 30.0 - i} for i in range(30)]
    timeline = [{"name": f"k{i}", "begin_us": float(i), "us": 1.0, "gap_us": 0.0, "layer": "head"} for i in range(30)]
    root = _parse(profile_page([_row(1, kernels=kernels, timeline=timeline)]))
    (legend,) = root.findall(".//p[@class='legend']")
    assert [_text(span) for span in legend.findall("span")] == [*(f"k{i}" for i in range(12)), "others"]


def test_an_older_file_has_no_floor_and_no_timeline() -> None:
    page = profile_page([_older(1), _older(8)])
    assert not _parse(page).findall(".//svg[@class='timeline']")
    assert page.count("its floor is not in this file") == 4, "in each bucket and beside each other"
    assert page.count("There is no timeline") == 2


def test_nothing_is_fetched() -> None:
    page = profile_page([_row(1), _row(8)])
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:|\bsrc=", page)


def test_what_xml_cannot_hold_is_replaced() -> None:
    root = _parse(profile_page([_row(1, model="a\x00b\ud800c")]))
    assert "a\ufffdb\ufffdc, 1 rows" in _text(root)


def test_an_idle_card_and_no_profile() -> None:
    _parse(profile_page([_row(1, step_us=0.0, idle_us=0.0, kernels=[], timeline=[])]))
    with pytest.raises(ValueError, match="a page needs at least one profile, got none"):
        profile_page([])
