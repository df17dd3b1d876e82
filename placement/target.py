"""Where replicas shall be, and why: what plans, lost groups and operators make of it.

The reconciler (placement/reconcile.py) says when; every change of the target is made here, with a
sentence for each replica that comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from placement.around import around
from placement.complete import complete
from placement.converge import Converger
from placement.copies import with_copies
from placement.dwell import Dwell, Held
from placement.errors import PlacementError
from placement.explain import explain, reasons
from placement.forecast import Forecast
from placement.lent import Lent
from placement.measure import Promise
from placement.pins import as_fixed
from placement.plan import Plan, PlanConfig
from placement.planner import loading_s, make_plan
from placement.record import PlanRecord
from placement.types import Bools, Fleet, Placement
from placement.unplanned import regroup


class Target:
    """`placement` is the target, in the order of the fleet's groups; None before a start."""

    def __init__(self, converger: Converger, *, copies: int, dwell_s: float) -> None:
        """copies: every expert is kept so many times where memory allows."""
        self.placement: Placement | None = None
        self.plan: Plan | None = None  # the last one
        self.missing = ""  # what the groups lack to hold one of each expert, by bytes
        self.events: deque[str] = deque(maxlen=200)  # sentences, newest last
        self.records: deque[PlanRecord] = deque(maxlen=100)  # newest last
        self.promise = Promise()
        self.dwell = Dwell(dwell_s)
        self._lent = Lent()
        self._converger = converger
        self._copies = copies

    def set(self, placement: Placement) -> None:
        """Another target: what stood in the way of the old one is forgotten."""
        self.placement = placement
        self._converger.new_target()

    def place(self, placement: Placement, fleet: Fleet, before: Bools, why: str) -> None:
        """The first target; one reason for all replicas that are not in `before`."""
        self.placement = with_copies(placement, fleet, self._copies)
        self._explain_new(fleet, before, why)

    def regroup(self, old: Fleet, new: Fleet, draining: frozenset[str]) -> None:
        """Groups came, went or changed places; what lost ones held is owed to them."""
        assert self.placement is not None
        gone = sorted(set(old.ids) - set(new.ids))
        came = sorted(set(new.ids) - set(old.ids))
        self.events.append(f"groups gone: {gone or 'none'}, new: {came or 'none'}")
        self._lent.lost(self.placement, old.ids, [g for g in gone if g not in draining])
        self.set(self._lent.give_back(regroup(self.placement, old.ids, new.ids), new.ids))

    def make(
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
                plan = make_plan(forecast, asked, self.placement, limits, mode, staying, dwelling)
                self.missing = ""
                return plan
            except PlacementError as error:
                self.missing = str(error)
                sentence = f"no plan: {error}"
                if sentence not in self.events:
                    self.events.append(sentence)
                if self.placement is None and survive == "none":
                    raise
        return None

    def fill(self, forecast: Forecast, fleet: Fleet, staying: Bools) -> None:
        """Keep what there is; what has no home goes where there is room, reserves included."""
        assert self.placement is not None
        load = forecast.load if forecast.load.any() else None
        held = self.placement.resident
        filled = complete(fleet, held, load, use_reserve=True, staying=staying)
        added = filled.resident & ~held
        for layer, expert, group in np.argwhere(added).tolist():
            self._lent.restored(layer, expert, fleet.ids[group])
        if added.any():
            share = np.where(held.any(2, keepdims=True), self.placement.share, filled.share)
            self.set(Placement(resident=filled.resident, share=share))
            self._explain_new(fleet, held, "restored: no group that is left had it")
            self.events.append(f"{int(added.sum())} experts restored, reserves included")

    def double(self, forecast: Forecast, fleet: Fleet, staying: Bools) -> None:
        """More copies for the sake of survival, where memory is left."""
        assert self.placement is not None
        held = self.placement.resident
        more = with_copies(self.placement, fleet, self._copies, forecast.load, staying)
        if (more.resident & ~held).any():
            before = self._converger.reasons
            self.set(more)
            self._explain_new(fleet, held, "a further copy, should a group be lost")
            self._converger.reasons = {**self._converger.reasons, **before}

    def fix(self, fleet: Fleet, pinned: Bools, barred: Bools, staying: Bools) -> None:
        """What operators want goes before what a plan would like."""
        assert self.placement is not None
        fixed = as_fixed(self.placement, fleet, pinned, barred, staying)
        if (fixed.resident != self.placement.resident).any():
            before, held = self._converger.reasons, self.placement.resident
            self.set(fixed)
            self._explain_new(fleet, held, "pinned by an operator")
            self._converger.reasons = {**before, **self._converger.reasons}

    def avoid(
        self, forecast: Forecast, fleet: Fleet, barred: Bools, ready: Bools, staying: Bools
    ) -> None:
        """Without the replicas that fail to load where they were to be, bool [L, E, G]."""
        assert self.placement is not None
        old = self.placement.resident
        found = around(self.placement, fleet, barred, ready, forecast.load, staying)
        out, added = old & ~found.resident, found.resident & ~old
        if not out.any():
            return
        for layer, expert, group in np.argwhere(added).tolist():
            self._lent.restored(layer, expert, fleet.ids[group])
        before = self._converger.reasons
        self.set(found)
        groups = ", ".join(fleet.ids[g] for g in np.flatnonzero((out & barred).any((0, 1))))
        self._explain_new(fleet, old, f"it failed to load on {groups}")
        self._converger.reasons = {**before, **self._converger.reasons}
        self.events.append(
            f"{int((out & barred).sum())} replicas fail to load on {groups}: not tried there for a "
            f"while, {int(added.sum())} of them planned elsewhere"
        )

    def adopt(self, plan: Plan, fleet: Fleet, now: float, trigger: str, staying: Bools) -> None:
        """The plan becomes the target; what it promises is to be judged."""
        old = self.placement
        self.plan = plan
        if old is not None:
            self.dwell.note(old, plan.placement, fleet.ids, now)
        promised = None
        if plan.mode != "keep" and old is not None and plan.changes:
            part = (plan.before_s - plan.after_s) / max(plan.before_s, 1e-300)
            if np.isfinite(part):
                promised = float(part)
                # what had to leave a draining group was no choice of the plan's
                left = Placement(resident=old.resident & staying, share=old.share)
                self.promise.given(left, plan.placement, promised)
        if plan.mode != "keep":
            self._note(plan, fleet, now, trigger, promised)
            self._converger.new_target()
        for owed in plan.owed:
            if owed.kind == "restore":
                self._lent.restored(owed.layer, owed.expert, fleet.ids[owed.group])
        if plan.changes:
            self._lent.planned()
        self.placement = plan.placement

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
        self._converger.reasons = reasons(plan, fleet)
        self.events.append(
            f"{plan.mode} plan: {record.loads} loads, {record.drops} drops, "
            f"{took_s:.2f} s of loading"
        )
        self.events.extend(record.reasons[:5])

    def _explain_new(self, fleet: Fleet, before: Bools, why: str) -> None:
        """One reason for all replicas of the target that are not in `before`."""
        assert self.placement is not None
        added = np.argwhere(self.placement.resident & ~before).tolist()
        self._converger.reasons = {(la, e, fleet.ids[g]): why for la, e, g in added}
