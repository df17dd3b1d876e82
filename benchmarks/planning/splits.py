"""The per-batch split: microseconds, and the gap to the LP optimum."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy.optimize import linprog

from benchmarks.report import table
from placement.pack import pack, replica_counts
from placement.split import LayerSplit


def split_times() -> list[dict[str, Any]]:
    """Microseconds and gap to the LP of the per-batch split."""
    rng = np.random.default_rng(0)
    rows = []
    for experts, groups, extra in ((64, 8, 0), (64, 8, 8), (64, 8, 64), (256, 32, 32)):
        for pairs in (32 * 6, 512 * 6):
            seconds, gaps = [], []
            for case in range(12):
                speed = np.ones(groups)
                if case % 2:
                    speed[groups // 2 :] = 0.5
                weight = rng.lognormal(0, 1, experts)
                copies = replica_counts(
                    weight[None], np.array([extra]), np.ones((1, experts), np.bool_), groups
                )
                caps = np.full((1, groups), -(-(experts + extra) // groups))
                resident = pack(weight[None], copies, caps, speed)[0]
                layer = LayerSplit(resident, speed, np.zeros(groups), np.zeros(groups))
                for batch in range(8):
                    part = weight * rng.lognormal(0, 0.3, experts)
                    counts = rng.multinomial(pairs, part / part.sum())
                    times = []
                    for _ in range(3):
                        started = time.perf_counter()
                        cut = layer.split(counts)
                        times.append(time.perf_counter() - started)
                    seconds.append(min(times))
                    if batch < 2:
                        best = lp_optimum(resident, counts, speed)
                        gaps.append((cut.sum(0) / speed).max() / best - 1)
            rows.append(
                {
                    "experts": experts,
                    "groups": groups,
                    "extra": extra,
                    "pairs": pairs,
                    "median us": round(float(np.median(seconds)) * 1e6, 1),
                    "mean us": round(float(np.mean(seconds)) * 1e6, 1),
                    "mean gap": round(float(np.mean(gaps)), 5),
                    "max gap": round(float(np.max(gaps)), 4),
                }
            )
    print("\nper-batch split, one layer (whole tokens; gap to the LP, which may cut tokens)")
    print(table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
    return rows


def lp_optimum(resident: np.ndarray, counts: np.ndarray, speed: np.ndarray) -> float:
    where = np.argwhere(resident)
    equal = np.zeros((len(counts), len(where) + 1))
    upper = np.zeros((len(speed), len(where) + 1))
    for i, (expert, group) in enumerate(where):
        equal[expert, i], upper[group, i] = 1, 1 / speed[group]
    upper[:, -1] = -1
    cost = np.append(np.zeros(len(where)), 1.0)
    found = linprog(cost, A_ub=upper, b_ub=np.zeros(len(speed)), A_eq=equal, b_eq=counts)
    return float(found.fun)
