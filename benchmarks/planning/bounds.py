"""How little may be lost with few copies: what layouts reach that know more than a planner can.

    python -m benchmarks.planning.bounds --traces DIR [--only NAME] [--ways WAY,WAY]

On the mixed fleet, for a quarter of EPLB's extra copies and for all of them, next window, per-batch
split, as in the main benchmark. All plans are made from scratch, moving costs nothing:

  window    a layout for each window that knows just that window
  trace     one layout for all scored windows of the trace, all known
  others    for each window a layout that knows all others, later ones too, but not that one
  past      for each window a layout that knows the windows before it, as they were
  free      as trace, and a group's memory is not limited: for every layer and number of copies a
            layout is searched for, and an exact knapsack deals the copies out over the layers

No proven bounds (layouts are searched for), but more than a planner may have.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.planning.score import by_split, make_fleet
from benchmarks.planning.traces import Trace, load_traces, parser_of
from benchmarks.report import table
from placement.forecast import Forecast
from placement.knapsack import choose
from placement.layout import Layout
from placement.pack import pack, replica_counts
from placement.plan import PlanConfig
from placement.planner import full_plan
from placement.polish import Polisher
from placement.pour import host_lists, pour
from placement.types import Fleet

WARM_UP = 2
EXTRA = (0, 1, 2, 3, 4, 6, 8, 10)  # copies of a layer beyond one of each
ROUNDS = 100  # of polishing


def main() -> None:
    parser = parser_of(__doc__, "traces")
    parser.add_argument("--ways", default="window,trace,free,others,past")
    args = parser.parse_args()
    rows = []
    for trace in load_traces(args.traces):
        if args.only in trace.name:
            for way in args.ways.split(","):
                rows.append({"trace": trace.name, "knows": way} | reached(trace, way))
                print(json.dumps(rows[-1]), flush=True)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps(rows))


def reached(trace: Trace, way: str) -> dict[str, Any]:
    """Time-balancedness of the scored windows with both budgets."""
    fleet, _ = make_fleet(trace, "mixed")
    speed = np.array([g.speed for g in fleet.groups])
    windows = trace.windows
    scored = range(WARM_UP, len(windows))
    ideal = float(windows[WARM_UP:].sum() / speed.sum())
    out = []
    for budget in (fleet.layers * len(speed) // 4, fleet.layers * len(speed)):
        if way == "free":
            resident = unlimited(windows[WARM_UP:], speed, budget)
        elif way == "trace":
            resident = planned(windows[WARM_UP:], fleet, budget)
        busy = 0.0
        for i in scored:
            if way == "window":
                resident = planned(windows[i : i + 1], fleet, budget)
            elif way == "others":
                resident = planned(np.delete(windows, i, 0), fleet, budget)
            elif way == "past":
                resident = planned(windows[:i], fleet, budget)
            busy += by_split(resident, windows[i], speed)
        out.append(ideal / busy)
    few, full = out
    lost = round(100 * (full - few), 1)
    return {"a quarter": round(few, 3), "all": round(full, 3), "points lost": lost}


def planned(known: np.ndarray, fleet: Fleet, copies: int) -> np.ndarray:
    """The planner's layout for the windows `known` [W, L, E], all equally likely: [L, E, G]."""
    step_s = float(known.sum() / len(known) / fleet.pair_rate.sum())
    load = known / step_s
    forecast = Forecast(load=load.mean(0), scenarios=load, spread=np.zeros(load.shape[1:]))
    config = PlanConfig(
        rounds=60,
        polish=ROUNDS,
        margin=0.0,
        budget_bytes=copies * int(fleet.expert_bytes[0]),
    )
    return full_plan(forecast, fleet, config).placement.resident


def unlimited(known: np.ndarray, speed: np.ndarray, copies: int) -> np.ndarray:
    """The same without limits of memory: layers searched one by one, copies dealt out exactly."""
    layers = known.shape[1]
    counts = np.array(EXTRA) * len(speed) // 8
    found = [best(known.astype(np.float64), speed, int(extra)) for extra in counts]
    time = np.stack([seconds for seconds, _ in found], 1)  # [L, K]
    size = np.tile(counts.astype(np.int64), (layers, 1))
    pick = choose(time, size, copies)
    return np.stack([found[k][1][layer] for layer, k in enumerate(pick.tolist())])


def best(known: np.ndarray, speed: np.ndarray, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean time of each layer [L], layout [L, E, G]) with `extra` copies beyond one of each."""
    load = np.ascontiguousarray(known.transpose(1, 0, 2))  # [L, M, E]
    layers, _, experts = load.shape
    groups = len(speed)
    mean = load.mean(1)
    copies = replica_counts(mean, np.full(layers, extra), np.ones_like(mean, bool), groups)
    layout = Layout(
        load=load,
        resident=pack(mean, copies, np.full((layers, groups), experts), speed),
        allowed=np.ones(groups, bool),
        room=np.full(groups, 2**40),
        size=np.ones(layers, np.int64),
        rate=speed,
        base=np.zeros(groups),
        price=np.zeros(groups),
        margin=0.0,
    )
    Polisher(layout).run(ROUNDS, rests=ROUNDS, trades=False)
    hosts, copies = host_lists(layout.resident)
    level = pour(load, hosts, copies, speed, np.zeros(groups), sweeps=6).level
    return level.max(2).mean(1), layout.resident


if __name__ == "__main__":
    main()
