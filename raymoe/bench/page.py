"""A run's report as one HTML file: no script, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raymoe.bench.report import (
    GROUP_HEADER,
    LAYER_HEADER,
    SPREAD,
    cell,
    count_rows,
    group_rows,
    layer_rows,
    step_rows,
    time_rows,
)

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 820, 200, 56, 24, 12
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#6a7078;--line:#d7dbe0;--page:#fff;--a:#1664c0;
--b:#b4540a;--bad:#c0212f}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ec;--soft:#9aa2ab;--line:#3a4048;--page:#16181b;
--a:#6cb0ff;--b:#ffab66;--bad:#ff7a85}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);
max-width:860px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}.note{color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .9rem .25rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--soft)}
.text td,.text th{text-align:left}
svg{width:100%;min-width:560px;height:auto}svg text{fill:var(--soft);font-size:11px}
.grid{stroke:var(--line)}.a{stroke:var(--a);fill:none;stroke-width:1.6}
.dot{fill:var(--b)}.bad{fill:var(--bad)}.fault{stroke:var(--bad);stroke-dasharray:4 3}
"""


def as_page(results: Mapping[str, Any], title: str, arguments: Mapping[str, Any]) -> str:
    """The whole document."""
    found, series, faults = results["summary"], results["series"], results["faults"]
    seconds = max(found["seconds"], 1e-9)
    points = [(one["sent_s"], one["ttft_s"], one["failed"]) for one in results["requests"]]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_sentence(found))}</p>',
        _section("Requests and tokens", _table(["", "value"], count_rows(found))),
        _section("Times, ms", _table(["", *SPREAD], time_rows(found))),
        _chart("Output chunks a second", *_line(series["chunks"], seconds), seconds, faults),
        _chart("Requests under way", *_line(series["running"], seconds), seconds, faults),
        _chart(
            "Time to first token, s, by time of sending", *_dots(points, seconds), seconds, faults
        ),
    ]
    if faults:
        rows = [[f"{at:.1f}", said] for at, said in faults]
        parts.append(_section("Faults", _table(["second", "what"], rows, text=True)))
    if found["errors"]:
        rows = [[error, count] for error, count in found["errors"].items()]
        parts.append(_section("Failed requests", _table(["error", "requests"], rows)))
    if profile := results.get("profile"):
        parts.append(
            _section("Where a step's time goes", _table(["part", "ms", ""], step_rows(profile)))
        )
        parts.append(_section("By layer", _table(LAYER_HEADER, layer_rows(profile))))
        parts.append(_section("By group", _table(GROUP_HEADER, group_rows(profile))))
    rows = [[name, str(value)] for name, value in arguments.items() if value is not None]
    parts.append(_section("Arguments", _table(["name", "value"], rows, text=True)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _sentence(found: Mapping[str, Any]) -> str:
    failed = found["failed"]
    return (
        f"{found['requests']} requests in {found['seconds']:.1f} s, "
        f"{failed or 'none'} failed; "
        f"{found['output_tokens_per_s']:.0f} output tokens a second."
    )


def _section(heading: str, body: str) -> str:
    return f'<section><h2>{escape(heading)}</h2><div class="scroll">{body}</div></section>'


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], text: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    kind = ' class="text"' if text else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line(values: Sequence[float], seconds: float) -> tuple[str, float]:
    """One value a second: the marks, and the largest value."""
    top = max([*values, 1])
    shown = min(len(values), max(1, int(seconds)))  # the last second is not a whole one
    path = " ".join(f"{_x(at + 0.5, seconds):.1f},{_y(values[at], top):.1f}" for at in range(shown))
    return f'<polyline class="a" points="{path}"/>', top


def _dots(points: Sequence[tuple[float, float | None, bool]], seconds: float) -> tuple[str, float]:
    """One dot a request; those without a token at the top, failed ones in another colour."""
    top = max([y for _, y, _ in points if y is not None], default=0.0) or 1.0
    marks = "".join(
        f'<circle class="{"bad" if failed else "dot"}" r="2.4" '
        f'cx="{_x(at, seconds):.1f}" cy="{_y(top if value is None else value, top):.1f}"/>'
        for at, value, failed in points
    )
    return marks, top


def _chart(
    name: str, marks: str, top: float, seconds: float, faults: Sequence[tuple[float, str]]
) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = cell(share * top)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for at in _ticks(seconds):
        x, anchor = _x(at, seconds), "end" if at > 0.97 * seconds else "middle"
        label = f"{at:g} s"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    for at, said in faults:
        x = _x(min(at, seconds), seconds)
        parts.append(
            f'<line class="fault" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(said)}</title></line>"
        )
    body = "".join(parts) + marks
    label = escape(f"{name}, over the {seconds:.0f} s of the run; at most {cell(top)}", quote=True)
    size = f"0 0 {_WIDTH} {_HEIGHT}"
    return _section(name, f'<svg viewBox="{size}" role="img" aria-label="{label}">{body}</svg>')


def _ticks(seconds: float) -> list[float]:
    """Four to ten round seconds."""
    step = 10.0 ** math.floor(math.log10(seconds))
    step *= next(share for share in (0.1, 0.2, 0.25, 0.5, 1, 2) if seconds / (step * share) <= 8)
    return [step * number for number in range(int(seconds / step) + 1)]


def _x(at: float, seconds: float) -> float:
    return _LEFT + (_WIDTH - _LEFT) * at / seconds


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / top
