"""Where the routers' steps spend their time, between two readings of /status.

docs/profile.md explains the parts. All are running totals of the routers, so a run's own are
differences; routers that came or went between the readings are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Status = Mapping[str, Any]
_NUMBERS = (int, float)


def profile(before: Status, after: Status) -> dict[str, Any] | None:
    """Steps, tokens; ms a step by part and by layer; messages, pairs and times by group.

    None when no router was there all the time, or none made a step.
    """
    old = {one["id"]: one["profile"] for one in before["routers"]}
    totals: dict[str, float] = {}
    layers: list[list[float]] = []
    groups: dict[str, dict[str, float]] = {}
    for router in after["routers"]:
        if router["id"] not in old or router["pid"] not in _pids(before):
            continue
        first, last = old[router["id"]], router["profile"]
        for name, value in last.items():
            if isinstance(value, _NUMBERS) and not isinstance(value, bool):
                totals[name] = totals.get(name, 0.0) + value - first.get(name, 0)
        _add_layers(layers, first.get("layers", []), last.get("layers", []))
        for name in ("answers", "pairs", "busy_s", "latency_s"):
            for group, value in last.get(name, {}).items():
                row = groups.setdefault(group, {})
                row[name] = row.get(name, 0.0) + value - first.get(name, {}).get(group, 0)
    steps = totals.get("steps", 0.0)
    if steps <= 0:
        return None
    return {
        "steps": int(steps),
        "decode_tokens": int(totals["decode_tokens"]),
        "prefill_tokens": int(totals["prefill_tokens"]),
        "step_ms": _parts(totals, steps),
        "layers": [_layer(number, row) for number, row in enumerate(layers) if row[0]],
        "groups": [_group(name, row) for name, row in sorted(groups.items()) if row["answers"]],
    }


def _pids(status: Status) -> set[int]:
    return {one["pid"] for one in status["routers"]}


def _add_layers(
    totals: list[list[float]], first: list[list[float]], last: list[list[float]]
) -> None:
    for number, row in enumerate(last):
        was = first[number] if number < len(first) else [0.0] * len(row)
        if number == len(totals):
            totals.append([0.0] * len(row))
        totals[number] = [
            t + now - then for t, now, then in zip(totals[number], row, was, strict=True)
        ]


def _parts(totals: Mapping[str, float], steps: float) -> dict[str, float]:
    """ms a step; they add up to the engine thread's busy time."""
    exchange = totals["dispatch_s"] + totals["wait_s"] + totals["combine_s"]
    parts = {
        "scheduling": totals["plan_s"],
        "dense part and attention": totals["forward_s"] - exchange,
        "dispatch": totals["dispatch_s"],
        "wait for experts": totals["wait_s"],
        "combine": totals["combine_s"],
        "sampling": totals["sample_s"],
        "stalled, experts away": totals.get("stalled_s", 0.0),
    }
    return {name: 1e3 * seconds / steps for name, seconds in parts.items()}


def _layer(number: int, row: list[float]) -> dict[str, Any]:
    batches, dispatch_s, wait_s, combine_s = row
    return {
        "layer": number,
        "batches": int(batches),
        "dispatch_ms": 1e3 * dispatch_s / batches,
        "wait_ms": 1e3 * wait_s / batches,
        "combine_ms": 1e3 * combine_s / batches,
    }


def _group(name: str, row: Mapping[str, float]) -> dict[str, Any]:
    answers = row["answers"]
    return {
        "group": name,
        "messages": int(answers),
        "pairs": int(row.get("pairs", 0)),
        "pairs_per_message": row.get("pairs", 0) / answers,
        "busy_ms": 1e3 * row.get("busy_s", 0.0) / answers,
        "latency_ms": 1e3 * row["latency_s"] / answers,
        "busy_s": row.get("busy_s", 0.0),
    }
