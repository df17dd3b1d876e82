"""Would moving help? The plan that would be made now, weighed and thrown away.

`Reconciler.basis` gives what a plan starts from, `dry_run` plans from it. Nothing of the
reconciler changes, so the plan can be made beside it, for as long as that takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.dwell import Held
from placement.errors import PlacementError
from placement.explain import explain
from placement.forecast import Forecast
from placement.plan import Plan, PlanConfig
from placement.planner import loading_s, make_plan
from placement.types import Bools, Fleet, Placement

_MOST_REASONS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """What a plan made now would start from.

    target    where replicas shall be, in the order of `fleet`
    measured  there was traffic to forecast from; without it `forecast` is an even load
    staying   bool [G]; the others are being drained
    limits    what a plan may cost, with the caution of the moment
    held      what dwells or was fixed by operators
    """

    fleet: Fleet
    target: Placement
    forecast: Forecast
    measured: bool
    staying: Bools
    limits: PlanConfig
    mode: str
    held: Held | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """How the plan asked for differs from what the controller would do.

    None: as configured. without: ids of groups to do without, as if they were drained.
    """

    horizon_s: float | None = None
    margin: float | None = None
    interval_bytes: int | None = None
    without: tuple[str, ...] = ()


def dry_run(basis: Basis, question: Question | None = None) -> dict[str, Any]:
    """The plan in numbers and sentences (JSON-safe). Raises `PlacementError` when there is none:
    too little memory, or a group nobody knows.

    {"helps", "answer": a sentence, "measured", "mode", "time_before", "time_after": seconds of
    work a second of traffic, summed over layers (None: experts would be missing), "gain": part of
    that time, "loads", "drops", "loaded_bytes", "loading_s", "owed", "actions", "reasons",
    "horizon_s", "margin", "without"}
    """
    asked = question or Question()
    limits = _limits(basis, asked)
    staying = basis.staying & _without(basis.fleet, asked.without)
    mode = "delta" if asked.without or not basis.measured else basis.mode
    fleet, held = basis.fleet, basis.held
    plan = make_plan(basis.forecast, fleet, basis.target, limits, mode, staying, held)
    before, after = _finite(plan.before_s), _finite(plan.after_s)
    gain = None
    if basis.measured and before is not None and after is not None and before > 0:
        gain = round((before - after) / before, 6)
    helps = plan.mode != "keep" and bool(plan.changes) and basis.measured
    took_s = loading_s(plan, fleet) if plan.loads.any() else 0.0
    return {
        "helps": helps,
        "answer": _sentence(plan, gain, took_s, basis.measured),
        "measured": basis.measured,
        "mode": plan.mode,
        "time_before": before,
        "time_after": after,
        "gain": gain,
        "loads": int(plan.loads.sum()),
        "drops": int(plan.drops.sum()),
        "loaded_bytes": plan.loaded_bytes,
        "loading_s": round(took_s, 4),
        "owed": len(plan.owed),
        "actions": [
            {
                "kind": change.kind,
                "layer": change.layer,
                "expert": change.expert,
                "source": fleet.ids[change.source],
                "target": fleet.ids[change.target],
                "bytes": change.loaded_bytes,
                "gain_s": round(change.gain * limits.horizon_s, 6),
                "price_s": round(change.price * limits.horizon_s, 6),
            }
            for change in plan.changes
        ],
        "reasons": explain(plan, fleet, most=_MOST_REASONS),
        "horizon_s": limits.horizon_s,
        "margin": limits.margin,
        "without": sorted(asked.without),
    }


def _limits(basis: Basis, asked: Question) -> PlanConfig:
    limits = basis.limits if basis.measured else replace(basis.limits, rounds=0, polish=0)
    named = ("horizon_s", "margin", "interval_bytes")
    given = {n: getattr(asked, n) for n in named if getattr(asked, n) is not None}
    return replace(limits, **given)


def _without(fleet: Fleet, names: tuple[str, ...]) -> Bools:
    unknown = sorted(set(names) - set(fleet.ids))
    if unknown:
        known = ", ".join(fleet.ids)
        raise PlacementError(f"there is no group {unknown[0]!r}; there are {known}")
    return np.array([group not in names for group in fleet.ids], np.bool_)


def _finite(seconds: float) -> float | None:
    return round(seconds, 9) if np.isfinite(seconds) else None


def _sentence(plan: Plan, gain: float | None, took_s: float, measured: bool) -> str:
    brought = (
        f"{int(plan.loads.sum())} replicas loaded ({plan.loaded_bytes / 1e6:.4g} MB, "
        f"{took_s:.2f} s), {int(plan.drops.sum())} dropped"
    )
    if plan.owed and not plan.changes:
        then = "" if gain is None else f"; the layers' time changes by {-gain:+.1%}"
        return f"it has to be, for what is owed and not for gain: {brought}{then}"
    if not measured:
        return "nothing can be weighed: no traffic has been counted yet"
    if plan.mode == "keep" or not plan.changes:
        return "no: nothing gains more than its bytes and the margin"
    less = "" if gain is None else f"{gain:.1%} less time in the layers for "
    return f"yes: {less}{brought}"
