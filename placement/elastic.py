"""The autoscaler's decisions as actions, asked for again until a snapshot shows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.actions import Action, Drain, Snapshot, Spawn
from placement.autoscale import Autoscaler, group_of
from placement.measure import slowest_s
from placement.types import Fleet, Floats, GroupSpec, Placement


class Elastic:
    """Turns decisions into Spawn and Drain. Only ever asks; what is, the snapshot says."""

    def __init__(self, autoscaler: Autoscaler) -> None:
        self.autoscaler = autoscaler
        self._kinds = {kind.name: kind for kind in autoscaler.kinds}
        self._spawns: dict[str, Spawn] = {}  # asked for, not seen yet
        self._drains: dict[str, Drain] = {}
        self._numbers: dict[str, int] = {}  # the last number given to a group of a kind

    def step(
        self, snapshot: Snapshot, target: Placement, rate: Floats, now: float
    ) -> tuple[list[Action], str | None]:
        """Spawns and drains, and a sentence when something was decided.

        target  in the order of the snapshot's groups; rate float64 [L, E] pairs/s of traffic
        """
        known = {*snapshot.fleet.ids, *(g.id for g in snapshot.starting)}
        self._spawns = {i: s for i, s in self._spawns.items() if i not in known}
        self._drains = {i: d for i, d in self._drains.items() if i in known - snapshot.draining}
        self.autoscaler.learn(snapshot.fleet, snapshot.away)
        asked = (self._spec(s) for s in self._spawns.values())
        coming = [self._as_measured(g, snapshot.fleet) for g in (*snapshot.starting, *asked)]
        fleet = replace(snapshot.fleet, groups=(*snapshot.fleet.groups, *coming))
        measured = snapshot.busy is not None
        decision = self.autoscaler.step(
            fleet,
            rate,
            target,
            now,
            balancedness=1.0 if measured else _balancedness(target, rate, snapshot.fleet),
            queue_s=snapshot.queue_s,
            draining=snapshot.draining | set(self._drains),
            measured=snapshot.busy,
            used=snapshot.used,
            coming=frozenset(g.id for g in coming) | _empty(snapshot, target),
            pending=snapshot.pending,
        )
        for kind, count in decision.add:
            for _ in range(count):
                spawn = Spawn(group=self._name(kind, known), kind=kind, why=decision.why)
                self._spawns[spawn.group] = spawn
        for group in decision.retire:
            self._drains[group] = Drain(group=group, why=decision.why)
        said = decision.why if decision.add or decision.retire else None
        return [*self._spawns.values(), *self._drains.values()], said

    def _name(self, kind: str, known: set[str]) -> str:
        """A new id: never one that was given before, so that Spawn can be repeated safely."""
        number = self._numbers.get(kind, -1) + 1
        while f"{kind}-{number}" in known:
            number += 1
        self._numbers[kind] = number
        return f"{kind}-{number}"

    def _as_measured(self, group: GroupSpec, fleet: Fleet) -> GroupSpec:
        """A group that is on its way, as fast as others of its kind."""
        kind = self._kinds.get(group.kind)
        return (
            group if kind is None else replace(group, speed=self.autoscaler.speed_of(kind, fleet))
        )

    def _spec(self, spawn: Spawn) -> GroupSpec:
        return group_of(self._kinds[spawn.kind], spawn.group)


def _empty(snapshot: Snapshot, target: Placement) -> frozenset[str]:
    """Groups that have a part of the plan, but hold nothing yet or are away."""
    planned = target.resident.any((0, 1)) & ~snapshot.ready.any((0, 1))
    return snapshot.away | {snapshot.fleet.ids[g] for g in np.flatnonzero(planned)}


def _balancedness(target: Placement, rate: Floats, fleet: Fleet) -> float:
    """What part of the fleet's rate the placement makes use of, 0..1."""
    total = float(rate.sum())
    if total <= 0:
        return 1.0
    level = total / float(fleet.pair_rate.sum())
    slowest = slowest_s(target.resident, rate, fleet)
    return min(level / slowest, 1.0) if np.isfinite(slowest) and slowest > 0 else 1.0
