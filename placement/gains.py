"""First-order gains: what relieving the most pressed group of a layer would be worth.

Moving tokens changes two groups' levels; the score's p-norm and the slowest group follow in closed
form, for all candidates of all layers and scenarios at once.
"""

from __future__ import annotations

import numpy as np

from placement.score import POWER, SOFT, powered
from placement.types import Floats, Ints


class Gains:
    """First-order gains in J of moving tokens from the pressed group to others."""

    def __init__(
        self, rate: Floats, relative: Floats, unit: Floats, source: Ints, target: Ints
    ) -> None:
        """relative [N, M, G] levels over the worst of their scenario, unit [N, M] that worst."""
        n = np.arange(len(source))
        self._total = (powered(relative) * rate).sum(2) / rate.sum()  # [N, M]
        self._norm = self._total ** (1 / POWER)
        self._rate_sum = rate.sum()
        self._unit = unit
        self._rate_source = rate[source]  # [N]
        self._rate_target = rate[target]  # [N, T]
        self._source = relative[n, :, source]  # [N, M]
        self._target = relative[n[:, None], :, target]  # [N, T, M]
        ordered = np.partition(relative, -2, axis=2)
        # what stays the slowest when the pressed group is relieved: where it is not the slowest
        # in a scenario, the one that is
        self._rest = np.where(self._source >= 1 - 1e-12, ordered[:, :, -2], 1.0)  # [N, M]

    def add(self, amount: Floats) -> Floats:
        """amount [N, S, M] pairs/s of the expert on the source -> mean gain [N, S, T]."""
        slack = self._source[:, None, :] - self._target  # [N, T, M]
        inverse = 1 / self._rate_source[:, None] + 1 / self._rate_target  # [N, T]
        level_out = np.maximum(slack / inverse[:, :, None], 0) * self._unit[:, None, :]
        moved = np.minimum(amount[:, :, None, :], level_out[:, None, :, :])  # [N, S, T, M]
        return self._mean_gain(moved)

    def swap(self, amount: Floats, back: Floats) -> Floats:
        """amount [N, S, M] out, back [N, T, F, M] in -> mean gain [N, S, T, F]."""
        n, s, m = amount.shape
        t, f = back.shape[1:3]
        moved = amount[:, :, None, None, :] - back[:, None]  # [N, S, T, F, M]
        gain = self._mean_gain(
            moved.transpose(0, 1, 3, 2, 4).reshape(n, s * f, t, m)
        )  # [N, S * F, T]
        return gain.reshape(n, s, f, t).transpose(0, 1, 3, 2)

    def _mean_gain(self, moved: Floats) -> Floats:
        unit = self._unit[:, None, None, :]
        down = self._source[:, None, None, :] - moved / (
            self._rate_source[:, None, None, None] * unit
        )
        up = self._target[:, None] + moved / (self._rate_target[:, None, :, None] * unit)
        share_source = (self._rate_source / self._rate_sum)[:, None, None, None]
        share_target = (self._rate_target / self._rate_sum)[:, None, :, None]
        was = share_source * powered(self._source)[:, None, None, :] + (
            share_target * powered(self._target)[:, None]
        )
        total = self._total[:, None, None, :] - was
        total = total + share_source * powered(down) + share_target * powered(up)
        norm = np.maximum(total, 1e-300) ** (1 / POWER)
        worst = np.maximum(np.maximum(down, up), self._rest[:, None, None, :])
        gain = (1 - SOFT) * (1 - worst) + SOFT * (self._norm[:, None, None, :] - norm)
        result: Floats = (gain * unit).mean(-1)
        return result
