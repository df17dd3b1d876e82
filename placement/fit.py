"""How fast a group is, from its own timings: seconds = alpha + pairs / rate + gamma * active.

Least squares with old timings fading and no negative term, weighted so that a small batch counts
as much as a large one. One `TimeFit` per group and layer shape; a few floats of state.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from placement.errors import PlacementError
from placement.types import Floats

_TERMS = 3
_LITTLE = 0.1  # part of a usual batch's time that its pairs take at least
_ENOUGH = 8.0  # faded number of timings before a fit is given


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One batch of a layer takes alpha_s + pairs * pair_s + gamma_s * active experts."""

    alpha_s: float
    pair_s: float
    gamma_s: float

    @property
    def pairs_per_s(self) -> float:
        return 1.0 / self.pair_s


class TimeFit:
    """Feed (pairs, active experts, seconds); ask `speed()`."""

    def __init__(self, keep: float = 0.995) -> None:
        """keep: what part of the evidence is left after one more timing."""
        if not 0 < keep <= 1:
            raise PlacementError(f"keep is {keep}; it must be in (0, 1]")
        self._keep = keep
        self._normal = np.zeros((_TERMS, _TERMS))
        self._target = np.zeros(_TERMS)
        self._square = 0.0
        self._seen = 0.0

    def add(self, pairs: int, active: int, seconds: float) -> None:
        """One timing; those that are no time at all (a broken clock) are left out."""
        if not (np.isfinite(seconds) and seconds > 0 and pairs > 0 and active > 0):
            return
        row = np.array([1.0, pairs, active]) / seconds  # relative errors: every batch counts alike
        self._normal = self._normal * self._keep + np.outer(row, row)
        self._target = self._target * self._keep + row
        self._square = self._square * self._keep + 1.0
        self._seen = self._seen * self._keep + 1.0

    def speed(self) -> Speed | None:
        """The best non-negative fit, or None while too little is known."""
        if self._seen < _ENOUGH:
            return None
        best: tuple[float, Floats] | None = None
        for count in range(1, _TERMS + 1):
            for terms in combinations(range(_TERMS), count):
                fit = self._solve(list(terms))
                if fit is not None and (best is None or fit[0] < best[0] - 1e-12):
                    best = fit
        if best is None:
            return None
        alpha, pair, gamma = best[1].tolist()
        if pair <= 0:
            # The cost is fixed, or by expert; a pair costs little, but never nothing. To call it
            # all pairs would predict next to nothing for a message of few: then the group that
            # gets such looks slow, gets fewer still, and looks slower.
            only = self._solve([1])
            if only is None:
                return None
            pair = _LITTLE * only[1][1]
            alpha, gamma = (1 - _LITTLE) * alpha, (1 - _LITTLE) * gamma
        return Speed(alpha_s=alpha, pair_s=pair, gamma_s=gamma)

    def _solve(self, terms: list[int]) -> tuple[float, Floats] | None:
        """(error, values of all terms) with only `terms` in use; None when one is negative."""
        part = self._normal[np.ix_(terms, terms)]
        scale = 1.0 / np.sqrt(np.maximum(np.diag(part), 1e-300))
        scaled = part * scale[:, None] * scale + 1e-9 * np.eye(len(terms))
        found = np.linalg.solve(scaled, self._target[terms] * scale) * scale
        if (found < 0).any():
            return None
        values = np.zeros(_TERMS)
        values[terms] = found
        error = self._square - 2 * values @ self._target + values @ self._normal @ values
        return float(error), values
