"""Why replicas are where they are, and what became of plans: for operators."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from placement.failing import Cell
from placement.reconcile import Reconciler


class History:
    """Wall-clock times for what the reconciler did on a monotonic clock."""

    def __init__(self) -> None:
        self._why: dict[Cell, tuple[float, str]] = {}
        self._began = time.time()
        self._offset_s = self._began - time.monotonic()
        self._said: deque[tuple[float, str]] = deque(maxlen=200)
        self._seen: str | None = None

    def why_of(self, cell: Cell) -> tuple[float, str]:
        """Since when a replica is there (Unix seconds), and why."""
        return self._why.get(cell, (self._began, "found here by a new controller"))

    def noted(self, cell: Cell, why: str) -> None:
        """A replica was asked for."""
        self._why[cell] = (time.time(), why)

    def follow(self, mind: Reconciler) -> None:
        """Takes over the reconciler's sentences that are new."""
        events = list(mind.events)
        start = 0
        if self._seen is not None and self._seen in events:
            start = len(events) - events[::-1].index(self._seen)
        for event in events[start:]:
            self.say(event)
        if events:
            self._seen = events[-1]

    def say(self, sentence: str) -> None:
        """Something happened."""
        self._said.append((time.time(), sentence))

    def to_dict(self, mind: Reconciler) -> dict[str, Any]:
        """{"plans": newest first, "events": newest first, "caution"}; times in Unix seconds."""
        plans = []
        for record in reversed(mind.records):
            plan = record.to_dict()
            plans.append({"at": plan.pop("at_s") + self._offset_s, **plan})
        events = [{"at": at, "event": what} for at, what in reversed(self._said)]
        return {"plans": plans, "events": events, "caution": mind.caution}
