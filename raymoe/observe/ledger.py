"""The counters of several gateways as one: whichever of them is asked, none runs backwards.

A grow-only counter kept in several places: each gateway owns one entry, whose numbers only grow;
everybody keeps all entries, the newer of two wins, and the total is their sum. The entry of a
gateway that has ended stays, and a controller that has just started gets all entries back from the
first gateway that speaks to it. Gauges are taken of the gateways that live.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raymoe.observe.catalogue import CATALOGUE, Labels

Number = float | list[float]
Values = Mapping[str, Mapping[Labels, Number]]
Entry = Mapping[str, Any]  # {"seq": int, grows with each entry of a gateway; "values": Values}
Entries = Mapping[str, Entry]  # by the gateway's id


class Ledger:
    """The controller's copy. Times are monotonic seconds."""

    def __init__(self, now: float, *, restarted: bool, live_s: float = 10.0) -> None:
        """restarted: gateways may be there that know more than this ledger does."""
        self._entries: dict[str, Entry] = {}
        self._heard: dict[str, float] = {}
        self._live_s = live_s
        self._settled_s = now + (live_s / 2 if restarted else 0.0)

    def exchange(self, gateway_id: str, entries: Entries, now: float) -> dict[str, Any]:
        """Takes in what a gateway knows, gives it what all know: {"entries", "live": ids of the
        gateways that live, "settled": whether every living gateway has had time to speak}."""
        self._entries = merged(self._entries, entries)
        self._heard[gateway_id] = now
        live = [g for g, heard in self._heard.items() if now - heard < self._live_s]
        return {"entries": self._entries, "live": live, "settled": self.settled(now)}

    def settled(self, now: float) -> bool:
        """Whether every living gateway has had time to speak."""
        return now >= self._settled_s

    def values(self, now: float) -> dict[str, dict[Labels, Number]]:
        """All gateways as one."""
        live = {g for g, heard in self._heard.items() if now - heard < self._live_s}
        return total(self._entries, live)


def merged(ours: Entries, theirs: Entries) -> dict[str, Entry]:
    """Of each gateway the newer entry."""
    newer = dict(ours)
    for gateway_id, entry in theirs.items():
        if gateway_id not in newer or newer[gateway_id]["seq"] < entry["seq"]:
            newer[gateway_id] = entry
    return newer


def total(entries: Entries, live: Iterable[str]) -> dict[str, dict[Labels, Number]]:
    """The gateways' values as one: counters and histograms summed over all entries, gauges over
    the living ones as the catalogue says."""
    alive = set(live)
    out: dict[str, dict[Labels, Number]] = {}
    for gateway_id in sorted(entries):
        for name, series in entries[gateway_id]["values"].items():
            spec = CATALOGUE.get(name)
            if spec is None:  # a gateway of another version
                continue
            gauge = spec.kind == "gauge"
            if gauge and gateway_id not in alive:
                continue
            into = out.setdefault(name, {})
            for labels, value in series.items():
                into[labels] = _joined(into.get(labels), value, spec.over if gauge else "sum")
    return out


def _joined(a: Number | None, b: Number, over: str) -> Number:
    if a is None:
        return list(b) if isinstance(b, list) else b
    if isinstance(a, list) and isinstance(b, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    assert not isinstance(a, list) and not isinstance(b, list)
    return a + b if over == "sum" else min(a, b) if over == "min" else max(a, b)
