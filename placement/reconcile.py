"""The controller's mind: snapshots in, actions out. No I/O, no clock, no sleep.

`step` plans when it is time or when the fleet changed, and then takes the next safe steps towards
the plan (placement/converge.py). Speeds are taken as measured only when they really changed
(placement/steady.py); copies that came or went lately are left alone (placement/dwell.py); with an
autoscaler it also asks for groups and drains them (placement/elastic.py). The controller actor
executes; the simulator does the same with a fake fleet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from placement.actions import Action, Snapshot
from placement.autoscale import Autoscaler
from placement.complete import complete
from placement.converge import Converger
from placement.copies import with_copies
from placement.dry_run import Basis
from placement.dwell import Dwell, Held
from placement.elastic import Elastic
from placement.errors import PlacementError
from placement.explain import explain, reasons
from placement.forecast import Forecast
from placement.initial import place_at_start
from placement.lent import Lent
from placement.measure import Promise, Traffic
from placement.pins import Cell, as_fixed, held_too, masks
from placement.plan import Plan, PlanConfig
from placement.planner import loading_s, make_plan
from placement.record import PlanRecord
from placement.steady import SteadyFleet
from placement.types import Bools, Fleet, Placement

_PATIENCE = 10  # plans are replaced unfinished after so many times plan_every_s


@dataclass(frozen=True, kw_only=True)
class ReconcileConfig:
    """How often to plan and how patient to be.

    plan_every_s   least time between two plans while the fleet is unchanged
    min_tokens     pairs a layer must have seen for a window to count
    speed_change   relative change of a group's speed that calls for a plan at once; smaller ones,
                   and single wild measurements, are taken for noise
    dwell_s        a copy that came or went is left alone for so long, unless something is owed;
                   None: twice plan_every_s
    copies         every expert is kept so many times where memory allows, whatever it gains
    live           False: never move for gain, only restore and drain (static placement)
    """

    plan: PlanConfig = field(default_factory=PlanConfig)
    mode: str = "auto"
    plan_every_s: float = 30.0
    min_tokens: int = 256
    speed_change: float = 0.1
    live: bool = True
    loads_per_group: int = 4
    copies: int = 1
    dwell_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.speed_change < 1:
            raise PlacementError(f"speed_change is {self.speed_change}; give a part, e.g. 0.1")
        if self.dwell_s is not None and not self.dwell_s >= 0:
            raise PlacementError(f"dwell_s is {self.dwell_s}; give seconds, 0 or more")


class Reconciler:
    """Keeps a fleet on its plan. One per controller; `term` must exceed any earlier one's."""

    def __init__(
        self,
        *,
        config: ReconcileConfig | None = None,
        term: int = 1,
        autoscaler: Autoscaler | None = None,
    ) -> None:
        """autoscaler: also decide how many groups there are; None: the fleet is given."""
        self.config = config or ReconcileConfig()
        self.converger = Converger(term=term, loads_per_group=self.config.loads_per_group)
        self.plan: Plan | None = None
        self.missing = ""  # what the groups lack to hold one of each expert, by bytes
        self.events: deque[str] = deque(maxlen=200)  # sentences, newest last
        self.records: deque[PlanRecord] = deque(maxlen=100)  # newest last
        dwell_s = self.config.dwell_s
        self._dwell = Dwell(2 * self.config.plan_every_s if dwell_s is None else dwell_s)
        self._steady = SteadyFleet(self.config.speed_change)
        self._elastic = None if autoscaler is None else Elastic(autoscaler)
        self._traffic: Traffic | None = None
        self._promise = Promise()
        self._lent = Lent()
        self._target: Placement | None = None
        self._fleet: Fleet | None = None
        self._draining: frozenset[str] = frozenset()
        self._pins: tuple[frozenset[Cell], frozenset[Cell]] = (frozenset(), frozenset())
        self._tried_s = -np.inf
        self._unused = False  # a window came in since the last plan

    @property
    def caution(self) -> float:
        """The margin's factor: above 1 when plans promised more than they brought."""
        return self._promise.caution

    @property
    def target(self) -> Placement | None:
        """Where replicas shall be, in the order of the last snapshot's groups."""
        return self._target

    def adopt(self, target: Placement, fleet: Fleet) -> None:
        """Take over a placement made elsewhere (at start, by an operator)."""
        self._target, self._fleet = target, fleet
        self.converger.new_target()

    def basis(self, now: float) -> Basis | None:
        """What a plan made now would start from (`placement.dry_run`); None before a start."""
        fleet, target = self._fleet, self._target
        if fleet is None or target is None or self._traffic is None:
            return None
        forecast = self._traffic.forecaster.forecast()
        measured = bool(forecast.load.any())
        shape = target.resident.shape
        pinned, barred = (masks(cells, shape, fleet.ids) for cells in self._pins)
        limits = self.config.plan
        return Basis(
            fleet=fleet,
            target=target,
            forecast=forecast if measured else _uniform(fleet, shape[1]),
            measured=measured,
            staying=np.array([group not in self._draining for group in fleet.ids]),
            limits=replace(limits, margin=limits.margin * self.caution),
            mode=self.config.mode,
            held=held_too(self._dwell.held(shape, fleet.ids, now), pinned, barred),
        )

    def step(self, snapshot: Snapshot, now: float) -> list[Action]:
        """The next actions. The same snapshot twice gives the same actions."""
        snapshot = replace(snapshot, fleet=self._steady.follow(snapshot.fleet))
        fresh = self._measure(snapshot)
        pins = self._follow_pins(snapshot)
        trigger = self._follow_fleet(snapshot) or pins
        waited = now - self._tried_s
        due = fresh and self.config.live and waited >= self.config.plan_every_s
        if due and self._target is not None and waited < _PATIENCE * self.config.plan_every_s:
            # a plan still being carried out is not yet to be judged, nor replaced
            due = not bool((self._target.resident & ~snapshot.ready).any())
        if self._target is None or trigger or due:
            self._replan(snapshot, now, trigger)
        if self._target is None:
            return []
        actions = self.converger.step(snapshot, self._target, now)
        if self._elastic is not None and self._traffic is not None:
            more, said = self._elastic.step(snapshot, self._target, self._traffic.rate, now)
            actions += more
            if said:
                self.events.append(said)
        return actions

    def _measure(self, snapshot: Snapshot) -> bool:
        """Take in counts; True when a whole window is known that no plan has used."""
        layers, experts, _ = snapshot.ready.shape
        if self._traffic is None:
            self._traffic = Traffic(layers, experts, self.config.min_tokens)
        if snapshot.counts is not None and snapshot.window_s > 0:
            window = self._traffic.add(snapshot.counts, snapshot.window_s)
            if window is not None:
                self._unused = True
                kept = self._promise.compare(snapshot.fleet, window)
                if kept is not None:
                    self.records[-1].realised = kept.realised
                    self.events.append(kept.sentence())
        return self._unused

    # -- planning ----------------------------------------------------------------------------

    def _follow_fleet(self, snapshot: Snapshot) -> str:
        """Map the target onto the groups that live now; what calls for a plan, or nothing."""
        new, old = snapshot.fleet, self._fleet
        drained = "drain" if snapshot.draining != self._draining else ""
        self._draining = snapshot.draining
        if old is None or self._target is None:
            self._fleet = new
            return "start"
        if new is old:
            return drained
        if new.ids != old.ids:
            gone = sorted(set(old.ids) - set(new.ids))
            came = sorted(set(new.ids) - set(old.ids))
            self.events.append(f"groups gone: {gone or 'none'}, new: {came or 'none'}")
            self._lent.lost(self._target, old.ids, [g for g in gone if g not in self._draining])
            self._target = self._lent.give_back(regroup(self._target, old.ids, new.ids), new.ids)
            self.converger.new_target()
            self._fleet = new
            return "groups"
        self._fleet = new
        other = ~np.isclose(new.pair_rate, old.pair_rate)
        memory = [g.memory_bytes for g in new.groups] != [g.memory_bytes for g in old.groups]
        if other.any() or memory:
            names = [new.ids[g] for g in np.flatnonzero(other)]
            self.events.append(f"speed changed: {names}" if names else "memory changed")
            return "speed" if names else "memory"
        return drained

    def _follow_pins(self, snapshot: Snapshot) -> str:
        """An operator has pinned or barred something, or let it go."""
        before, self._pins = self._pins, (snapshot.pinned, snapshot.barred)
        return "operator" if before != self._pins else ""

    def _replan(self, snapshot: Snapshot, now: float, trigger: str) -> None:
        fleet, config = snapshot.fleet, self.config
        self._tried_s = now
        self._unused = False
        assert self._traffic is not None
        forecast = self._traffic.forecaster.forecast()
        staying = np.array([g not in snapshot.draining for g in fleet.ids])
        if self._target is None:
            if snapshot.ready.any():
                self._target = _observed(snapshot)  # a restarted controller goes on from here
            elif not forecast.load.any():
                start = place_at_start(fleet, experts=snapshot.ready.shape[1])
                self._target = with_copies(start, fleet, config.copies)
                self._explain_new(fleet, snapshot.ready, "placed at start, by bytes and speed")
                return
        if trigger == "groups" and not forecast.load.any():
            forecast = _uniform(fleet, snapshot.ready.shape[1])  # so that a new group gets its part
        idle = not config.live or not forecast.load.any()
        limits = replace(config.plan, margin=config.plan.margin * self.caution)
        if idle:
            limits = replace(limits, rounds=0)  # only what is owed
        mode = "delta" if (idle or trigger) and self._target is not None else config.mode
        shape = (*snapshot.ready.shape[:2], len(fleet.groups))
        pinned, barred = (masks(c, shape, fleet.ids) for c in self._pins)
        dwelling = held_too(self._dwell.held(shape, fleet.ids, now), pinned, barred)
        plan = self._plan(forecast, fleet, limits, mode, staying, dwelling)
        if plan is not None:
            self._adopt_plan(plan, fleet, now, trigger or "load")
        elif self._target is not None:
            self._fill(forecast, fleet, staying)
        if self._target is not None:
            self._double(forecast, fleet, staying)
            self._fix(fleet, pinned, barred, staying)

    def _plan(
        self,
        forecast: Forecast,
        fleet: Fleet,
        limits: PlanConfig,
        mode: str,
        staying: Bools,
        dwelling: Held | None,
    ) -> Plan | None:
        """The plan, or one that survives less, or None: too little memory for one of each."""
        for survive in dict.fromkeys((fleet.survive, "none")):
            try:
                asked = replace(fleet, survive=survive)
                plan = make_plan(forecast, asked, self._target, limits, mode, staying, dwelling)
                self.missing = ""
                return plan
            except PlacementError as error:
                self.missing = str(error)
                sentence = f"no plan: {error}"
                if sentence not in self.events:
                    self.events.append(sentence)
                if self._target is None and survive == "none":
                    raise
        return None

    def _fill(self, forecast: Forecast, fleet: Fleet, staying: Bools) -> None:
        """Keep what there is; what has no home goes where there is room, reserves included."""
        assert self._target is not None
        load = forecast.load if forecast.load.any() else None
        held = self._target.resident
        filled = complete(fleet, held, load, use_reserve=True, staying=staying)
        added = filled.resident & ~held
        for layer, expert, group in np.argwhere(added).tolist():
            self._lent.restored(layer, expert, fleet.ids[group])
        if added.any():
            share = np.where(held.any(2, keepdims=True), self._target.share, filled.share)
            self._target = Placement(resident=filled.resident, share=share)
            self.converger.new_target()
            self._explain_new(fleet, held, "restored: no group that is left had it")
            self.events.append(f"{int(added.sum())} experts restored, reserves included")

    def _double(self, forecast: Forecast, fleet: Fleet, staying: Bools) -> None:
        """More copies for the sake of survival, where memory is left."""
        assert self._target is not None
        held = self._target.resident
        more = with_copies(self._target, fleet, self.config.copies, forecast.load, staying)
        if (more.resident & ~held).any():
            before = self.converger.reasons
            self._target = more
            self._explain_new(fleet, held, "a further copy, should a group be lost")
            self.converger.reasons = {**self.converger.reasons, **before}
            self.converger.new_target()

    def _fix(self, fleet: Fleet, pinned: Bools, barred: Bools, staying: Bools) -> None:
        """What operators want goes before what a plan would like."""
        assert self._target is not None
        fixed = as_fixed(self._target, fleet, pinned, barred, staying)
        if (fixed.resident != self._target.resident).any():
            before, held = self.converger.reasons, self._target.resident
            self._target = fixed
            self._explain_new(fleet, held, "pinned by an operator")
            self.converger.reasons = {**before, **self.converger.reasons}
            self.converger.new_target()

    def _explain_new(self, fleet: Fleet, before: Bools, why: str) -> None:
        """One reason for all replicas of the target that are not in `before`."""
        assert self._target is not None
        added = np.argwhere(self._target.resident & ~before).tolist()
        self.converger.reasons = {(la, e, fleet.ids[g]): why for la, e, g in added}

    def _adopt_plan(self, plan: Plan, fleet: Fleet, now: float, trigger: str) -> None:
        old = self._target
        self.plan = plan
        if old is not None:
            self._dwell.note(old, plan.placement, fleet.ids, now)
        promised = None
        if plan.mode != "keep" and old is not None and plan.changes:
            part = (plan.before_s - plan.after_s) / max(plan.before_s, 1e-300)
            if np.isfinite(part):
                promised = float(part)
                # what had to leave a draining group was no choice of the plan's
                staying = np.array([g not in self._draining for g in fleet.ids])
                left = Placement(resident=old.resident & staying, share=old.share)
                self._promise.given(left, plan.placement, promised)
        if plan.mode != "keep":
            self._note(plan, fleet, now, trigger, promised)
            self.converger.new_target()
        for owed in plan.owed:
            if owed.kind == "restore":
                self._lent.restored(owed.layer, owed.expert, fleet.ids[owed.group])
        if plan.changes:
            self._lent.planned()
        self._target = plan.placement

    def _note(
        self, plan: Plan, fleet: Fleet, now: float, trigger: str, promised: float | None
    ) -> None:
        took_s = loading_s(plan, fleet)
        record = PlanRecord(
            at_s=now,
            trigger=trigger,
            mode=plan.mode,
            loads=int(plan.loads.sum()),
            drops=int(plan.drops.sum()),
            loaded_bytes=plan.loaded_bytes,
            loading_s=took_s,
            promised=promised,
            reasons=tuple(explain(plan, fleet, most=20)),
        )
        self.records.append(record)
        self.converger.reasons = reasons(plan, fleet)
        self.events.append(
            f"{plan.mode} plan: {record.loads} loads, {record.drops} drops, "
            f"{took_s:.2f} s of loading"
        )
        self.events.extend(record.reasons[:5])


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


def _uniform(fleet: Fleet, experts: int) -> Forecast:
    """Every expert equally busy, the fleet half busy: what to plan for before any traffic."""
    present = fleet.present(experts)
    each = 0.5 * float(fleet.pair_rate.sum()) / float(present.sum())
    load = np.where(present, each, 0.0)
    return Forecast(load=load, scenarios=load[None], spread=np.zeros_like(load))


def _observed(snapshot: Snapshot) -> Placement:
    """What is ready now, as a placement."""
    resident: Bools = snapshot.ready.copy()
    share = resident * snapshot.fleet.pair_rate
    share = share / np.maximum(share.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=share)
