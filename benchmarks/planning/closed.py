"""Closed loop: does the time of real group processes rank the planners as the simulator does?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.planning.eplb import eplb
from benchmarks.planning.loop import Groups
from benchmarks.planning.traces import r1_like
from benchmarks.report import table
from placement.forecast import Forecaster
from placement.initial import place_at_start
from placement.planner import delta_plan, full_plan
from placement.split import LayerSplit
from placement.types import Fleet, GroupSpec


def closed_loop(groups: Groups, layers: int = 4) -> dict[str, Any]:
    """Static, EPLB with speeds and delta on three real processes, one slowed three times."""
    experts, size = groups.experts, groups.expert_bytes
    fits = [groups.measure(g) for g in range(3)]
    speed = np.array([fits[0].pair_s / fit.pair_s for fit in fits])
    trace = r1_like(windows=8, groups=3)
    windows = trace.windows[:, :layers, :experts]
    specs = tuple(
        GroupSpec(id=f"g{g}", node="n", memory_bytes=size * layers * 7, speed=float(speed[g]))
        for g in range(3)
    )
    fleet = Fleet(groups=specs, expert_bytes=np.full(layers, size), tokens_per_s=1 / fits[0].pair_s)
    alpha = np.array([fit.alpha_s for fit in fits])
    gamma = np.array([fit.gamma_s for fit in fits])
    forecaster = Forecaster(layers, experts)
    forecaster.update(windows[0])
    measured = dict.fromkeys(("static", "EPLB speeds", "delta"), 0.0)
    predicted = dict(measured)
    static = place_at_start(
        replace(fleet, groups=tuple(replace(g, speed=1.0) for g in specs)), experts=experts
    )
    current = full_plan(forecaster.forecast(), fleet).placement
    rng = np.random.default_rng(0)
    for w in range(1, len(windows) - 1):
        forecaster.update(windows[w])
        current = delta_plan(forecaster.forecast(), fleet, current).placement
        plans = {
            "static": static.resident,
            "EPLB speeds": eplb(windows[w].astype(float), 6, 3, speed) > 0,
            "delta": current.resident,
        }
        for layer in range(layers):
            weight = windows[w + 1, layer] / windows[w + 1, layer].sum()
            counts = rng.multinomial(2048, weight)
            for name, resident in plans.items():
                cut = LayerSplit(resident[layer], fleet.pair_rate, alpha, gamma).split(counts)
                predicted[name] += float(
                    (alpha + cut.sum(0) / fleet.pair_rate + gamma * (cut > 0).sum(0)).max()
                )
                measured[name] += float(np.min([groups.run(cut) for _ in range(3)], axis=0).max())
    rows = [
        [
            name,
            round(predicted[name] * 1e3, 2),
            round(measured[name] * 1e3, 2),
            round(predicted["static"] / predicted[name], 3),
            round(measured["static"] / measured[name], 3),
        ]
        for name in measured
    ]
    print(f"\nclosed loop, 3 processes, measured speeds {np.round(speed, 2).tolist()}")
    head = ["planner", "predicted ms", "measured ms", "predicted gain", "measured gain"]
    print(table(head, rows))
    order = [sorted(d, key=d.__getitem__) for d in (predicted, measured)]
    print(f"ranked alike: {'yes' if order[0] == order[1] else 'NO'}", flush=True)
    return {"speeds": speed.tolist(), "rows": rows, "ranked_alike": order[0] == order[1]}
