"""One decode step, launch by launch: where steps end, and which layer a launch belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

__all__ = ["Launch", "layers_of", "median_step"]

_ENDS_STEP = ("_draw_kernel", "fastdms::sample")
_TO_HOST = "Memcpy DtoH (Device -> Pinned)"
_APPENDS = ("_decode_append_kernel", "fastdms::decode_append")


class Launch(NamedTuple):
    """A kernel's run on the device, or on the CPU a whole operation; microseconds from any origin."""

    name: str
    begin_us: float
    end_us: float


def median_step(launches: Sequence[Launch], steps: int) -> list[dict[str, Any]] | None:
    """The launches of the step of median length in order; None where steps can't be told apart.

    A step ends with the launch that samples, so that what hands its token on opens the next one. It lasts from the end
    of all work before it to its own; the first and the last of a recording may not be whole and don't count. Copies to
    the host, which run beside the next step, are left out. begin_us: from the step's first launch. gap_us: ahead of
    the launch, with nothing running.
    """
    steps_own = [launch for launch in launches if not launch.name.startswith(_TO_HOST)]
    ordered = sorted(steps_own, key=lambda launch: launch.begin_us)
    cuts = [i + 1 for i, launch in enumerate(ordered) if launch.name in _ENDS_STEP]
    # One more where the step under way was recorded, one less where the last was cut off.
    if len(cuts) < 2 or abs(len(cuts) - steps) > 1:
        return None
    ends = list(accumulate((launch.end_us for launch in ordered), max))
    by_length = sorted(pairwise(cuts), key=lambda cut: ends[cut[1] - 1] - ends[cut[0] - 1])
    first, last = by_length[(len(by_length) - 1) // 2]
    layers = layers_of([launch.name for launch in ordered[first:last]])
    return [
        {
            "name": launch.name,
            "begin_us": round(launch.begin_us - ordered[first].begin_us, 3),
            "us": round(launch.end_us - launch.begin_us, 3),
            "gap_us": round(max(0.0, launch.begin_us - before), 3),
            "layer": layer,
        }
        for launch, before, layer in zip(ordered[first:last], ends[first - 1 :], layers, strict=False)
    ]


def layers_of(names: Sequence[str]) -> list[int | str]:
    """The layer of each launch of a step, counted by its appends to the cache; ``"head"`` before, ``"tail"`` after.

    A layer begins as many launches ahead of its append as agree by name, backwards, between the first append and the
    second: its QKV projection, and its norm unless that is fused into what comes before. The last layer ends with the
    last launch after its append that the layer before it has too; a model of one layer has no tail.
    """
    appends = [i for i, name in enumerate(names) if name in _APPENDS]
    if not appends:
        return ["head"] * len(names)
    lead, tail = 0, len(names)
    if len(appends) > 1:
        lead = _common_end(names[: appends[0]], names[appends[0] + 1 : appends[1]])
        before = names[appends[-2] + 1 : appends[-1] - lead]
        after = names[appends[-1] + 1 :][: len(before)]
        matches = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
        tail = appends[-1] + 1 + max(match.b + match.size if match.size else 0 for match in matches)
    starts = [append - lead for append in appends]
    layers: list[int | str] = ["head"] * starts[0]
    for layer, (begin, end) in enumerate(pairwise([*starts, tail])):
        layers += [layer] * (end - begin)
    return layers + ["tail"] * (len(names) - tail)


def _common_end(a: Sequence[str], b: Sequence[str]) -> int:
    agree = [x == y for x, y in zip(reversed(a), reversed(b), strict=False)]
    return agree.index(False) if False in agree else len(agree)
