"""Measured speeds wander; what is planned with does not, until something really changed.

Groups measure their own times, some per cent off from one report to the next. Plans and tables
made from those would change with the noise. So each of a group's numbers has an accepted value,
which follows the reports when their moving average leaves a band, or at once when most of the
last few reports are far off (a throttled device). A single wild report changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

from placement.types import Fleet, GroupSpec

_WEIGHT = 0.2  # of the newest report: of 5 % noise 1.7 % is left in the average
_FEW = 3  # reports of which most must agree for a jump
_LAST = 5  # reports whose median is taken over


@dataclass(kw_only=True)
class _Track:
    """One number of one group."""

    accepted: float
    average: float
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))

    def follow(self, measured: float, band: float, jump: float | None) -> None:
        self.recent.append(measured)
        near = measured
        if jump is not None:  # one wild report must not carry the average out of its band
            near = min(max(measured, self.accepted * (1 - jump)), self.accepted / (1 - jump))
        self.average += _WEIGHT * (near - self.average)
        last = sorted(list(self.recent)[-_FEW:])
        middle = sorted(self.recent)[len(self.recent) // 2]
        if jump is not None and len(last) == _FEW and _off(last[1], self.accepted) > jump:
            self.accepted = self.average = last[1]
            self.recent.clear()
        elif _off(self.average, self.accepted) > band and _off(middle, self.accepted) > 0.75 * band:
            self.accepted = self.average = middle


def _off(value: float, accepted: float) -> float:
    """How far off, as a part of the larger: the same up and down, 1 from or to nothing."""
    return abs(value - accepted) / max(value, accepted, 1e-300)


class SteadyFleet:
    """`follow(measured)` gives the fleet to plan with: accepted speeds, all else as measured."""

    def __init__(
        self,
        speed_band: float = 0.1,
        cost_band: float = 0.4,
        jump: float = 0.3,
        report_s: float = 0.0,
    ) -> None:
        """Parts of the larger of two values: bands of the speed and of alpha_s and gamma_s
        (wide, as a fit trades one for the other), and a jump of the speed. What is seen within
        `report_s` of a report is the same report again."""
        self._report_s = report_s
        self._rules = {
            "speed": (speed_band, jump),
            "alpha_s": (cost_band, None),
            "gamma_s": (cost_band, None),
        }
        self._tracks: dict[str, dict[str, _Track]] = {}
        self._tokens_per_s = 1.0
        self._fleet: Fleet | None = None
        self._reported_s = -math.inf

    def follow(self, measured: Fleet, now: float = 0.0) -> Fleet:
        """Every call is a report, also when it repeats the last one's numbers, but for those within
        `report_s` of one. now: seconds of any clock.

        The same object comes back while nothing changed. New groups are taken as they are. Rates
        are followed in pairs/s, so that it does not matter by what speeds are scaled.
        """
        if self._fleet is None:
            self._tokens_per_s = measured.tokens_per_s
        self._tracks = {g.id: self._tracks.get(g.id, {}) for g in measured.groups}
        scale = measured.tokens_per_s / self._tokens_per_s
        fresh = now - self._reported_s >= self._report_s
        if fresh:
            self._reported_s = now
        groups = tuple(self._steady(g, scale, fresh) for g in measured.groups)
        fleet = replace(measured, groups=groups, tokens_per_s=self._tokens_per_s)
        if self._fleet is None or not _alike(self._fleet, fleet):
            self._fleet = fleet
        return self._fleet

    def _steady(self, group: GroupSpec, scale: float, fresh: bool) -> GroupSpec:
        """The group with its accepted numbers; scale: this report's tokens_per_s over the kept."""
        tracks = self._tracks[group.id]
        for name, (band, jump) in self._rules.items():
            measured = float(getattr(group, name)) * (scale if name == "speed" else 1.0)
            if name in tracks and fresh:
                tracks[name].follow(measured, band, jump)
            elif name not in tracks:
                tracks[name] = _Track(accepted=measured, average=measured)
        return replace(
            group,
            speed=tracks["speed"].accepted,
            alpha_s=tracks["alpha_s"].accepted,
            gamma_s=tracks["gamma_s"].accepted,
        )


def _alike(a: Fleet, b: Fleet) -> bool:
    same = (a.expert_bytes == b.expert_bytes).all() if a.layers == b.layers else False
    return bool(same) and (
        (a.groups, a.experts_of_layer, a.survive, a.reserve_bytes, a.tokens_per_s)
        == (b.groups, b.experts_of_layer, b.survive, b.reserve_bytes, b.tokens_per_s)
    )
