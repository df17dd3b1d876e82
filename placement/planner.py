"""Full and delta plans: forecast, fleet, current placement -> target placement, with reasons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.dwell import Held
from placement.errors import PlacementError
from placement.forecast import Forecast
from placement.plan import Plan, PlanConfig
from placement.pour import even_shares
from placement.problem import Problem, polish_rounds
from placement.repair import Owed, repair, thin_out
from placement.scratch import from_scratch
from placement.search import Searcher
from placement.survive import check_survives
from placement.types import Bools, Fleet, Floats, Placement, bytes_by_group

_NEAR = 1.08  # within this factor of a perfectly level fleet no full plan is tried
_POLISHED = 0.05  # polishing saves no more than this part of the time, where copies are few


def full_plan(
    forecast: Forecast,
    fleet: Fleet,
    config: PlanConfig | None = None,
    current: Placement | None = None,
    staying: Bools | None = None,
) -> Plan:
    """A plan from scratch; loading is not priced (see `make_plan`).

    forecast in pairs/s. Raises DoesNotFit when the staying groups cannot hold one of each.
    """
    config = config or PlanConfig()
    problem = Problem(forecast, fleet, config, staying)
    check_survives(fleet, problem.present, problem.staying)
    cases = problem.cases(problem.case_count())
    resident = from_scratch(problem, cases)
    owed = repair(resident, fleet, problem.present, problem.load, problem.staying)
    rounds = problem.rounds(3)
    searcher = problem.search(
        resident, cases, np.zeros(len(fleet.groups)), config.margin / 4, np.inf, rounds
    )
    return _finish("full", problem, cases, searcher, current, owed)


def delta_plan(
    forecast: Forecast,
    fleet: Fleet,
    current: Placement,
    config: PlanConfig | None = None,
    staying: Bools | None = None,
    dwelling: Held | None = None,
) -> Plan:
    """From the current placement: what is owed, then only actions that pay for their bytes.

    dwelling  copies that actions for gain leave alone
    """
    config = config or PlanConfig()
    problem = Problem(forecast, fleet, config, staying)
    _check_current(current, problem)
    check_survives(fleet, problem.present, problem.staying)
    cases = problem.cases(problem.case_count())
    resident = current.resident.copy()
    owed = repair(resident, fleet, problem.present, problem.load, problem.staying)
    if config.budget_bytes is not None:
        owed += thin_out(resident, fleet, problem.load, config.budget_bytes)
    limit = np.inf if config.interval_bytes is None else float(config.interval_bytes)
    limit -= sum(o.loaded_bytes for o in owed)  # what is owed is loaded in any case
    rounds = problem.rounds(2)
    # what is owed (a lost expert, say) is not kept waiting long by polishing
    searcher = problem.search(
        resident, cases, problem.price, config.margin, limit, rounds, dwelling, hasty=bool(owed)
    )
    return _finish("delta", problem, cases, searcher, current, owed)


def _check_current(current: Placement, problem: Problem) -> None:
    want = (*problem.load.shape, len(problem.fleet.groups))
    if current.resident.shape != want:
        raise PlacementError(
            f"the current placement has shape {current.resident.shape}, load and fleet need "
            f"{want} [layers, experts, groups]: give the placement of this fleet"
        )


def _finish(
    mode: str,
    problem: Problem,
    cases: Floats,
    searcher: Searcher,
    current: Placement | None,
    owed: list[Owed],
) -> Plan:
    resident = searcher.resident
    before = np.zeros_like(resident) if current is None else current.resident
    layer_before = np.full(len(resident), np.nan)
    if current is not None:
        known = before & problem.staying
        whole = (known.any(2) | ~problem.present).all(1)
        same = mode == "delta" and not owed  # the search started from just this
        times = searcher.first_score if same else problem.times(known, cases)
        layer_before = np.where(whole, times, np.inf)
    after = searcher.score
    loads, drops = resident & ~before, before & ~resident
    share = even_shares(problem.load, resident, problem.rate, problem.base)
    if mode == "delta" and not loads.any() and not drops.any():
        mode = "keep"
    return Plan(
        mode=mode,
        placement=Placement(resident=resident, share=share),
        before_s=float(layer_before.sum()),
        after_s=float(after.sum()),
        layer_before_s=layer_before,
        layer_after_s=after,
        loads=loads,
        drops=drops,
        loaded_bytes=int((loads.sum((1, 2)) * problem.size).sum()),
        changes=tuple(searcher.changes),
        owed=tuple(owed),
        config=problem.config,
    )


def make_plan(
    forecast: Forecast,
    fleet: Fleet,
    current: Placement | None = None,
    config: PlanConfig | None = None,
    mode: str = "auto",
    staying: Bools | None = None,
    dwelling: Held | None = None,
) -> Plan:
    """The plan to take: delta from `current`, or a full one when that wins net of all bytes.

    mode: "auto", "full" or "delta" (which needs `current`). `dwelling` holds for delta plans, and
    keeps "auto" from a full plan that would not heed it.
    """
    config = config or PlanConfig()
    if mode not in ("auto", "full", "delta"):
        raise PlacementError(f"mode is {mode!r}; choose auto, full or delta")
    if mode == "delta" and current is None:
        raise PlacementError("a delta plan starts from a placement: give --current, or plan full")
    if current is None or mode == "full":
        return full_plan(forecast, fleet, config, current, staying)
    delta = delta_plan(forecast, fleet, current, config, staying, dwelling)
    if mode == "delta":
        return delta
    alive = np.ones(len(fleet.groups), np.bool_) if staying is None else staying
    ideal = float(forecast.load.sum()) / float(fleet.pair_rate[alive].sum())
    if delta.after_s < _NEAR * ideal:
        return delta  # no plan could be much better
    gain_delta = net_gain_s(delta, fleet)
    # polishing is half of a full plan's time: only for one that may win by it
    if polish_rounds(config, forecast.load.size * len(fleet.groups)):
        rough = full_plan(forecast, fleet, replace(config, polish=0), current, staying)
        hope = net_gain_s(rough, fleet) + _POLISHED * config.horizon_s * rough.after_s
        if hope <= max(gain_delta, 0.0) * config.switch:
            return delta
    full = full_plan(forecast, fleet, config, current, staying)
    gain_full = net_gain_s(full, fleet)
    limit = config.interval_bytes
    allowed = limit is None or full.loaded_bytes <= limit
    allowed = allowed and (dwelling is None or dwelling.allows(full.loads, full.drops))
    return full if allowed and gain_full > max(gain_delta, 0.0) * config.switch else delta


def loading_s(plan: Plan, fleet: Fleet) -> float:
    """Seconds until the slowest group has loaded its new replicas (groups load in parallel)."""
    per_group = bytes_by_group(plan.loads, fleet.expert_bytes)
    return float((per_group / fleet.bandwidth).max())


def net_gain_s(plan: Plan, fleet: Fleet) -> float:
    """Seconds gained over the horizon less what loading costs; inf when it restores experts."""
    config = plan.config
    if not np.isfinite(plan.before_s):
        return float("inf")
    gain = config.horizon_s * (plan.before_s - plan.after_s)
    return gain - config.move_cost * loading_s(plan, fleet)
