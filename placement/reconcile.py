"""The controller's mind: snapshots in, actions out. No I/O, no clock, no sleep.

`step` plans when it is time or when the fleet changed (placement/target.py holds where replicas
shall be, and why), and then takes the next safe steps towards the plan (placement/converge.py).
Speeds are taken as measured only when they really changed (placement/steady.py); copies that came
or went lately are left alone (placement/dwell.py); with an autoscaler it also asks for groups and
drains them (placement/elastic.py). The controller actor executes; the simulator does the same
with a fake fleet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from placement.actions import Action, Snapshot
from placement.autoscale import Autoscaler
from placement.converge import Converger
from placement.dry_run import Basis
from placement.elastic import Elastic
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.measure import Traffic
from placement.pins import Cell, held_too, masks
from placement.plan import Plan, PlanConfig
from placement.steady import SteadyFleet
from placement.target import Target
from placement.types import Bools, Fleet, Placement
from placement.unplanned import observed, uniform

_PATIENCE = 10  # plans are replaced unfinished after so many times plan_every_s


@dataclass(frozen=True, kw_only=True)
class ReconcileConfig:
    """How often to plan and how patient to be.

    plan_every_s   least time between two plans while the fleet is unchanged
    min_tokens     pairs a layer must have seen for a window to count
    speed_change   relative change of a group's speed that calls for a plan at once; smaller ones,
                   and single wild measurements, are taken for noise
    report_s       speeds seen sooner after those of an earlier step are the same report again
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
    report_s: float = 0.0

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
        dwell_s = self.config.dwell_s
        self._target = Target(
            self.converger,
            copies=self.config.copies,
            dwell_s=2 * self.config.plan_every_s if dwell_s is None else dwell_s,
        )
        self.events, self.records = self._target.events, self._target.records
        self._steady = SteadyFleet(self.config.speed_change, report_s=self.config.report_s)
        self._elastic = None if autoscaler is None else Elastic(autoscaler)
        self._traffic: Traffic | None = None
        self._fleet: Fleet | None = None
        self._draining: frozenset[str] = frozenset()
        self._pins: tuple[frozenset[Cell], frozenset[Cell]] = (frozenset(), frozenset())
        self._barred: Bools | None = None  # in the order of `_barred_ids`
        self._barred_ids: tuple[str, ...] = ()
        self._stuck = ""
        self._tried_s = -np.inf
        self._unused = False  # a window came in since the last plan

    @property
    def caution(self) -> float:
        """The margin's factor: above 1 when plans promised more than they brought."""
        return self._target.promise.caution

    @property
    def target(self) -> Placement | None:
        """Where replicas shall be, in the order of the last snapshot's groups."""
        return self._target.placement

    @property
    def plan(self) -> Plan | None:
        """The last plan made."""
        return self._target.plan

    @property
    def missing(self) -> str:
        """What the groups lack to hold one of each expert, by bytes; or which experts fail to load
        where alone there is room for them."""
        return self._target.missing or self._stuck

    @property
    def awaited(self) -> Bools:
        """The target [L, E, G] without what fails to load and is not to be waited for."""
        assert self.target is not None
        resident = self.target.resident
        if self._barred is None or self._barred.shape != resident.shape:
            return resident
        awaited: Bools = resident & ~self._barred
        return awaited

    def adopt(self, target: Placement, fleet: Fleet) -> None:
        """Take over a placement made elsewhere (at start, by an operator)."""
        self._fleet = fleet
        self._target.set(target)

    def basis(self, now: float) -> Basis | None:
        """What a plan made now would start from (`placement.dry_run`); None before a start."""
        fleet, target = self._fleet, self.target
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
            forecast=forecast if measured else uniform(fleet, shape[1]),
            measured=measured,
            staying=np.array([group not in self._draining for group in fleet.ids]),
            limits=replace(limits, margin=limits.margin * self.caution),
            mode=self.config.mode,
            held=held_too(
                self._target.dwell.held(shape, fleet.ids, now), pinned, self._closed(barred)
            ),
        )

    def step(self, snapshot: Snapshot, now: float) -> list[Action]:
        """The next actions. The same snapshot twice gives the same actions."""
        snapshot = replace(snapshot, fleet=self._steady.follow(snapshot.fleet, now))
        fresh = self._measure(snapshot)
        pins = self._follow_pins(snapshot)
        ended = self._follow_bars(snapshot, now)
        trigger = self._follow_fleet(snapshot) or pins or ended
        waited = now - self._tried_s
        due = fresh and self.config.live and waited >= self.config.plan_every_s
        target = self.target
        if due and target is not None and waited < _PATIENCE * self.config.plan_every_s:
            # a plan still being carried out is not yet to be judged, nor replaced
            due = not bool((self.awaited & ~snapshot.ready).any())
        if target is None or trigger or due:
            self._replan(snapshot, now, trigger)
        self._avoid(snapshot)
        target = self.target
        if target is None:
            return []
        actions = self.converger.step(snapshot, target, now)
        if self._elastic is not None and self._traffic is not None:
            more, said = self._elastic.step(snapshot, target, self._traffic.rate, now)
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
                kept = self._target.promise.compare(snapshot.fleet, window)
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
        if old is None or self.target is None:
            self._fleet = new
            return "start"
        if new is old:
            return drained
        if new.ids != old.ids:
            self._target.regroup(old, new, self._draining)
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

    def _follow_bars(self, snapshot: Snapshot, now: float) -> str:
        """What fails to load, and where; whether some of it may be planned there again."""
        ids, failing = snapshot.fleet.ids, self.converger.failing
        failing.only(frozenset(ids) - snapshot.away)  # a new life may run elsewhere
        before = self._barred if self._barred_ids == ids else None
        self._barred_ids = ids
        self._barred = failing.bars(ids, snapshot.ready, now) if failing else None
        if before is None:
            return ""
        ended = before & ~snapshot.ready
        if self._barred is not None:
            ended &= ~self._barred
        return "loads" if ended.any() else ""

    def _closed(self, barred: Bools) -> Bools:
        """What operators do not want somewhere, and what fails to load there."""
        if self._barred is None or self._barred.shape != barred.shape:
            return barred
        closed: Bools = barred | self._barred
        return closed

    def _avoid(self, snapshot: Snapshot) -> None:
        """The target without what fails to load, as far as there is room elsewhere."""
        target, barred, fleet = self.target, self._barred, snapshot.fleet
        self._stuck = ""
        if target is None or barred is None or not (target.resident & barred).any():
            return
        assert self._traffic is not None
        closed = snapshot.draining | snapshot.away
        staying = np.array([g not in closed for g in fleet.ids])
        forecast = self._traffic.forecaster.forecast()
        self._target.avoid(forecast, fleet, barred, snapshot.ready, staying)
        assert self.target is not None
        left = self.target.resident & barred
        if left.any():
            groups = ", ".join(fleet.ids[g] for g in np.flatnonzero(left.any((0, 1))))
            self._stuck = (
                f"{int(left.any(2).sum())} experts fail to load on {groups}, and no other group "
                "has room for them: mend what fails there, or add a group"
            )

    def _replan(self, snapshot: Snapshot, now: float, trigger: str) -> None:
        fleet, config = snapshot.fleet, self.config
        self._tried_s = now
        self._unused = False
        assert self._traffic is not None
        forecast = self._traffic.forecaster.forecast()
        staying = np.array([g not in snapshot.draining for g in fleet.ids])
        target = self._target
        if target.placement is None:
            if snapshot.ready.any():
                target.placement = observed(snapshot)  # a restarted controller goes on from here
            elif not forecast.load.any():
                start = place_at_start(fleet, experts=snapshot.ready.shape[1])
                target.place(start, fleet, snapshot.ready, "placed at start, by bytes and speed")
                return
        if trigger in ("groups", "loads") and not forecast.load.any():
            forecast = uniform(fleet, snapshot.ready.shape[1])  # so that a new group gets its part
        idle = not config.live or not forecast.load.any()
        limits = replace(config.plan, margin=config.plan.margin * self.caution)
        if idle:
            limits = replace(limits, rounds=0)  # only what is owed
        delta = (idle or trigger) and target.placement is not None
        mode = "delta" if delta else config.mode
        shape = (*snapshot.ready.shape[:2], len(fleet.groups))
        pinned, barred = (masks(c, shape, fleet.ids) for c in self._pins)
        dwelling = target.dwell.held(shape, fleet.ids, now)
        dwelling = held_too(dwelling, pinned, self._closed(barred))
        plan = target.make(forecast, fleet, limits, mode, staying, dwelling)
        if plan is not None:
            target.adopt(plan, fleet, now, trigger or "load", staying)
        elif target.placement is not None:
            target.fill(forecast, fleet, staying)
        if target.placement is not None:
            target.double(forecast, fleet, staying)
            target.fix(fleet, pinned, barred, staying)
