"""Exact multiple-choice knapsack: one option a layer, least total time within a byte budget.

Dynamic programming over the budget in units of the sizes' greatest common divisor (Kellerer,
Pferschy, Pisinger: Knapsack Problems, ch. 11). When that would be more than `GRID` units (odd
sizes, a huge budget) the states are kept as a list of (bytes, time) no other state dominates;
that is exact too, as long as the list stays under `STATES`: a longer one is thinned to the best
state of each of `STATES` byte ranges (at worst one range of bytes a layer is left unused).
"""

from __future__ import annotations

import math

import numpy as np

from placement.errors import PlacementError
from placement.types import Floats, Ints

GRID = 20_000
STATES = 100_000


def choose(time_s: Floats, size_bytes: Ints, budget_bytes: int) -> Ints:
    """The best option of each layer.

    time_s      float64 [L, K], the layer's time with option k
    size_bytes  int64 [L, K], its bytes; option 0 must cost nothing
    Returns int64 [L], minimising the summed time with summed bytes <= budget_bytes; of equal
    times the fewer bytes. Raises PlacementError when the arrays are not such.
    """
    time_s = np.asarray(time_s, np.float64)
    size_bytes = np.asarray(size_bytes, np.int64)
    if time_s.shape != size_bytes.shape or time_s.ndim != 2 or not time_s.size:
        raise PlacementError("the knapsack needs times and bytes of one shape [layers, options]")
    if not np.isfinite(time_s).all():
        raise PlacementError("the knapsack was given a time that is not finite")
    if (size_bytes < 0).any() or size_bytes[:, 0].any():
        raise PlacementError("the knapsack's sizes must be >= 0, and 0 for the first option")
    budget = min(max(int(budget_bytes), 0), int(size_bytes.max(1).sum()))
    unit = math.gcd(*size_bytes.ravel().tolist()) or 1
    if budget // unit <= GRID:
        return _by_grid(time_s, size_bytes // unit, budget // unit)
    return _by_list(time_s, size_bytes, budget)


def _by_grid(time_s: Floats, size: Ints, budget: int) -> Ints:
    best = np.zeros(budget + 1)
    chosen = np.zeros((len(time_s), budget + 1), np.int32)
    for layer, (times, sizes) in enumerate(zip(time_s, size, strict=True)):
        fresh = best + times[0]
        pick = chosen[layer]
        for k in range(1, len(times)):
            cost = int(sizes[k])
            if cost > budget:
                continue
            tried = best[: budget + 1 - cost] + times[k]
            better = tried < fresh[cost:]
            np.copyto(fresh[cost:], tried, where=better)
            np.copyto(pick[cost:], k, where=better)
        best = fresh
    left = int(np.argmin(best))  # the first, so the fewest bytes
    picks = np.zeros(len(time_s), np.int64)
    for layer in range(len(time_s) - 1, -1, -1):
        picks[layer] = chosen[layer, left]
        left -= int(size[layer, picks[layer]])
    return picks


def _by_list(time_s: Floats, size: Ints, budget: int) -> Ints:
    used, total = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for times, sizes in zip(time_s, size, strict=True):
        all_used = (used[:, None] + sizes).ravel()
        all_total = (total[:, None] + times).ravel()
        fits = np.flatnonzero(all_used <= budget)
        order = fits[np.lexsort((all_total[fits], all_used[fits]))]
        lowest = np.minimum.accumulate(all_total[order])
        keep = np.ones(len(order), np.bool_)
        keep[1:] = all_total[order][1:] < lowest[:-1]
        order = order[keep]
        if len(order) > STATES:
            ranges = all_used[order] * STATES // (budget + 1)
            order = order[np.append(ranges[1:] != ranges[:-1], True)]  # the last has the least time
        trail.append((order // len(times), order % len(times)))
        used, total = all_used[order], all_total[order]
    state = int(np.argmin(total))
    picks = np.zeros(len(time_s), np.int64)
    for layer in range(len(time_s) - 1, -1, -1):
        before, option = trail[layer]
        picks[layer] = option[state]
        state = int(before[state])
    return picks
