"""A run's figures as text: the table, the profile's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[Any]]
_TIMES = (
    ("time to first token", "ttft_s"),
    ("time per output token", "tpot_s"),
    ("between two chunks", "itl_s"),
    ("longest gap of a request", "longest_gap_s"),
    ("whole request", "e2e_s"),
)
SPREAD = ("mean", "p50", "p90", "p99", "max")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns, numbers to the right, the first to the left."""
    text = [[cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in text) for column in range(len(header))]
    lines = []
    for row in text:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(value.rjust(width) for value, width in rest)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def count_rows(found: Mapping[str, Any]) -> Rows:
    """What was sent and came back: name, value."""
    rows: Rows = [
        ["requests", found["requests"]],
        ["failed", found["failed"]],
        ["seconds", found["seconds"]],
        ["prompt tokens", found["prompt_tokens"]],
        ["output tokens", found["output_tokens"]],
        ["requests/s", found["requests_per_s"]],
        ["output tokens/s", found["output_tokens_per_s"]],
        ["chunks a token", found["chunks_per_token"]],
    ]
    if "goodput_requests_per_s" in found:
        rows.append(["requests that met the objective", found["objective_met"]])
        rows.append(["goodput, requests/s", found["goodput_requests_per_s"]])
    return rows


def time_rows(found: Mapping[str, Any]) -> Rows:
    """Milliseconds: name, then `SPREAD`."""
    rows: Rows = []
    for name, key in _TIMES:
        values = found[key]
        rows.append([name, *(None if values is None else 1e3 * values[one] for one in SPREAD)])
    return rows


def step_rows(profile: Mapping[str, Any]) -> Rows:
    """Part of a step, ms, share in percent."""
    parts = {name: value for name, value in profile["step_ms"].items() if value}
    whole = sum(parts.values()) or 1.0
    rows: Rows = [[name, value, f"{100 * value / whole:.0f} %"] for name, value in parts.items()]
    return [*rows, ["one step", whole, "100 %"]]


LAYER_HEADER = ("layer", "batches", "dispatch ms", "wait ms", "combine ms")
GROUP_HEADER = ("group", "messages", "pairs a message", "busy ms", "answer ms", "busy s")


def layer_rows(profile: Mapping[str, Any]) -> Rows:
    names = ("layer", "batches", "dispatch_ms", "wait_ms", "combine_ms")
    return [[one[name] for name in names] for one in profile["layers"]]


def group_rows(profile: Mapping[str, Any]) -> Rows:
    names = ("group", "messages", "pairs_per_message", "busy_ms", "latency_ms", "busy_s")
    return [[one[name] for name in names] for one in profile["groups"]]


def as_text(results: Mapping[str, Any]) -> str:
    """Everything that is printed before the JSON line."""
    found = results["summary"]
    parts = [table(["", "value"], count_rows(found))]
    parts.append(table(["ms", *SPREAD], time_rows(found)))
    if found["errors"]:
        parts.append(table(["error", "requests"], [[k, v] for k, v in found["errors"].items()]))
    if len(results["domains"]) > 1:
        rows = [
            [name, one["requests"], one["output_tokens"], (one["ttft_s"] or {}).get("p50")]
            for name, one in results["domains"].items()
        ]
        parts.append(table(["domain", "requests", "output tokens", "TTFT p50, s"], rows))
    if results["faults"]:
        rows = [[f"{at:.1f} s", said] for at, said in results["faults"]]
        parts.append(table(["at", "fault"], rows))
    profile = results.get("profile")
    if profile is not None:
        head = f"{profile['steps']} steps, {profile['decode_tokens']} decode tokens, "
        head += f"{profile['prefill_tokens']} prefill tokens (docs/profile.md explains the parts)"
        parts.append(head + "\n" + table(["part of a step", "ms", "share"], step_rows(profile)))
        parts.append(table(LAYER_HEADER, layer_rows(profile)))
        parts.append(table(GROUP_HEADER, group_rows(profile)))
    return "\n\n".join(parts)
