"""How fast the groups are, from the timings they report: nothing about speed is declared.

The time of a message, alpha + pairs * pair_s + gamma * active experts, is fitted once, over the
first minutes of traffic, for all groups of a kind (a group alone sees too few shapes to tell the
terms apart); each group then has one number: how many times as long as that it takes. Its median
over a window shrugs off messages that were preempted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.fleet import Sample
from placement.fit import Speed, TimeFit

_FEW = 16  # timings of a group before its factor is believed
_KEEP_LAST = 256  # timings the factor is taken over: half a second of decoding, or some
_FIT_MESSAGES = 200  # timings of a kind before its model is believed ...
_FIT_DONE = 4000  # ... and after so many it stays: what changes then is a group's speed
_FIT_AT_ONCE = 32  # timings taken in of one report
_STALE_S = 60.0  # a group without traffic for so long is taken for as fast as its kind again
_EASE = 0.05  # weight of the newest report in what a usual message is
_RATE_BAND = 1.3  # the rate planned with follows when it is off by more than this factor
_RATE_EVERY_S = 30.0  # and not more often
_ALIKE = 1.25  # groups within this factor of the fastest are taken for equally fast


@dataclass
class _Group:
    kind: str
    recent: list[Sample] = field(default_factory=list)
    factor: float = 1.0
    heard_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One group: its speed relative to the fastest, and its message's time by terms.

    seconds = alpha_s + pairs / pairs_per_s + gamma_s * active experts
    """

    speed: float
    pairs_per_s: float
    alpha_s: float
    gamma_s: float


class SpeedBook:
    """Feed it what groups report; `measured()` says how fast each is."""

    def __init__(self) -> None:
        self._fits: dict[str, TimeFit] = {}
        self._counts: dict[str, int] = {}
        self._models: dict[str, Speed] = {}
        self._groups: dict[str, _Group] = {}
        self._usual = (0.0, 0.0)  # pairs and active experts of a message of late
        self._rate: float | None = None
        self._rated_s = 0.0

    def add(self, group_id: str, kind: str, samples: Sequence[Sample], now: float) -> None:
        """Timings of one group since the last call."""
        group = self._groups.setdefault(group_id, _Group(kind=kind, heard_s=now))
        if not samples:
            if now - group.heard_s > _STALE_S:
                group.factor, group.recent = 1.0, []
            return
        group.heard_s = now
        group.recent = [*group.recent, *samples][-_KEEP_LAST:]
        table = np.array(group.recent, np.float64)
        pairs, active = float(table[:, 0].mean()), float(table[:, 1].mean())
        old = self._usual if self._usual[0] else (pairs, active)
        self._usual = old[0] + _EASE * (pairs - old[0]), old[1] + _EASE * (active - old[1])
        if self._counts.get(kind, 0) < _FIT_DONE:
            self._learn(kind, samples)
        model = self._models.get(kind)
        if model is not None and len(group.recent) >= _FEW:
            usual = model.alpha_s + table[:, 0] * model.pair_s + table[:, 1] * model.gamma_s
            group.factor = float(np.median(table[:, 2] / usual))

    def _learn(self, kind: str, samples: Sequence[Sample]) -> None:
        """The model of a kind, from messages of as many shapes as the start of traffic brings."""
        fit = self._fits.setdefault(kind, TimeFit(keep=1 - 2 / _FIT_DONE))
        taken = samples[:: -(-len(samples) // _FIT_AT_ONCE)]
        for pairs, active, seconds in taken:
            fit.add(pairs, active, seconds)
        self._counts[kind] = self._counts.get(kind, 0) + len(taken)
        if self._counts[kind] >= _FIT_MESSAGES:
            speed = fit.speed()
            if speed is not None:
                self._models[kind] = speed

    def forget(self, group_id: str) -> None:
        """A new life of the group may run elsewhere."""
        self._groups.pop(group_id, None)

    def tokens_per_s(self, now: float) -> float | None:
        """Pairs/s that the fastest group computes in messages as they are of late, fixed and all
        costs included; None before anything was fitted. Follows large changes only, and seldom."""
        slowness = self._slowness({i: g.kind for i, g in self._groups.items()})
        if not slowness:
            return None
        rate = self._usual[0] / min(slowness.values())
        off = self._rate is None or not 1 / _RATE_BAND < rate / self._rate < _RATE_BAND
        if off and (self._rate is None or now - self._rated_s > _RATE_EVERY_S):
            self._rate, self._rated_s = rate, now
        return self._rate

    def measured(self, kinds: Mapping[str, str]) -> dict[str, Measured]:
        """Of each group of {id: kind} whose kind's model is known. Speeds close to the fastest
        group's are taken for equal to it, and other steps are of a tenth."""
        slowness = self._slowness(kinds)
        told = {}
        for group_id, slow in slowness.items():
            relative = slow / min(slowness.values())
            relative = 1.0 if relative < _ALIKE else float(np.exp(np.round(np.log(relative), 1)))
            model = self._models[kinds[group_id]]
            # the kind's terms, stretched so that a usual message takes what the speed says
            stretch = relative * min(slowness.values()) / self._seconds(model)
            told[group_id] = Measured(
                speed=1.0 / relative,
                pairs_per_s=model.pairs_per_s / stretch,
                alpha_s=model.alpha_s * stretch,
                gamma_s=model.gamma_s * stretch,
            )
        return told

    def _slowness(self, kinds: Mapping[str, str]) -> dict[str, float]:
        """Seconds of a usual message in each group."""
        slowness = {}
        for group_id, kind in kinds.items():
            model = self._models.get(kind)
            if model is not None:
                group = self._groups.get(group_id)
                factor = 1.0 if group is None else group.factor
                slowness[group_id] = factor * self._seconds(model)
        return slowness

    def _seconds(self, model: Speed) -> float:
        pairs, active = self._usual
        return model.alpha_s + pairs * model.pair_s + active * model.gamma_s
