"""The controller's mind: snapshots in, actions out. No I/O, no clock, no sleep.

`step` plans when it is time or when the fleet changed, and then takes the next safe steps towards
the plan (placement/converge.py). The controller actor executes; the simulator does the same with
a fake fleet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from placement.actions import Action, Snapshot
from placement.converge import Converger, no_host
from placement.errors import PlacementError
from placement.explain import explain
from placement.forecast import Forecaster
from placement.initial import place_at_start
from placement.plan import Plan, PlanConfig
from placement.planner import loading_s, make_plan
from placement.pour import host_lists, pour
from placement.types import Bools, Fleet, Floats, Placement, check_load

_PATIENCE = 10  # plans are replaced unfinished after so many times plan_every_s


@dataclass(frozen=True, kw_only=True)
class ReconcileConfig:
    """How often to plan and how patient to be.

    plan_every_s   least time between two plans while the fleet is unchanged
    min_tokens     pairs a layer must have seen for a window to count
    speed_change   relative change of a group's speed that calls for a plan at once
    live           False: never move for gain, only restore and drain (static placement)
    """

    plan: PlanConfig = field(default_factory=PlanConfig)
    mode: str = "auto"
    plan_every_s: float = 30.0
    min_tokens: int = 256
    speed_change: float = 0.1
    live: bool = True
    loads_per_group: int = 4


class Reconciler:
    """Keeps a fleet on its plan. One per controller; `term` must exceed any earlier one's."""

    def __init__(self, *, config: ReconcileConfig | None = None, term: int = 1) -> None:
        self.config = config or ReconcileConfig()
        self.converger = Converger(term=term, loads_per_group=self.config.loads_per_group)
        self.plan: Plan | None = None
        self.events: deque[str] = deque(maxlen=200)  # sentences, newest last
        self.caution = 1.0  # the margin's factor: doubled when plans promised too much
        self._forecaster: Forecaster | None = None
        self._target: Placement | None = None
        self._fleet: Fleet | None = None
        self._draining: frozenset[str] = frozenset()
        self._tried_s = -np.inf
        self._pending = np.zeros(0)  # counts of a window still too small
        self._pending_s = 0.0
        self._unused = False  # a window came in since the last plan
        self._check: tuple[Placement, Placement, float] | None = None

    @property
    def target(self) -> Placement | None:
        """Where replicas shall be, in the order of the last snapshot's groups."""
        return self._target

    def adopt(self, target: Placement, fleet: Fleet) -> None:
        """Take over a placement made elsewhere (at start, by an operator)."""
        self._target, self._fleet = target, fleet
        self.converger.new_target()

    def step(self, snapshot: Snapshot, now: float) -> list[Action]:
        """The next actions. The same snapshot twice gives the same actions."""
        fresh = self._measure(snapshot)
        changed = self._follow_fleet(snapshot)
        waited = now - self._tried_s
        due = fresh and self.config.live and waited >= self.config.plan_every_s
        if due and self._target is not None and waited < _PATIENCE * self.config.plan_every_s:
            # a plan still being carried out is not yet to be judged, nor replaced
            due = not bool((self._target.resident & ~snapshot.ready).any())
        if self._target is None or changed or due:
            self._replan(snapshot, now, changed)
        if self._target is None:
            return []
        return self.converger.step(snapshot, self._target, now)

    # -- measuring ---------------------------------------------------------------------------

    def _measure(self, snapshot: Snapshot) -> bool:
        """Take in counts; True when a whole window is known that no plan has used."""
        layers, experts, _ = snapshot.ready.shape
        if self._forecaster is None:
            self._forecaster = Forecaster(layers, experts)
            self._pending = np.zeros((layers, experts))
        if snapshot.counts is not None and snapshot.window_s > 0:
            self._pending += check_load(snapshot.counts, layers)
            self._pending_s += snapshot.window_s
        if self._pending.sum(1).max() < self.config.min_tokens:
            return self._unused
        rate = self._pending / self._pending_s
        self._forecaster.update(rate)
        self._compare(snapshot.fleet, rate)
        self._pending = np.zeros((layers, experts))
        self._pending_s = 0.0
        self._unused = True
        return True

    def _compare(self, fleet: Fleet, rate: Floats) -> None:
        """Did the last plan bring what it promised? If less than half, be more cautious."""
        if self._check is None:
            return
        before, after, promised = self._check
        self._check = None
        groups = len(fleet.groups)
        if before.resident.shape[2] != groups or after.resident.shape[2] != groups:
            return
        was, now = (_time(p.resident, rate, fleet) for p in (before, after))
        realised = (was - now) / max(was, 1e-300)
        self.caution = (
            min(self.caution * 2, 16.0) if realised < promised / 2 else max(self.caution / 1.5, 1.0)
        )
        self.events.append(
            f"the plan promised {promised:.1%} less time and brought {realised:.1%}; "
            f"margin x {self.caution:.2g}"
        )

    # -- planning ----------------------------------------------------------------------------

    def _follow_fleet(self, snapshot: Snapshot) -> bool:
        """Map the target onto the groups that live now; True when that calls for a plan."""
        new, old = snapshot.fleet, self._fleet
        drained = snapshot.draining != self._draining
        self._draining = snapshot.draining
        if old is None or self._target is None:
            self._fleet = new
            return True
        if new is old:
            return drained
        if new.ids != old.ids:
            gone = sorted(set(old.ids) - set(new.ids))
            came = sorted(set(new.ids) - set(old.ids))
            self.events.append(f"groups gone: {gone or 'none'}, new: {came or 'none'}")
            self._target = regroup(self._target, old.ids, new.ids)
            self.converger.new_target()
            self._fleet = new
            return True
        slower = np.abs(new.pair_rate / old.pair_rate - 1) > self.config.speed_change
        memory = [g.memory_bytes for g in new.groups] != [g.memory_bytes for g in old.groups]
        if slower.any() or memory:
            names = [new.ids[g] for g in np.flatnonzero(slower)]
            self.events.append(f"speed changed: {names}" if names else "memory changed")
            self._fleet = new
            return True
        return drained

    def _replan(self, snapshot: Snapshot, now: float, changed: bool) -> None:
        fleet, config = snapshot.fleet, self.config
        self._tried_s = now
        self._unused = False
        assert self._forecaster is not None
        forecast = self._forecaster.forecast()
        staying = np.array([g not in snapshot.draining for g in fleet.ids])
        if self._target is None:
            if snapshot.ready.any():
                self._target = _observed(snapshot)  # a restarted controller goes on from here
            elif not forecast.load.any():
                self._target = place_at_start(fleet, experts=snapshot.ready.shape[1])
                return
        idle = not config.live or not forecast.load.any()
        limits = replace(config.plan, margin=config.plan.margin * self.caution)
        if idle:
            limits = replace(limits, rounds=0)  # only what is owed
        mode = "delta" if (idle or changed) and self._target is not None else config.mode
        try:
            plan = make_plan(forecast, fleet, self._target, limits, mode, staying)
        except PlacementError as error:
            # too little memory for one of each: keep what there is, say so, go on
            sentence = f"no plan: {error}"
            if sentence not in self.events:
                self.events.append(sentence)
            if self._target is None:
                raise
            return
        self._adopt_plan(plan, fleet)

    def _adopt_plan(self, plan: Plan, fleet: Fleet) -> None:
        old = self._target
        self.plan = plan
        if plan.mode != "keep" and old is not None and plan.changes:
            promised = (plan.before_s - plan.after_s) / max(plan.before_s, 1e-300)
            if np.isfinite(promised):
                self._check = (old, plan.placement, promised)
        if plan.mode != "keep":
            self.events.append(
                f"{plan.mode} plan: {int(plan.loads.sum())} loads, {int(plan.drops.sum())} drops, "
                f"{loading_s(plan, fleet):.2f} s of loading"
            )
            self.events.extend(explain(plan, fleet, most=5))
            self.converger.new_target()
        self._target = plan.placement


def regroup(placement: Placement, old: tuple[str, ...], new: tuple[str, ...]) -> Placement:
    """The placement in another order of groups; new groups are empty, lost ones left out."""
    index = {group: g for g, group in enumerate(old)}
    layers, experts, _ = placement.resident.shape
    resident = np.zeros((layers, experts, len(new)), np.bool_)
    share = np.zeros((layers, experts, len(new)))
    for g, group in enumerate(new):
        if group in index:
            resident[:, :, g] = placement.resident[:, :, index[group]]
            share[:, :, g] = placement.share[:, :, index[group]]
    total = share.sum(2, keepdims=True)
    even = resident / np.maximum(resident.sum(2, keepdims=True), 1)
    share = np.where(total > 1e-12, share / np.maximum(total, 1e-300), even)
    return Placement(resident=resident, share=share)


def _observed(snapshot: Snapshot) -> Placement:
    """What is ready now, as a placement."""
    resident: Bools = snapshot.ready.copy()
    share = resident * snapshot.fleet.pair_rate
    share = share / np.maximum(share.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=share)


def _time(resident: Bools, rate: Floats, fleet: Fleet) -> float:
    """Slowest group's time summed over layers, per-batch split, for pairs/s [L, E]."""
    if no_host(resident).any():
        return float("inf")
    hosts, copies = host_lists(resident)
    base = np.zeros(len(fleet.groups))
    level = pour(rate[:, None, :], hosts, copies, fleet.pair_rate, base).level
    return float(level.max(2).sum())
