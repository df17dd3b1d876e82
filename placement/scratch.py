"""A layout from scratch: benefit curves, knapsack, packing."""

from __future__ import annotations

import numpy as np

from placement.benefit import curves, menu
from placement.initial import check_fits
from placement.knapsack import choose
from placement.pack import pack, replica_counts
from placement.problem import Problem
from placement.types import Bools, Floats, Ints


def from_scratch(problem: Problem, cases: Floats) -> Bools:
    """Curves, knapsack, packing."""
    fleet, load, present = problem.fleet, problem.load, problem.present
    budget = np.where(problem.staying, fleet.budget_bytes, 0)
    layers, experts = load.shape
    groups = int(problem.staying.sum())
    singles = present.sum(1)
    check_fits(fleet, int((singles * fleet.expert_bytes).sum()))
    spare = int(budget.sum() - (singles * fleet.expert_bytes).sum())
    if problem.config.budget_bytes is not None:
        spare = min(spare, problem.config.budget_bytes)
    most = int(min(max(2 * spare // max(int(fleet.expert_bytes.sum()), 1), 1), 2 * groups))
    counts = menu(len(fleet.groups), layers, experts, most) if spare > 0 else np.zeros(1, np.int64)
    caps = np.stack([_caps(problem, budget, singles + k) for k in counts])
    time = curves(load, cases.transpose(1, 0, 2), present, caps, problem.rate, problem.base, counts)
    thin = np.arange(0, time.shape[1], max(1, time.shape[1] // 32))
    picks = choose(time[:, thin], thin[None, :] * fleet.expert_bytes[:, None], spare)
    extra = thin[picks]
    copies = replica_counts(load, extra, present, groups)
    caps = _caps(problem, budget, singles + extra)
    return pack(load, copies, caps, problem.rate)


def _caps(problem: Problem, budget: Ints, wanted: Ints) -> Ints:
    """Most replicas each group takes of each layer, int64 [L, G], within the group's bytes.

    A layer's replicas divide over the groups as their bytes do; rounding goes by largest
    remainder, so that a layer's caps hold what it wants.
    """
    size = problem.size
    total = int((wanted * size).sum())
    part = budget / max(float(budget.sum()), 1.0)
    fill = max(float(budget.sum()) / max(total, 1), 1.0)
    exact = wanted[:, None] * part[None, :] * min(fill, 4.0)
    caps: Ints = np.floor(exact).astype(np.int64)
    left = budget - (caps * size[:, None]).sum(0)
    order = np.argsort(-(exact - caps), axis=1, kind="stable")
    for layer in range(len(size)):
        short = int(wanted[layer] - caps[layer].sum())
        for group in order[layer].tolist():
            if short <= 0:
                break
            if left[group] >= size[layer]:
                caps[layer, group] += 1
                left[group] -= size[layer]
                short -= 1
        while short > 0 and (left >= size[layer]).any():
            group = int(left.argmax())
            caps[layer, group] += 1
            left[group] -= size[layer]
            short -= 1
    return caps
