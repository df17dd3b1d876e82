"""How good a layout is: the slowest group's time, over the loads that may come.

J = mean over scenarios of (1 - SOFT) * max_g level_g + SOFT * p-norm of the levels. The first part
is the time of a layer, the second makes progress visible while several groups tie for slowest and
rewards layouts that leave room for what the forecast missed.
"""

from __future__ import annotations

from placement.types import Floats

POWER = 8
SOFT = 0.5


def norms(level: Floats, rate: Floats) -> Floats:
    """Rate-weighted p-norm of the levels [..., G], float64 [...]."""
    total = (powered(level) * rate).sum(-1)
    result: Floats = (total / rate.sum()) ** (1 / POWER)
    return result


def powered(level: Floats) -> Floats:
    """level ** POWER by squaring, which is several times faster than numpy's power."""
    square = level * level
    square *= square
    result: Floats = square * square
    return result


def layer_score(level: Floats, rate: Floats) -> Floats:
    """J of each layer from level [L, M, G], float64 [L]."""
    worst = level.max(2)
    score: Floats = ((1 - SOFT) * worst + SOFT * norms(level, rate)).mean(1)
    return score
