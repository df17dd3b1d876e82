"""What clients report, gathered: counts for the planner, a smoothed load to show, who is behind."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import numpy as np

from placement.types import Floats
from raymoe.control import ClientReport

log = logging.getLogger("raymoe.controller")
_LOAD_TAU_S = 10.0  # the load shown is smoothed over about this long


class Traffic:
    """Pairs dispatched to each expert, [L, E]. Times in seconds of one clock."""

    def __init__(self, layers: int, experts: int, window_s: float, now: float) -> None:
        self.load: Floats = np.zeros((layers, experts))  # pairs/s, smoothed
        self._window_s = window_s
        self._pending: Floats = np.zeros((layers, experts))
        self._since_s = self._taken_s = now

    def add(self, reports: Iterable[ClientReport], now: float) -> None:
        """What came in since the last call."""
        passed_s = max(now - self._taken_s, 1e-3)
        self._taken_s = now
        counts = np.zeros_like(self.load)
        for report in reports:
            if report.counts is not None:
                counts += report.counts
        self._pending += counts
        keep = math.exp(-passed_s / _LOAD_TAU_S)
        self.load = keep * self.load + (1 - keep) * counts / passed_s

    def window(self, now: float) -> tuple[Floats | None, float]:
        """(counts, seconds) of a window that is long enough, else (None, 0). Time without any
        traffic is no window: what was usual before it is not forgotten."""
        passed_s = now - self._since_s
        if passed_s < self._window_s:
            return None, 0.0
        counts, self._pending, self._since_s = self._pending, np.zeros_like(self._pending), now
        return (counts, passed_s) if counts.any() else (None, 0.0)


class Behind:
    """For how long each client has not been up to date; who is not for too long is left behind.

    A client is timed from when it last kept up, not from the newest table: tables may change more
    often than the limit, and one client that is stuck must not hold drops up for ever.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: dict[str, float] = {}  # of those that are behind now
        self._told: set[str] = set()

    def drained(self, order: tuple[int, int], behind: tuple[str, ...], now: float) -> int:
        """The epoch of the newest table, `order`, when nobody is waited for any more, or 0.

        behind: the clients that do not use a table at least as new yet.
        """
        self._since_s = {name: self._since_s.get(name, now) for name in behind}
        self._told &= set(behind)
        late = {name for name in behind if now - self._since_s[name] >= self._limit_s}
        if late - self._told:
            log.warning("%s do not take table %s: left behind", ", ".join(sorted(late)), order)
            self._told |= late
        return order[1] if late == set(behind) else 0
