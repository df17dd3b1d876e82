"""How little may be lost with few copies: what layouts reach that know more than any planner can.

    python -m benchmarks.planning.bounds --traces DIR [--only NAME]

On the mixed fleet, for a quarter of EPLB's extra copies and for all of them:

  window   a layout for each window that knows just that window
  trace    one layout for all scored windows of the trace, all known
  others   for each window a layout that knows all others, later ones too, but not that one

For every layer and every number of extra copies a layout is searched for (many small changes at
random, moving costs nothing, a group's memory is not limited); an exact knapsack
then deals the copies out over the layers. No proven bound, but more than a planner may have: it
has limits of memory, knows only the past, and pays for moves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planning.score import make_fleet
from benchmarks.planning.traces import Trace, load_traces, r1_like
from benchmarks.report import table
from placement.knapsack import choose
from placement.layout import Layout
from placement.pack import pack, replica_counts
from placement.polish import Polisher
from placement.pour import host_lists, pour

EXTRA = (0, 1, 2, 3, 4, 6, 8, 10)  # copies beyond one of each, on 8 groups
ROUNDS = 100  # of 32 small changes for every layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[3] / "shared" / "traces"
    parser.add_argument("--traces", type=Path, default=beside)
    parser.add_argument("--only", default="", help="traces whose name contains this")
    parser.add_argument("--ways", default="window,trace,others")
    args = parser.parse_args()
    rows = []
    for trace in [*load_traces(args.traces), r1_like()]:
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
    scored = trace.windows[2:].astype(np.float64)
    ideal = float(scored.sum() / speed.sum())
    each = len(speed)  # EPLB's extra copies of a layer
    busy = np.zeros(2)
    if way == "trace":
        busy += of_budgets(scored, scored, speed, each)
    for i, window in enumerate(scored):
        if way == "window":
            busy += of_budgets(window[None], window[None], speed, each)
        if way == "others":
            known = np.delete(trace.windows, i + 2, 0).astype(np.float64)
            busy += of_budgets(known, window[None], speed, each)
    few, full = (round(ideal / b, 4) for b in busy)
    return {"a quarter": few, "all": full, "points lost": round(100 * (full - few), 1)}


def of_budgets(known: np.ndarray, scored: np.ndarray, speed: np.ndarray, each: int) -> np.ndarray:
    """Slowest groups' time, summed over layers and windows, for a quarter of the copies and all.

    Layouts are made for the windows `known` and timed on `scored`, [W, L, E]; the copies are
    dealt out by what is known.
    """
    layers = known.shape[1]
    counts = [k * each // 8 for k in EXTRA]
    guess, truth = np.zeros((2, layers, len(counts)))
    for i, extra in enumerate(counts):
        guess[:, i], truth[:, i] = best(known, scored, speed, extra)
    size = np.array(counts)[None, :] * np.ones((layers, 1), np.int64)
    out = []
    for budget in (layers * each // 4, layers * each):
        pick = choose(guess, size.astype(np.int64), budget)
        out.append(float(truth[np.arange(layers), pick].sum()))
    return np.array(out)


def best(
    known: np.ndarray, scored: np.ndarray, speed: np.ndarray, extra: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean time of each layer on `known`, summed time on `scored`), float64 [L] each."""
    load = np.ascontiguousarray(known.transpose(1, 0, 2))  # [L, M, E]
    layers, _, experts = load.shape
    groups = len(speed)
    mean = load.mean(1)
    copies = replica_counts(mean, np.full(layers, extra), np.ones_like(mean, bool), groups)
    caps = np.full((layers, groups), experts)
    work = Polisher(_free(load, pack(mean, copies, caps, speed), speed))
    work.run(ROUNDS, rests=ROUNDS, trades=False)
    guess = _time(load, work.resident, speed).mean(1)
    return guess, _time(scored.transpose(1, 0, 2), work.resident, speed).sum(1)


def _time(load: np.ndarray, resident: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Time of the slowest group, [L, M]."""
    hosts, copies = host_lists(resident)
    zero = np.zeros(len(speed))
    return pour(load, hosts, copies, speed, zero, sweeps=6).level.max(2)


def _free(load: np.ndarray, resident: np.ndarray, speed: np.ndarray) -> Layout:
    groups = len(speed)
    return Layout(
        load=load,
        resident=resident,
        allowed=np.ones(groups, bool),
        room=np.full(groups, 2**40),
        size=np.ones(len(load), np.int64),
        rate=speed,
        base=np.zeros(groups),
        price=np.zeros(groups),
        margin=0.0,
    )


if __name__ == "__main__":
    main()
