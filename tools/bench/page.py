"""The page of ``fastdms bench profile --html``: one file of HTML that is valid XML and needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from fastdms.tools.bench.figures import bucket_name

__all__ = ["profile_page"]

_WIDTH = 1000
_LABEL = 150
_LANE = 11
_LEAST_SHARE = 0.01  # of a step, for a kernel to be in the comparison
_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#2fa4a0", "#c9a227", "#9c755f", "#e377a2", "#6b7fd7",
    "#7aa83b", "#c65d3b",
)  # fmt: skip
_OTHER = "#8b9098"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6672; --line: #d9dde3; --back: #ffffff; --track: #eef0f3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa3ae; --line: #363c45; --back: #15181c; --track: #23282f }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem } dt, .soft, th { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere } .wide { overflow-x: auto } .wide > svg { min-width: 44rem }
table { border-collapse: collapse; width: 100% } th { text-align: right; font-weight: normal }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap } td { text-align: right }
.name { text-align: left; max-width: 30rem; overflow: hidden; text-overflow: ellipsis } .bar { width: 12rem }
svg { display: block; width: 100% } svg text { fill: var(--ink); font-size: 11px } svg .soft { fill: var(--soft) }
.bar svg { height: .7rem } .track { fill: var(--track) } .floor { fill: #59a14f; background: #59a14f }
.busy { fill: #4e79a7; background: #4e79a7 }
.idle { fill: #d9a066; background: #d9a066 }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem }
.legend span { display: inline-block; max-width: 22rem; margin-right: 1rem; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap }
"""


def profile_page(measured: Sequence[Mapping[str, Any]]) -> str:
    """The page of the rows that ``fastdms bench profile`` printed; without floors or timelines it says so.

    Raises ValueError for no rows.
    """
    if not measured:
        raise ValueError("a page needs at least one profile, got none")
    colours = _colours(measured)
    parts = [_header(measured), *(_bucket(row, colours) for row in measured)]
    if len(measured) > 1:
        parts.append(_comparison(measured, colours))
    title = _text(f"Decode step of {_distinct(measured, 'model')}")
    classes = "".join(f".k{i} {{ fill: {c}; background: {c} }}\n" for i, c in enumerate((*_COLOURS, _OTHER)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{title}</title>\n<style>{_STYLE}{classes}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _header(measured: Sequence[Mapping[str, Any]]) -> str:
    versions = ", ".join(
        f"{name} {_distinct(measured, name)}" for name in ("fastdms", "torch", "triton", "python", "driver")
    )
    facts = [(name, _distinct(measured, name)) for name in ("model", "card")]
    facts += [("versions", versions), *((name, _distinct(measured, name)) for name in ("commit", "command"))]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>"


def _bucket(row: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    settings = ("mode", "weights", "kv_dtype", "dtype", "dms", "kept_asked", "window")
    facts = ", ".join(f"{name} {row[name]}" for name in settings if row.get(name) is not None)
    return "\n".join(
        (
            f"<section>\n<h2>{_text(bucket_name(row))}</h2>\n<p class='soft'>{_text(facts)}</p>",
            _roofline(row, float(row["step_us"])),
            f"<h3>Kernels</h3>\n{_kernels(row, colours)}",
            f"<h3>One step, layer by layer</h3>\n{_timeline(row, colours)}\n</section>",
        )
    )


def _roofline(row: Mapping[str, Any], whole: float) -> str:
    """The step's bars, to a scale on which ``whole`` microseconds fill the width."""
    step, idle, floor = float(row["step_us"]), float(row["idle_us"]), row.get("floor_us")
    scale = (_WIDTH - _LABEL) / whole if whole > 0 else 0.0
    busy = step - idle
    said = f"step {step:,.1f} us: {_key('busy')}busy {busy:,.1f}, {_key('idle')}idle {idle:,.1f}; "
    if floor is None:
        said += "its floor is not in this file"
    else:
        said += f"{_key('floor')}floor {floor:,.1f}, {floor / step if step else 0:.1%} of the step: weights and live KV"
        said += f" at {_text(row['bandwidth_tb_s'])} TB/s" if row.get("bandwidth_tb_s") else ""
    bars = [("step", 0, _LABEL, busy, "busy"), ("", 0, _LABEL + busy * scale, idle, "idle")]
    bars += [("floor", 18, _LABEL, floor, "floor")] if floor is not None else []
    height = 16 if floor is None else 34
    drawn = "".join(
        f"<text x='0' y='{y + 12}'>{label}</text><rect class='{kind}' x='{x:.2f}' y='{y}' width='{us * scale:.2f}' "
        f"height='15'><title>{kind} {us:,.1f} us</title></rect>"
        for label, y, x, us, kind in bars
    )
    return f"<p>{said}</p>\n<div class='wide'><svg viewBox='0 0 {_WIDTH} {height}'>{drawn}</svg></div>"


def _kernels(row: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    most = max((float(kernel["added_us"]) for kernel in row["kernels"]), default=0.0)
    lines = [
        f"<tr>{_kernel_name(kernel['name'], colours)}<td>{kernel['added_us']:,.1f}</td>"
        f"<td class='bar'>{_bar(float(kernel['added_us']), most, _class(kernel['name'], colours))}</td>"
        f"<td>{kernel['launches']:,.1f}</td><td>{kernel['us']:,.2f}</td></tr>"
        for kernel in row["kernels"]
    ]
    head = "<th class='name'>kernel</th><th>added us</th><th></th><th>launches</th><th>us each</th>"
    return f"<div class='wide'><table class='kernels'>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table></div>"


def _timeline(row: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    launches = row.get("timeline")
    if not launches:
        return (
            "<p>There is no timeline: where a step ends could not be told from its launches, or was not recorded.</p>"
        )
    rows = [(layer, list(group)) for layer, group in groupby(launches, key=lambda launch: launch["layer"])]
    begins = [group[0]["begin_us"] - group[0]["gap_us"] for _, group in rows]
    last = max(launch["begin_us"] + launch["us"] for launch in launches)
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], last], strict=True)]
    # A launch that the next layer's first overlaps reaches past its row.
    reach = [
        launch["begin_us"] + launch["us"] - begin
        for begin, (_, group) in zip(begins, rows, strict=True)
        for launch in group
    ]
    longest = max(*lengths, *reach, 1e-3)
    scale, y, drawn = (_WIDTH - _LABEL) / longest, 0, []
    for (layer, group), begin, length in zip(rows, begins, lengths, strict=True):
        lanes = _lanes(group)
        height = _LANE * (max(lanes) + 1)
        label = layer if isinstance(layer, str) else f"layer {layer}"
        drawn.append(
            f"<text x='0' y='{y + 9}'>{_text(label)} <tspan class='soft'>{length:,.1f} us</tspan></text>"
            f"<rect class='track' x='{_LABEL}' y='{y}' width='{length * scale:.2f}' height='{height}' />"
        )
        drawn += [
            _launch(launch, _LABEL + (launch["begin_us"] - begin) * scale, y + lane * _LANE, scale, colours)
            for launch, lane in zip(group, lanes, strict=True)
        ]
        y += height + 4
    said = (
        f"The step of median length: {last - begins[0]:,.1f} us from the end of the one before it. A row for each "
        f"layer, all to one scale of {longest:,.1f} us; launches that overlap lie below each other."
    )
    return (
        f"<p>{said}</p>\n<p class='legend'>{_legend(launches, colours)}</p>\n<div class='wide'>"
        f"<svg class='timeline' viewBox='0 0 {_WIDTH} {y}'>" + "\n".join(drawn) + "</svg></div>"
    )


def _legend(launches: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> str:
    names = {launch["name"] for launch in launches}
    spans = [f"<span>{_swatch(name, colours)}{_text(name)}</span>" for name in colours if name in names]
    if names - colours.keys():
        spans.append(f"<span>{_swatch(None, colours)}others</span>")
    return "".join(spans)


def _launch(launch: Mapping[str, Any], x: float, y: int, scale: float, colours: Mapping[str, int]) -> str:
    said = f"{launch['name']}: {launch['us']:,.2f} us, at {launch['begin_us']:,.2f} after {launch['gap_us']:,.2f} idle"
    return (
        f"<rect class='{_class(launch['name'], colours)}' x='{x:.2f}' y='{y}' width='{launch['us'] * scale:.2f}' "
        f"height='{_LANE - 1}'><title>{_text(said)}</title></rect>"
    )


def _lanes(launches: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each launch the first lane whose last launch has ended."""
    ends: list[float] = []
    found = []
    for launch in launches:
        # Begin and length are rounded each for itself.
        free = (i for i, end in enumerate(ends) if end <= launch["begin_us"] + 2e-3)
        lane = next(free, len(ends))
        ends[lane : lane + 1] = [launch["begin_us"] + launch["us"]]
        found.append(lane)
    return found


def _comparison(measured: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> str:
    whole = max(float(row["step_us"]) for row in measured)
    bars = "\n".join(f"<h3>{_text(bucket_name(row))}</h3>\n{_roofline(row, whole)}" for row in measured)
    added = [{kernel["name"]: float(kernel["added_us"]) for kernel in row["kernels"]} for row in measured]
    shares: dict[str, float] = {}
    for row, of_row in zip(measured, added, strict=True):
        for name, us in of_row.items():
            shares[name] = max(shares.get(name, 0.0), us / max(float(row["step_us"]), 1e-9))
    names = sorted((name for name in shares if shares[name] >= _LEAST_SHARE), key=lambda name: -shares[name])
    most = max((us for of_row in added for us in of_row.values()), default=0.0)
    head = "".join(f"<th colspan='2'>{_text(bucket_name(row))}</th>" for row in measured)
    lines = [
        f"<tr>{_kernel_name(name, colours)}"
        + "".join(
            f"<td>{of_row.get(name, 0.0):,.1f}</td>"
            f"<td class='bar'>{_bar(of_row.get(name, 0.0), most, _class(name, colours))}</td>"
            for of_row in added
        )
        + "</tr>"
        for name in names
    ]
    table = (
        f"<table class='buckets'>\n<tr><th class='name'>added us</th>{head}</tr>\n" + "\n".join(lines) + "\n</table>"
    )
    return (
        f"<section>\n<h2>The buckets beside each other</h2>\n{bars}\n<h3>Kernels of at least {_LEAST_SHARE:.0%} of a "
        f"step</h3>\n<div class='wide'>{table}</div>\n</section>"
    )


def _colours(measured: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A colour for each of the costliest kernels of all buckets, the same in all."""
    most: dict[str, float] = {}
    for row in measured:
        for kernel in row["kernels"]:
            most[kernel["name"]] = max(most.get(kernel["name"], 0.0), float(kernel["added_us"]))
    return {name: i for i, name in enumerate(sorted(most, key=lambda name: -most[name])[: len(_COLOURS)])}


def _class(name: str | None, colours: Mapping[str, int]) -> str:
    return f"k{len(_COLOURS) if name is None else colours.get(name, len(_COLOURS))}"


def _swatch(name: str | None, colours: Mapping[str, int]) -> str:
    return _key(_class(name, colours))


def _key(kind: str) -> str:
    return f"<i class='swatch {kind}'></i>"


def _kernel_name(name: str, colours: Mapping[str, int]) -> str:
    return f"<td class='name' title='{_text(name)}'>{_swatch(name, colours)}{_text(name)}</td>"


def _bar(value: float, most: float, kind: str) -> str:
    width = 100 * value / most if most > 0 else 0.0
    return (
        "<svg viewBox='0 0 100 8' preserveAspectRatio='none'><rect class='track' width='100' height='8' />"
        f"<rect class='{kind}' width='{width:.2f}' height='8' /></svg>"
    )


def _distinct(measured: Sequence[Mapping[str, Any]], key: str) -> str:
    values = dict.fromkeys(str(row[key]) for row in measured if row.get(key) is not None)
    return ", ".join(values) or "not known"


def _text(value: object) -> str:
    """Escaped, for an element or an attribute; what XML can't hold is replaced."""
    return escape(_NOT_XML.sub("\ufffd", str(value)))
