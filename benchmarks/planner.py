"""The placement planner against EPLB, on traces: plan on past windows, score on the next one.

    python -m benchmarks.planner [--traces DIR] [--quick] [--only NAME]

Prints a table for every trace and fleet, every row, also those lost; the last line is JSON.
Time-balancedness: sum over layers of tokens / summed speed, over the slowest group's tokens /
speed; 1 is no straggler. "net" charges a replan's loads (10 GB/s a group) to 100 steps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog

from benchmarks.planning.check import check_baseline
from benchmarks.planning.eplb import eplb
from benchmarks.planning.loop import Groups
from benchmarks.planning.score import (
    PAIRS_PER_S,
    STEPS,
    Costs,
    Tally,
    batch_time,
    by_share,
    by_split,
    make_fleet,
    verify,
)
from benchmarks.planning.traces import FAMILIES, Trace, load_traces, r1_like, synthetic_family
from benchmarks.report import finish, table
from placement.forecast import Forecast, Forecaster, forecast_windows
from placement.initial import place_at_start
from placement.pack import pack, replica_counts
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan
from placement.reconcile import regroup
from placement.split import LayerSplit
from placement.types import Fleet, GroupSpec, Placement

WARM_UP = 2
FLEETS = ("equal", "mixed", "straggler", "memory 2:1", "one lost")
BATCH_TOKENS = (1, 32, 512)
TOP_K = {"dsv2lite": 6, "gptoss20b": 4, "R1-like": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    parser.add_argument("--traces", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--quick", action="store_true", help="equal and mixed fleets only, no R1")
    parser.add_argument("--only", default="", help="traces whose name contains this")
    parser.add_argument("--parts", default="traces,split,time,loop")
    args = parser.parse_args()
    parts = args.parts.split(",")
    check_baseline()
    groups = Groups([1, 1, 3])
    try:
        costs = groups.measure(0)
        print("\nmeasured on real group processes with the product's kernels, demo checkpoint:")
        for who, found in (("CPU time", costs), ("the group itself, wall clock", groups.says(0))):
            print(
                f"  alpha {found.alpha_s * 1e6:.1f} us, {found.pair_s * 1e6:.2f} us a pair, "
                f"gamma {found.gamma_s * 1e6:.1f} us an expert ({who})"
            )
        results: dict[str, Any] = {"costs": vars(costs)}
        if "loop" in parts:
            results["loop"] = closed_loop(groups)
    finally:
        groups.close()
    if "split" in parts:
        results["split"] = split_times()
    if "time" in parts:
        results["planning_s"] = planning_times()
    if "traces" in parts:
        results["traces"] = run_traces(args, costs)
    shown = {k: str(v) for k, v in vars(args).items() if k != "traces"}
    finish("planner", shown, results)


# -- traces ----------------------------------------------------------------------------------


def run_traces(args: argparse.Namespace, costs: Costs) -> list[dict[str, Any]]:
    traces = [] if args.traces is None else load_traces(args.traces)
    if not traces:
        print("no trace files (--traces DIR): SYNTHETIC lognormal loads of the same shapes instead")
        layers = {"dsv2lite": 26, "gptoss20b": 24}
        traces = [
            synthetic_family(name, layers[name], e, tokens * TOP_K[name], i, size)
            for i, (name, (e, tokens, size)) in enumerate(FAMILIES.items())
        ]
    if not args.quick:
        traces.append(r1_like())
    results = []
    for trace in traces:
        if args.only not in trace.name:
            continue
        for kind in FLEETS[:2] if args.quick else FLEETS:
            results.append(run_case(trace, kind, costs))
    return results


def run_case(trace: Trace, kind: str, costs: Costs) -> dict[str, Any]:
    started = time.process_time()
    windows = trace.windows
    fleet, slots = make_fleet(trace, kind)
    quarter, _ = make_fleet(trace, kind, extra=0.25)
    top_k = next(k for name, k in TOP_K.items() if trace.name.startswith(name))
    lost_at = len(windows) // 2 if kind == "one lost" else len(windows)
    runs = Runs(fleet, quarter, slots, windows)
    for i in range(len(windows) - 1):
        runs.see(windows[i])
        if i < WARM_UP - 1:
            continue
        if i + 1 == lost_at:
            runs.lose(len(fleet.groups) - 1)
        runs.score(windows[i + 1], costs, top_k)
    rows = [runs.row(tally) for tally in runs.tallies.values()]
    head = ["planner", "no split", "split", "net", "moves", "extra"]
    head += [f"us@{n}" for n in BATCH_TOKENS]
    print(f"\n{trace.name}, {kind} fleet, {len(trace.windows)} windows, {trace.groups} groups")
    print(table(head, [[row[h] for h in head] for row in rows]))
    seconds = time.process_time() - started
    targets = reach({row["planner"]: row for row in rows}, kind)
    for line in targets:
        print(f"  {line}")
    print(f"  ({seconds:.0f} CPU s)", flush=True)
    return {"trace": trace.name, "fleet": kind, "rows": rows, "targets": targets}


def reach(rows: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """The figures to reach, each with yes or NO."""

    def verdict(text: str, have: float, want: float) -> str:
        return f"{'yes' if have >= want else 'NO '} {text}: {have:.3f} against {want:.3f}"

    plain, fast, delta = rows["EPLB"], rows["EPLB speeds"], rows["delta"]
    out = []
    if kind == "mixed":
        out.append(verdict("2.0 x plain EPLB", delta["split"], 2 * plain["no split"]))
        base = fast["split"]
        want = min(1.25 * base, base + 0.4 * (1 - base))
        out.append(verdict("EPLB with speeds and split, 1.25 x or 40 %", delta["split"], want))
        low = rows["delta, 1/4 replicas"]
        out.append(verdict("a quarter of EPLB's replicas", low["split"], delta["split"] - 0.02))
    if kind == "equal":
        out.append(
            verdict("EPLB less half a point (split)", delta["split"], plain["split"] - 0.005)
        )
        out.append(
            verdict("EPLB less half a point (none)", delta["no split"], plain["no split"] - 0.005)
        )
        ratio = plain["moves"] / max(delta["moves"], 1e-9)
        out.append(verdict("20 x fewer moves", min(ratio, 999.0), 20.0))
        out.append(verdict("above EPLB net of moves", delta["net"], plain["net"]))
    times = [f"us@{n}" for n in BATCH_TOKENS]
    worse = [t for t in times if delta[t] > fast[t] * 1.005]
    out.append(f"{'NO ' if worse else 'yes'} not slower than EPLB with speeds in time {worse}")
    return out


class Runs:
    """All planners side by side on one trace and fleet."""

    def __init__(self, fleet: Fleet, quarter: Fleet, slots: int, windows: np.ndarray) -> None:
        self.fleet, self.quarter, self.slots = fleet, quarter, slots
        self.forecaster = Forecaster(*windows.shape[1:])
        self.average: np.ndarray | None = None
        self.seen = 0
        self.tallies: dict[str, Tally] = {}
        self.fixed: dict[str, np.ndarray] = {}
        self.current: dict[str, Placement] = {}
        self.no_split: dict[str, Tally] = {}
        self.seconds: dict[str, list[float]] = {}

    def see(self, window: np.ndarray) -> None:
        self.forecaster.update(window)
        self.seen += 1
        old = self.average
        self.average = window * 1.0 if old is None else 0.5 * old + 0.5 * window

    def lose(self, group: int) -> None:
        ids = self.fleet.ids
        self.fleet = _without(self.fleet, group)
        self.quarter = _without(self.quarter, group)
        for name, placement in self.current.items():
            self.current[name] = regroup(placement, ids, self.fleet.ids)
        self.fixed = {}

    def score(self, window: np.ndarray, costs: Costs, top_k: int) -> None:
        speed = np.array([g.speed for g in self.fleet.groups])
        ideal = float(window.sum() / speed.sum())
        for name, (resident, share) in self.plans(window, speed).items():
            room = self.quarter if "1/4 memory" in name else self.fleet
            if not name.startswith("EPLB") or self.fits(resident):
                verify(resident, share, room)
            split = by_split(resident, window, speed)
            tally = self.tallies.setdefault(name, Tally(name=name))
            tally.add(resident, self.fleet, split, ideal)
            plain = self.no_split.setdefault(name, Tally(name=name))
            plain.add(resident, self.fleet, by_share(share, window, speed), ideal)
            for tokens in BATCH_TOKENS:
                for draw in range(6 if tokens == 1 else 1):
                    same = np.random.default_rng([self.seen, draw])  # the same for all planners
                    seconds = batch_time(
                        resident, window, speed, costs, tokens * top_k, same, True, share
                    )
                    tally.times.setdefault(tokens, []).append(seconds)

    def fits(self, resident: np.ndarray) -> bool:
        held = np.einsum("leg,l->g", resident.astype(np.int64), self.fleet.expert_bytes)
        return bool((held <= [g.memory_bytes for g in self.fleet.groups]).all())

    def plans(
        self, window: np.ndarray, speed: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        assert self.average is not None
        out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        groups = len(speed)
        step_s = float(self.average.sum() / speed.sum()) / PAIRS_PER_S
        layers, experts = window.shape
        if "contiguous" not in self.fixed:
            contiguous = np.zeros((layers, experts, groups))
            contiguous[:, np.arange(experts), np.arange(experts) * groups // experts] = 1
            self.fixed["contiguous"] = contiguous
            self.fixed["EPLB once"] = eplb(self.average, self.slots, groups)
        for name, share in self.fixed.items():
            out[name] = share > 0, share
        for name, speeds in (("EPLB", None), ("EPLB speeds", speed)):
            share = eplb(self.average, self.slots, groups, speeds)
            out[name] = share > 0, share
        forecast = self.forecaster.forecast().scaled(1 / step_s)
        config = PlanConfig(horizon_s=STEPS * step_s)
        few = int(self.fleet.expert_bytes.sum()) * groups // 4  # a quarter of EPLB's extra slots
        for name, fleet, budget in (
            ("delta", self.fleet, None),
            ("delta, 1/4 replicas", self.fleet, few),
            ("delta, 1/4 memory", self.quarter, None),
        ):
            now = self.current.get(name)
            config = replace(config, budget_bytes=budget)
            if now is None:
                plan = full_plan(forecast, fleet, replace(config, rounds=40))
            else:
                plan = delta_plan(forecast, fleet, now, config)
            self.current[name] = plan.placement
            out[name] = plan.placement.resident, plan.placement.share
        config = replace(config, budget_bytes=None)
        plan = full_plan(forecast, self.fleet, config)
        out["full every window"] = plan.placement.resident, plan.placement.share
        truth = window / step_s
        known = Forecast(load=truth, scenarios=truth[None], spread=truth * 0)
        plan = full_plan(known, self.fleet, replace(config, rounds=40))
        out["oracle"] = plan.placement.resident, plan.placement.share
        return out

    def row(self, tally: Tally) -> dict[str, Any]:
        row: dict[str, Any] = {
            "planner": tally.name,
            "no split": round(self.no_split[tally.name].balance, 3),
            "split": round(tally.balance, 3),
            "net": round(tally.net, 3),
            "moves": round(tally.moved, 1),
            "extra": round(float(np.mean(tally.extra)), 1),
        }
        for tokens in BATCH_TOKENS:
            row[f"us@{tokens}"] = round(float(np.mean(tally.times[tokens])) * 1e6, 1)
        return row


def _without(fleet: Fleet, group: int) -> Fleet:
    left = tuple(g for i, g in enumerate(fleet.groups) if i != group)
    return replace(fleet, groups=left)


# -- the split -------------------------------------------------------------------------------


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


# -- planning time ---------------------------------------------------------------------------


def planning_times() -> list[dict[str, Any]]:
    """CPU seconds of a plan at 61 layers x 256 experts, warm, best of three."""
    rows = []
    for groups in (8, 64, 512):
        trace = r1_like(windows=5, groups=groups)
        windows = np.concatenate([trace.windows, trace.windows[:, :3]], 1)  # 61 layers
        trace = replace(trace, windows=windows)
        fleet, _ = make_fleet(trace, "mixed")
        step_s = float(windows[0].sum() / fleet.pair_rate.sum())
        config = PlanConfig(horizon_s=STEPS * step_s)
        first = forecast_windows(windows[:4]).scaled(1 / step_s)
        later = forecast_windows(windows).scaled(1 / step_s)
        plan = full_plan(first, fleet, config)
        slots = max(256 // groups, 1) + 1
        rows.append(
            {
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
    print(
        "\nplanning, 61 layers x 256 experts, CPU seconds, warm (EPLB: numpy, all layers at once)"
    )
    print(table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
    return rows


def best_of(call: Any, times: int = 3) -> float:
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return round(min(taken), 3)


# -- closed loop -----------------------------------------------------------------------------


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


if __name__ == "__main__":
    main()
