"""How long a plan takes on one core, beside EPLB."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.planning.eplb import eplb
from benchmarks.planning.score import STEPS, make_fleet
from benchmarks.planning.traces import Trace, r1_like
from benchmarks.report import table
from placement.forecast import forecast_windows
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan

SHAPES = (  # layers, experts, groups
    (24, 32, 8),
    (26, 64, 8),
    (48, 128, 8),
    (61, 256, 8),
    (61, 256, 64),
    (61, 256, 512),
)


def planning_times() -> list[dict[str, Any]]:
    """CPU seconds of a plan, warm, best of three."""
    rows = []
    for layers, experts, groups in SHAPES:
        trace = load_of(layers, experts, groups)
        windows = trace.windows
        fleet, _ = make_fleet(trace, "mixed")
        step_s = float(windows[0].sum() / fleet.pair_rate.sum())
        config = PlanConfig(horizon_s=STEPS * step_s)
        first = forecast_windows(windows[:4]).scaled(1 / step_s)
        later = forecast_windows(windows).scaled(1 / step_s)
        plan = full_plan(first, fleet, config)
        slots = max(experts // groups, 1) + 1
        rows.append(
            {
                "layers x experts": f"{layers} x {experts}",
                "groups": groups,
                "full": best_of(lambda f=first, t=fleet, c=config: full_plan(f, t, c)),
                "delta": best_of(
                    lambda f=later, t=fleet, p=plan, c=config: delta_plan(f, t, p.placement, c)
                ),
                "EPLB": best_of(
                    lambda w=windows, s=slots, g=groups: eplb(w[-1].astype(float), s, g)
                ),
            }
        )
    print("\nplanning, mixed fleet, CPU seconds, warm (EPLB: numpy, all layers at once)")
    print(table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
    return rows


def load_of(layers: int, experts: int, groups: int) -> Trace:
    """An R1-like load in so many layers and experts."""
    trace = r1_like(windows=5, groups=groups)
    windows = np.concatenate([trace.windows, trace.windows], 1)[:, :layers, :experts]
    return replace(trace, windows=windows)


def best_of(call: Any, times: int = 3) -> float:
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return round(min(taken), 3)
