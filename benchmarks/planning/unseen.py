"""Do the planner's settings hold on loads and fleets they were not chosen on?

    python -m benchmarks.planning.unseen --traces DIR [--only NAME] [--settings]

Other synthetic seeds, the traces' requests mixed as many at once, in other windows, halves of
traces; 4 and 16 groups; other mixes of speeds. Each case: EPLB with speeds, the plan, and the plan
with a quarter of the copies, next window, per-batch split. --settings compares the settings with
others on every case instead. Quality only: nothing here depends on timing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planning.eplb import eplb
from benchmarks.planning.score import STEPS, by_split, make_fleet
from benchmarks.planning.traces import (
    FAMILIES,
    Trace,
    parser_of,
    r1_like,
    synthetic_family,
    trace_of,
)
from benchmarks.report import table
from placement import problem, score
from placement.forecast import Forecaster
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan
from placement.types import Fleet

SETTINGS: dict[str, tuple[Any, str, Any]] = {
    "as they are": (None, "", None),
    "no polishing": (None, "polish", 0),
    "three times the polishing": (None, "polish", 108),
    "polishing for 2 margins": (problem, "_DEAR", 2.0),
    "no scenarios from parts": (None, "parts", False),
    "less of the norm in the score": (score, "SOFT", 0.25),
}


def main() -> None:
    parser = parser_of(__doc__, "cases")
    parser.add_argument("--settings", action="store_true")
    args = parser.parse_args()
    rows = []
    for name, make in cases(args.traces).items():
        if args.only not in name:
            continue
        trace, kind = make()
        row = {"case": name} | (compared(trace, kind) if args.settings else judged(trace, kind))
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps(rows))


# -- cases -----------------------------------------------------------------------------------


def cases(folder: Path) -> dict[str, Callable[[], tuple[Trace, str]]]:
    """Name -> how to make (trace, kind of fleet)."""
    out: dict[str, Callable[[], tuple[Trace, str]]] = {}
    for prefix, few in (("dsv2lite", 4), ("gptoss20b", 16)):
        for seed in (1, 2):
            name = f"{prefix}, all requests, {few} at once, order {seed}"
            out[name] = lambda p=prefix, n=few, s=seed: (mixed(folder, p, n, s), "mixed")
        name = f"{prefix}, all requests one by one, order 3"
        out[name] = lambda p=prefix: (mixed(folder, p, 1, 3), "mixed")
    half = FAMILIES["gptoss20b"][1] // 2
    out["gptoss20b_mmlu_pro_test, half windows"] = lambda: (
        named(folder, "gptoss20b_mmlu_pro_test", half),
        "mixed",
    )
    out["gptoss20b_tulu3_persona_if, windows of 160"] = lambda: (
        named(folder, "gptoss20b_tulu3_persona_if", 160),
        "mixed",
    )
    out["dsv2lite_esft_law, second half, half windows"] = lambda: (
        named(folder, "dsv2lite_esft_law", 512, part=slice(4163, None)),
        "mixed",
    )
    for name in ("dsv2lite_esft_summary", "gptoss20b_mmlu_dev"):
        for groups in (4, 16):
            out[f"{name}, {groups} groups"] = lambda n=name, g=groups: (
                replace(named(folder, n), groups=g),
                "mixed",
            )
        for kind in ("ladder", "10:1"):
            out[f"{name}, {kind}"] = lambda n=name, k=kind: (named(folder, n), k)
    for seed in (11, 12, 13):
        out[f"synthetic 26 x 64, seed {seed}"] = lambda s=seed: (
            synthetic_family("synthetic", 26, 64, 6144, s, 10**7),
            "mixed",
        )
    for seed in (1, 2):
        out[f"R1-like, seed {seed}"] = lambda s=seed: (r1_like(windows=8, seed=s), "mixed")
    return out


def named(folder: Path, name: str, tokens: int = 0, part: slice = slice(None)) -> Trace:
    experts, usual, size = FAMILIES[name.split("_")[0]]
    ids = np.load(folder / f"{name}.npz")["ids"][part]
    return trace_of(name, ids, experts, tokens or usual, size)


def mixed(folder: Path, prefix: str, at_once: int, seed: int) -> Trace:
    """All requests of a family's files in another order, `at_once` at a time in turn."""
    requests = []
    for path in sorted(folder.glob(f"{prefix}*.npz")):
        file = np.load(path)
        requests += np.split(file["ids"], file["offsets"][1:-1])
    waiting = [requests[i] for i in np.random.default_rng(seed).permutation(len(requests))]
    running: list[tuple[np.ndarray, int]] = []
    rows = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append((waiting.pop(), 0))
        rows += [ids[at] for ids, at in running]
        running = [(ids, at + 1) for ids, at in running if at + 1 < len(ids)]
    experts, tokens, size = FAMILIES[prefix]
    return trace_of(prefix, np.stack(rows), experts, tokens, size)


# -- judging ---------------------------------------------------------------------------------


def judged(trace: Trace, kind: str) -> dict[str, Any]:
    """As the main benchmark asks: against EPLB with speeds, and with a quarter of the copies."""
    fleet, slots = make_fleet(trace, kind)
    fast = followed_by_eplb(trace, fleet, slots)
    plan, few = followed(trace, fleet), followed(trace, fleet, quarter=True)
    asked = min(1.25 * fast, fast + 0.4 * (1 - fast))
    return {
        "windows": len(trace.windows),
        "EPLB with speeds": round(fast, 3),
        "this plan": round(plan, 3),
        "asked": round(asked, 3),
        "reached": "yes" if plan >= asked else "NO",
        "a quarter of the copies": round(few, 3),
        "points lost": round(100 * (plan - few), 1),
    }


def compared(trace: Trace, kind: str) -> dict[str, Any]:
    """Points that other settings gain (or lose), all copies and a quarter of them."""
    fleet, _ = make_fleet(trace, kind)
    out: dict[str, Any] = {}
    base: list[float] = []
    for name, (module, key, value) in SETTINGS.items():
        polish = value if key == "polish" else PlanConfig().polish
        told = replace(trace, parts=None) if key == "parts" else trace
        with _set(module, key, value):
            found = [followed(told, fleet, quarter, polish) for quarter in (False, True)]
        base = base or found
        gains = [100 * (a - b) for a, b in zip(found, base, strict=True)]
        out[name] = " / ".join(f"{v:.3f}" for v in found)
        if name != "as they are":
            out[name] = " / ".join(f"{gain:+.1f}" for gain in gains)
    return out


@contextmanager
def _set(module: Any, key: str, value: Any) -> Iterator[None]:
    if module is None:
        yield
        return
    usual = getattr(module, key)
    setattr(module, key, value)
    try:
        yield
    finally:
        setattr(module, key, usual)


def followed(trace: Trace, fleet: Fleet, quarter: bool = False, polish: int | None = None) -> float:
    """Balance of delta plans from window to window, each scored on the next."""
    few = int(fleet.expert_bytes.sum()) * len(fleet.groups) // 4 if quarter else None
    config = PlanConfig(budget_bytes=few)
    if polish is not None:
        config = replace(config, polish=polish)
    speed = np.array([g.speed for g in fleet.groups])
    forecaster, average, now = Forecaster(*trace.windows.shape[1:]), None, None
    ideal = busy = 0.0
    for i, window in enumerate(trace.windows[:-1]):
        forecaster.update(window, None if trace.parts is None else trace.parts[i])
        average = window * 1.0 if average is None else 0.5 * average + 0.5 * window
        if i == 0:
            continue
        step_s = float(average.sum() / fleet.pair_rate.sum())
        forecast = forecaster.forecast().scaled(1 / step_s)
        config = replace(config, horizon_s=STEPS * step_s)
        if now is None:
            plan = full_plan(forecast, fleet, replace(config, rounds=40))
        else:
            plan = delta_plan(forecast, fleet, now, config)
        now = plan.placement
        ideal += float(trace.windows[i + 1].sum() / speed.sum())
        busy += by_split(now.resident, trace.windows[i + 1], speed)
    return ideal / busy


def followed_by_eplb(trace: Trace, fleet: Fleet, slots: int) -> float:
    """The same of EPLB with speeds, every window, with the per-batch split."""
    speed = np.array([g.speed for g in fleet.groups])
    average, ideal, busy = None, 0.0, 0.0
    for window, later in zip(trace.windows[:-1], trace.windows[1:], strict=True):
        first = average is None
        average = window * 1.0 if average is None else 0.5 * average + 0.5 * window
        if first:
            continue
        share = eplb(average, slots, len(speed), speed)
        ideal += float(later.sum() / speed.sum())
        busy += by_split(share > 0, later, speed)
    return ideal / busy


if __name__ == "__main__":
    main()
