"""Full and delta plans: forecast, fleet, current placement -> target placement, with reasons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.benefit import curves, menu
from placement.errors import PlacementError
from placement.forecast import Forecast
from placement.initial import check_fits
from placement.knapsack import choose
from placement.pack import pack, replica_counts
from placement.pour import even_shares, host_lists, pour
from placement.repair import Owed, repair
from placement.score import layer_score
from placement.search import Change, Searcher
from placement.survive import check_survives
from placement.types import Bools, Fleet, Floats, Ints, Placement

_NEAR = 1.08  # within this factor of a perfectly level fleet no full plan is tried


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan may cost and must gain.

    horizon_s       for how long the plan is expected to serve
    move_cost       part of a copy's loading time that serving feels (rho), 0..1
    margin          least gain of an action over its price, as a part of the layer's time
    interval_bytes  most bytes one plan may load (delta mode); None: no limit
    budget_bytes    most bytes that replicas beyond one of each may fill; None: all memory
    switch          a full plan replaces a delta plan when its net gain is so many times better
    batches_per_s   batches of a layer a second, to price active experts; 0: unknown
    rounds          local-search rounds of a delta plan
    """

    horizon_s: float = 60.0
    move_cost: float = 0.25
    margin: float = 0.002
    interval_bytes: int | None = None
    budget_bytes: int | None = None
    switch: float = 1.05
    batches_per_s: float = 0.0
    rounds: int = 12

    def __post_init__(self) -> None:
        if not self.horizon_s > 0:
            raise PlacementError(f"horizon_s is {self.horizon_s}; it must be positive")
        for name in ("move_cost", "margin", "batches_per_s"):
            if not getattr(self, name) >= 0:
                raise PlacementError(f"{name} is {getattr(self, name)}; it must be >= 0")
        for name in ("interval_bytes", "budget_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise PlacementError(f"{name} is negative; give bytes, or leave it out")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A target placement and why.

    mode       "full", "delta" or "keep"
    before_s   seconds of work per second of traffic, summed over layers, with the current
               placement re-split for free (NaN when there is none); after_s with the target
    loads      bool [L, E, G], replicas to load; drops bool [L, E, G], replicas to give up
    """

    mode: str
    placement: Placement
    before_s: float
    after_s: float
    layer_before_s: Floats
    layer_after_s: Floats
    loads: Bools
    drops: Bools
    loaded_bytes: int
    changes: tuple[Change, ...]
    owed: tuple[Owed, ...]
    config: PlanConfig


class _Problem:
    """The forecast in the planner's units, with the fleet's arrays at hand."""

    def __init__(
        self, forecast: Forecast, fleet: Fleet, config: PlanConfig, staying: Bools | None
    ) -> None:
        layers, experts = forecast.load.shape
        if layers != fleet.layers:
            raise PlacementError(
                f"the load has {layers} layers, expert_bytes {fleet.layers}: make them agree"
            )
        self.fleet, self.config = fleet, config
        self.present = fleet.present(experts)
        groups = len(fleet.groups)
        self.staying = np.ones(groups, np.bool_) if staying is None else staying
        self.rate = fleet.pair_rate
        self.size = fleet.expert_bytes
        self.load = self._priced(forecast.load)
        # an idle expert counts a little, so that it goes to a group with time to spare
        floor = np.maximum(self.load.sum(1, keepdims=True), 1e-9) / max(experts, 1) * 1e-4
        self.load = np.where(self.present, np.maximum(self.load, floor), 0.0)
        self.scenarios = np.where(self.present, self._priced(forecast.scenarios), 0.0)
        self.base = fleet.alpha_s * self.rate * config.batches_per_s
        seconds = config.move_cost / fleet.bandwidth / config.horizon_s
        self.price: Floats = seconds

    def _priced(self, load: Floats) -> Floats:
        """Pairs/s plus the reads of active experts' weights, in pairs (gamma * rate each)."""
        batches = self.config.batches_per_s
        reads = float((self.fleet.gamma_s * self.rate).mean())
        if batches <= 0 or reads <= 0:
            return load
        return load + reads * batches * -np.expm1(-load / batches)

    def _nodes(self) -> Ints | None:
        """The node of each group, as a number; None when no loss is to be survived."""
        if self.fleet.survive == "none":
            return None
        names = sorted({g.node for g in self.fleet.groups})
        return np.array([names.index(g.node) for g in self.fleet.groups])

    def cases(self, most: int) -> Floats:
        """The most telling scenarios, at most `most`, float64 [L, M, E]."""
        if most == 1:
            return self.load[:, None, :]
        return np.ascontiguousarray(self.scenarios[-most:].transpose(1, 0, 2))

    def times(self, resident: Bools, cases: Floats) -> Floats:
        """J of each layer of a layout, float64 [L]."""
        hosts, copies = host_lists(resident)
        return layer_score(pour(cases, hosts, copies, self.rate, self.base).level, self.rate)

    def search(
        self,
        resident: Bools,
        cases: Floats,
        price: Floats,
        margin: float,
        limit: float,
        rounds: int,
    ) -> Searcher:
        held = np.einsum("leg,l->g", resident.astype(np.int64), self.size)
        room = np.where(self.staying, self.fleet.budget_bytes - held, 0)
        pool = np.inf
        if self.config.budget_bytes is not None:
            one_each = int((self.present.sum(1) * self.size).sum())
            pool = max(float(self.config.budget_bytes + one_each - held.sum()), 0.0)
        searcher = Searcher(
            load=cases,
            resident=resident,
            allowed=self.staying,
            room=room.astype(np.int64),
            size=self.size,
            rate=self.rate,
            base=self.base,
            price=price,
            margin=margin,
            byte_limit=limit,
            pool=pool,
            node=self._nodes(),
        )
        searcher.run(rounds)
        return searcher


def _case_count(cells: int) -> int:
    """Scenarios to weigh: fewer on large fleets, where pouring is what a plan's time goes to."""
    return 8 if cells < 100_000 else 3 if cells < 1_500_000 else 1


def _rounds(rounds: int, problem: _Problem, cut: int) -> int:
    """Fewer rounds on large fleets: the next delta plan goes on from there."""
    large = problem.load.size * len(problem.fleet.groups) >= 500_000
    return -(-rounds // cut) if large else rounds


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
    problem = _Problem(forecast, fleet, config, staying)
    check_survives(fleet, problem.present, problem.staying)
    cases = problem.cases(_case_count(problem.load.size * len(fleet.groups)))
    resident = _from_scratch(problem, cases)
    owed = repair(resident, fleet, problem.present, problem.load, problem.staying)
    rounds = _rounds(config.rounds, problem, 3)
    searcher = problem.search(
        resident, cases, np.zeros(len(fleet.groups)), config.margin / 4, np.inf, rounds
    )
    return _finish("full", problem, cases, searcher, current, owed)


def _from_scratch(problem: _Problem, cases: Floats) -> Bools:
    """Curves, knapsack, packing."""
    fleet, load, present = problem.fleet, problem.load, problem.present
    budget = np.where(problem.staying, fleet.budget_bytes, 0)
    layers, experts = load.shape
    groups = int(problem.staying.sum())
    singles = present.sum(1)
    check_fits(fleet, int((singles * fleet.expert_bytes).sum()))
    spare = int(budget.sum() - (singles * fleet.expert_bytes).sum())
    if problem.config.budget_bytes is not None:
        spare = min(spare, problem.config.budget_bytes)
    most = int(min(max(2 * spare // max(int(fleet.expert_bytes.sum()), 1), 1), 2 * groups))
    counts = menu(len(fleet.groups), layers, experts, most) if spare > 0 else np.zeros(1, np.int64)
    caps = np.stack([_caps(problem, budget, singles + k) for k in counts])
    time = curves(load, cases.transpose(1, 0, 2), present, caps, problem.rate, problem.base, counts)
    thin = np.arange(0, time.shape[1], max(1, time.shape[1] // 32))
    picks = choose(time[:, thin], thin[None, :] * fleet.expert_bytes[:, None], spare)
    extra = thin[picks]
    copies = replica_counts(load, extra, present, groups)
    caps = _caps(problem, budget, singles + extra)
    return pack(load, copies, caps, problem.rate)


def _caps(problem: _Problem, budget: Ints, wanted: Ints) -> Ints:
    """Most replicas each group takes of each layer, int64 [L, G], within the group's bytes.

    A layer's replicas divide over the groups as their bytes do; rounding goes by largest
    remainder, so that a layer's caps hold what it wants.
    """
    size = problem.size
    total = int((wanted * size).sum())
    part = budget / max(float(budget.sum()), 1.0)
    fill = max(float(budget.sum()) / max(total, 1), 1.0)
    exact = wanted[:, None] * part[None, :] * min(fill, 4.0)
    caps: Ints = np.floor(exact).astype(np.int64)
    left = budget - (caps * size[:, None]).sum(0)
    order = np.argsort(-(exact - caps), axis=1, kind="stable")
    for layer in range(len(size)):
        short = int(wanted[layer] - caps[layer].sum())
        for group in order[layer].tolist():
            if short <= 0:
                break
            if left[group] >= size[layer]:
                caps[layer, group] += 1
                left[group] -= size[layer]
                short -= 1
        while short > 0 and (left >= size[layer]).any():
            group = int(left.argmax())
            caps[layer, group] += 1
            left[group] -= size[layer]
            short -= 1
    return caps


def delta_plan(
    forecast: Forecast,
    fleet: Fleet,
    current: Placement,
    config: PlanConfig | None = None,
    staying: Bools | None = None,
) -> Plan:
    """From the current placement: what is owed, then only actions that pay for their bytes."""
    config = config or PlanConfig()
    problem = _Problem(forecast, fleet, config, staying)
    _check_current(current, problem)
    check_survives(fleet, problem.present, problem.staying)
    cases = problem.cases(_case_count(problem.load.size * len(fleet.groups)))
    resident = current.resident.copy()
    owed = repair(resident, fleet, problem.present, problem.load, problem.staying)
    limit = np.inf if config.interval_bytes is None else float(config.interval_bytes)
    limit -= sum(o.loaded_bytes for o in owed)  # what is owed is loaded in any case
    rounds = _rounds(config.rounds, problem, 2)
    searcher = problem.search(resident, cases, problem.price, config.margin, limit, rounds)
    return _finish("delta", problem, cases, searcher, current, owed)


def _check_current(current: Placement, problem: _Problem) -> None:
    want = (*problem.load.shape, len(problem.fleet.groups))
    if current.resident.shape != want:
        raise PlacementError(
            f"the current placement has shape {current.resident.shape}, load and fleet need "
            f"{want} [layers, experts, groups]: give the placement of this fleet"
        )


def _finish(
    mode: str,
    problem: _Problem,
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
) -> Plan:
    """The plan to take: delta from `current`, or a full one when that wins net of all bytes.

    mode: "auto", "full" or "delta" (which needs `current`).
    """
    config = config or PlanConfig()
    if mode not in ("auto", "full", "delta"):
        raise PlacementError(f"mode is {mode!r}; choose auto, full or delta")
    if mode == "delta" and current is None:
        raise PlacementError("a delta plan starts from a placement: give --current, or plan full")
    if current is None or mode == "full":
        return full_plan(forecast, fleet, config, current, staying)
    delta = delta_plan(forecast, fleet, current, config, staying)
    if mode == "delta":
        return delta
    alive = np.ones(len(fleet.groups), np.bool_) if staying is None else staying
    ideal = float(forecast.load.sum()) / float(fleet.pair_rate[alive].sum())
    if delta.after_s < _NEAR * ideal:
        return delta  # no plan could be much better
    full = full_plan(forecast, fleet, config, current, staying)
    gain_full, gain_delta = net_gain_s(full, fleet), net_gain_s(delta, fleet)
    limit = config.interval_bytes
    allowed = limit is None or full.loaded_bytes <= limit
    return full if allowed and gain_full > max(gain_delta, 0.0) * config.switch else delta


def loading_s(plan: Plan, fleet: Fleet) -> float:
    """Seconds until the slowest group has loaded its new replicas (groups load in parallel)."""
    per_group = np.einsum("leg,l->g", plan.loads.astype(np.int64), fleet.expert_bytes)
    return float((per_group / fleet.bandwidth).max())


def net_gain_s(plan: Plan, fleet: Fleet) -> float:
    """Seconds gained over the horizon less what loading costs; inf when it restores experts."""
    config = plan.config
    if not np.isfinite(plan.before_s):
        return float("inf")
    gain = config.horizon_s * (plan.before_s - plan.after_s)
    return gain - config.move_cost * loading_s(plan, fleet)
