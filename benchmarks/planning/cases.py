"""All planners side by side on one trace and fleet, and the figures to reach."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.planning.eplb import eplb
from benchmarks.planning.score import (
    PAIRS_PER_S,
    STEPS,
    Costs,
    Tally,
    batch_splits,
    batch_time,
    by_share,
    by_split,
    make_fleet,
    verify,
)
from benchmarks.planning.traces import Trace
from benchmarks.report import table
from placement.forecast import Forecast, Forecaster
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan
from placement.types import Fleet, Placement
from placement.unplanned import regroup

WARM_UP = 2
BATCH_TOKENS = (1, 32, 512)
TOP_K = {"dsv2lite": 6, "gptoss20b": 4, "R1-like": 8}


def run_case(trace: Trace, kind: str, costs: Costs) -> dict[str, Any]:
    started = time.process_time()
    windows = trace.windows
    fleet, slots = make_fleet(trace, kind)
    quarter, _ = make_fleet(trace, kind, extra=0.25)
    top_k = next(k for name, k in TOP_K.items() if trace.name.startswith(name))
    lost_at = len(windows) // 2 if kind == "one lost" else len(windows)
    runs = Runs(fleet, quarter, slots, windows)
    for i in range(len(windows) - 1):
        runs.see(windows[i], None if trace.parts is None else trace.parts[i])
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
    plan_s = round(float(np.mean(runs.plan_s)), 3) if runs.plan_s else None
    print(f"  ({seconds:.0f} CPU s, a delta plan {plan_s})", flush=True)
    case = {"trace": trace.name, "fleet": kind, "rows": rows, "targets": targets}
    return case | {"delta_plan_s": plan_s}


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
        self.plan_s: list[float] = []  # CPU seconds of each delta plan, full budget

    def see(self, window: np.ndarray, parts: np.ndarray | None) -> None:
        self.forecaster.update(window, parts)
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
            splits = batch_splits(resident, speed, costs)
            for tokens in BATCH_TOKENS:
                for draw in range(6 if tokens == 1 else 1):
                    same = np.random.default_rng([self.seen, draw])  # the same for all planners
                    seconds = batch_time(splits, window, speed, costs, tokens * top_k, same)
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
                started = time.process_time()
                plan = delta_plan(forecast, fleet, now, config)
                if name == "delta":
                    self.plan_s.append(time.process_time() - started)
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
