"""What the reconciler measures: windows of load, traffic, and whether plans kept their promise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement.converge import no_host
from placement.forecast import Forecaster
from placement.pour import host_lists, pour
from placement.types import Bools, Fleet, Floats, Placement, check_load

_TRAFFIC_S = 10.0  # what the autoscaler sees is averaged over about so long
_CAUTION_MOST = 16.0
_REPORTS = 32  # kept apart, at most, of a window still too small; an even number


class Traffic:
    """Gathers counts into windows large enough to learn from."""

    def __init__(self, layers: int, experts: int, min_tokens: int) -> None:
        self.forecaster = Forecaster(layers, experts)
        self._min_tokens = min_tokens
        self._pending = np.zeros((layers, experts))  # counts of a window still too small
        self._reports: list[Floats] = []  # what it is made of
        self._pending_s = 0.0
        self.rate = np.zeros((layers, experts))  # pairs/s, averaged over some seconds
        self._seen_s = 0.0

    def add(self, counts: Floats, seconds: float) -> Floats | None:
        """Take in counts [L, E] of so many seconds; the load in pairs/s when a window is whole."""
        counts = check_load(counts, len(self._pending))
        self._pending += counts
        if counts.any():
            self._reports.append(counts.copy())
        if len(self._reports) >= _REPORTS:
            self._reports = [a + b for a, b in zip(*[iter(self._reports)] * 2, strict=True)]
        self._pending_s += seconds
        # a plain mean at first, then an exponential one
        self._seen_s += seconds
        weight = max(-math.expm1(-seconds / _TRAFFIC_S), min(seconds / self._seen_s, 1.0))
        self.rate += weight * (counts / seconds - self.rate)
        if self._pending.sum(1).max() < self._min_tokens:
            return None
        window = self._pending / self._pending_s
        self.forecaster.update(window, np.stack(self._reports) if self._reports else None)
        self._pending = np.zeros_like(window)
        self._reports = []
        self._pending_s = 0.0
        return window


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a plan promised and brought, as parts of the time before it; and the caution after."""

    promised: float
    realised: float
    caution: float

    def sentence(self) -> str:
        return (
            f"the plan promised {self.promised:.1%} less time and brought {self.realised:.1%}; "
            f"margin x {self.caution:.2g}"
        )


class Promise:
    """Compares what plans promised with what they brought; says how cautious to be."""

    def __init__(self) -> None:
        self.caution = 1.0  # the margin's factor: doubled when plans promised too much
        self._check: tuple[Placement, Placement, float] | None = None

    def given(self, before: Placement, after: Placement, part: float) -> None:
        """A plan from before to after promises so much less time, as a part."""
        self._check = before, after, part

    def compare(self, fleet: Fleet, rate: Floats) -> Kept | None:
        """Judge the last plan by the load that came, pairs/s [L, E]; None when there was none.

        Less than half of the promise doubles the caution.
        """
        if self._check is None:
            return None
        before, after, promised = self._check
        self._check = None
        groups = len(fleet.groups)
        if before.resident.shape[2] != groups or after.resident.shape[2] != groups:
            return None
        was, now = (slowest_s(p.resident, rate, fleet) for p in (before, after))
        realised = (was - now) / max(was, 1e-300)
        kept = realised >= promised / 2
        self.caution = max(self.caution / 1.5, 1.0) if kept else self.caution * 2
        self.caution = min(self.caution, _CAUTION_MOST)
        return Kept(promised=promised, realised=float(realised), caution=self.caution)


def slowest_s(resident: Bools, rate: Floats, fleet: Fleet) -> float:
    """Seconds a second of the slowest groups, summed over layers, for pairs/s [L, E].

    With the per-batch split; inf when an expert has no replica.
    """
    if no_host(resident).any():
        return float("inf")
    hosts, copies = host_lists(resident)
    base = np.zeros(len(fleet.groups))
    level = pour(rate[:, None, :], hosts, copies, fleet.pair_rate, base).level
    return float(level.max(2).sum())
