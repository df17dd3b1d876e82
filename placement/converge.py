"""From ready to target by safe steps: make before break.

There is no "move": load, publish a table that uses the new replica, wait until no client uses an
older table, drop. Nothing is dropped that is the last ready replica or that a table in use lists.
When two full groups want each other's experts nothing could ever start; then, in this order, the
reserve lends its bytes, a spare replica gives way, an expert takes a detour over a third group,
and, when memory is so full that nothing can move safely, the wish is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from placement.actions import Action, Drop, Load, Publish, Retire, Snapshot
from placement.failing import Cell, Failing
from placement.table import make_table
from placement.types import Bools, Ints, Placement, bytes_by_group

_NOISE = 0.05  # measured speeds wander by so much; no reason for a new table


@dataclass(kw_only=True)
class Converger:
    """Holds only what a snapshot cannot show: detours, suspended wishes, failed loads."""

    term: int
    loads_per_group: int = 4
    detours: set[Cell] = field(default_factory=set)
    suspended: set[Cell] = field(default_factory=set)
    given_up: set[Cell] = field(default_factory=set)
    failing: Failing = field(default_factory=Failing)
    reasons: dict[Cell, str] = field(default_factory=dict)  # why the plan wants a replica

    def new_target(self) -> None:
        """A new plan: what stood in the way of the old one is forgotten."""
        self.detours.clear()
        self.suspended.clear()
        self.given_up.clear()

    def load_failed(self, cell: Cell, now: float) -> None:
        """A load ended in an error, from the checkpoint too: later again, or elsewhere."""
        self.failing.failed(cell, now)

    def load_done(self, cell: Cell) -> None:
        """A replica is ready."""
        self.failing.came(cell)

    def step(self, snapshot: Snapshot, target: Placement, now: float) -> list[Action]:
        """The next safe actions towards `target` (in the snapshot's group order)."""
        view = _View(snapshot, target, self)
        actions: list[Action] = []
        publish = self._publish(view, target)
        drops = [] if publish else self._drops(view)
        loads = self._loads(view, now)
        table = snapshot.table
        settled = table is not None and snapshot.drained >= table.epoch
        moving = bool(publish or drops or loads) or snapshot.loading.any() or not settled
        if view.wanted.any() and not moving:
            loads = self._unblock(view, now)
            if not loads:
                publish = self._publish(_View(snapshot, target, self), target)
        actions += loads
        if publish:
            actions.append(publish)
        actions += drops
        actions += self._retire(view)
        return actions

    # -- table -------------------------------------------------------------------------------

    def _publish(self, view: _View, target: Placement) -> Publish | None:
        snapshot = view.snapshot
        old = snapshot.table
        placement = Placement(resident=view.goal, share=np.where(view.goal, target.share, 0.0))
        epoch = (old.epoch if old else 0) + 1
        table = make_table(
            snapshot.fleet, placement, term=self.term, epoch=epoch, ready=snapshot.ready
        )
        if old is not None and old.group_ids == table.group_ids and old.term == self.term:
            same = (
                np.array_equal(old.resident, table.resident)
                and np.allclose(old.share, table.share, atol=1e-6)
                and np.allclose(old.speed, table.speed, rtol=_NOISE)
                and np.allclose(old.alpha_s, table.alpha_s, rtol=_NOISE)
                and np.allclose(old.gamma_s, table.gamma_s, rtol=_NOISE)
            )
            if same:
                return None
        used = int(table.resident.sum())
        return Publish(table=table, why=f"{used} ready replicas in use, epoch {epoch}")

    # -- loads and drops ---------------------------------------------------------------------

    def _loads(self, view: _View, now: float) -> list[Action]:
        snapshot, fleet = view.snapshot, view.snapshot.fleet
        actions: list[Action] = []
        lost = no_host(snapshot.ready)
        coming = snapshot.loading.any(2)
        pressing = snapshot.pressing
        # nobody serves them, nor will soon: 0; nobody will when a node is gone: 1; all others: 2
        rank = np.where(lost & ~coming, 0, np.where(pressing & ~lost, 1, 2))
        urgent = 0 if (lost & coming).any() else 1 if (pressing & coming).any() else 2
        busy = snapshot.loading.sum((0, 1))
        free = view.free.copy()
        cells = np.argwhere(view.wanted)
        order = np.lexsort((cells[:, 2], cells[:, 1], cells[:, 0], rank[cells[:, 0], cells[:, 1]]))
        for layer, expert, group in cells[order].tolist():
            cell = (layer, expert, fleet.ids[group])
            size = int(fleet.expert_bytes[layer])
            if busy[group] >= self.loads_per_group or not self.failing.may_try(cell, now):
                continue
            # the reserve is for cold serving: only an expert nobody serves may use it
            room = free[group] + (view.reserve if lost[layer, expert] else 0)
            if room < size:
                continue
            if rank[layer, expert] > urgent:
                break  # those are waited for: what others serve already is copied later
            urgent = min(urgent, int(rank[layer, expert]))
            free[group] -= size
            busy[group] += 1
            actions.append(self._load(view, layer, expert, group, "planned"))
        return actions

    def _load(self, view: _View, layer: int, expert: int, group: int, why: str) -> Load:
        fleet = view.snapshot.fleet
        peers = np.flatnonzero(view.snapshot.ready[layer, expert])
        # the peer with the most bandwidth, spread by expert so that one is not asked for all
        source = None
        if len(peers):
            best = peers[fleet.bandwidth[peers] == fleet.bandwidth[peers].max()]
            source = fleet.ids[int(best[(layer + expert) % len(best)])]
        why = self.reasons.get((layer, expert, fleet.ids[group]), why)
        return Load(layer=layer, expert=expert, group=fleet.ids[group], source=source, why=why)

    def _drops(self, view: _View) -> list[Action]:
        """Replicas beyond the goal, once no table in use lists them."""
        snapshot, table = view.snapshot, view.snapshot.table
        if table is None or snapshot.drained < table.epoch or table.term != self.term:
            return []
        if table.group_ids != snapshot.fleet.ids:
            return []
        spare = snapshot.ready & ~view.goal & ~table.resident
        # a listed, ready replica elsewhere must remain
        unsafe = no_host(table.resident & snapshot.ready)
        return [
            Drop(layer=la, expert=e, group=snapshot.fleet.ids[g], why="not in the plan")
            for la, e, g in np.argwhere(spare & ~unsafe[:, :, None]).tolist()
        ]

    def _retire(self, view: _View) -> list[Action]:
        snapshot = view.snapshot
        held = (snapshot.ready | snapshot.loading).sum((0, 1))
        listed = np.zeros_like(held)
        table = snapshot.table
        if table is not None and table.group_ids == snapshot.fleet.ids:
            listed = table.resident.sum((0, 1))
        return [
            Retire(group=group, why="drained and empty")
            for g, group in enumerate(snapshot.fleet.ids)
            if group in snapshot.draining and not held[g] and not listed[g]
        ]

    # -- when nothing can start --------------------------------------------------------------

    def _unblock(self, view: _View, now: float) -> list[Action]:
        fleet = view.snapshot.fleet
        cells = [
            c
            for c in np.argwhere(view.wanted).tolist()
            if self.failing.may_try((c[0], c[1], fleet.ids[c[2]]), now)
        ]
        for layer, expert, group in cells:
            if view.free[group] + view.reserve >= fleet.expert_bytes[layer]:
                return [self._load(view, layer, expert, group, "planned, in the reserve")]
        for layer, _, group in cells:
            spare = view.spare_on(group, int(fleet.expert_bytes[layer]))
            if spare is not None:
                self.suspended.add((spare[0], spare[1], fleet.ids[group]))
                return []
        for _, _, group in cells:
            detour = view.detour_from(group)
            if detour is not None:
                layer, expert, over = detour
                self.detours.add((layer, expert, fleet.ids[over]))
                return [self._load(view, layer, expert, over, "detour: its new group is full")]
        for layer, expert, group in cells:
            self.given_up.add((layer, expert, fleet.ids[group]))
        return []


def no_host(resident: Bools) -> Bools:
    """Experts without any replica in resident [L, E, G], bool [L, E]."""
    missing: Bools = resident.sum(2) == 0
    return missing


class _View:
    """A snapshot and a target, worked out."""

    def __init__(self, snapshot: Snapshot, target: Placement, memory: Converger) -> None:
        self.snapshot = snapshot
        fleet = snapshot.fleet
        index = {group: g for g, group in enumerate(fleet.ids)}
        ready = snapshot.ready
        self.reserve = fleet.reserve_bytes
        goal = target.resident.copy()
        for layer, expert, group in memory.suspended | memory.given_up:
            if group in index:
                goal[layer, expert, index[group]] = False
        # a suspended wish comes back as soon as everything else has arrived
        if memory.suspended and not (goal & ~ready).any():
            for layer, expert, group in memory.suspended:
                if group in index:
                    goal[layer, expert, index[group]] = target.resident[layer, expert, index[group]]
            memory.suspended.clear()
        for layer, expert, group in sorted(memory.detours):
            arrived = (target.resident[layer, expert] & ready[layer, expert]).any()
            if group not in index or arrived:
                memory.detours.discard((layer, expert, group))
            else:
                goal[layer, expert, index[group]] = True
        # an expert whose wishes were all given up stays where it is
        homeless = no_host(goal)
        goal[homeless] = ready[homeless]
        self.goal: Bools = goal
        self.wanted: Bools = goal & ~ready & ~snapshot.loading
        self.asleep: Bools = np.array([g in snapshot.away for g in fleet.ids])
        self.wanted[:, :, self.asleep] = False
        self.held: Ints = bytes_by_group(ready | snapshot.loading, fleet.expert_bytes)
        self.free: Ints = fleet.budget_bytes - self.held

    def spare_on(self, group: int, size: int) -> tuple[int, int] | None:
        """A planned replica of `group` that others also serve, and whose bytes would do."""
        snapshot = self.snapshot
        others = snapshot.ready.sum(2) > 1
        layer, expert = np.nonzero(snapshot.ready[:, :, group] & others & self.goal[:, :, group])
        for la, e in zip(layer.tolist(), expert.tolist(), strict=True):
            kept = self.goal[la, e] & snapshot.ready[la, e]
            enough = self.free[group] + int(snapshot.fleet.expert_bytes[la]) >= size
            if enough and kept.sum() > 1:
                return la, e
        return None

    def detour_from(self, group: int) -> tuple[int, int, int] | None:
        """An expert that must leave `group`, and a third group with room for it meanwhile."""
        snapshot = self.snapshot
        sizes = snapshot.fleet.expert_bytes
        draining = np.array([g in snapshot.draining for g in snapshot.fleet.ids])
        leaving = snapshot.ready[:, :, group] & ~self.goal[:, :, group]
        for layer, expert in np.argwhere(leaving).tolist():
            room = self.free + self.reserve
            free = (room >= sizes[layer]) & ~draining & ~snapshot.ready[layer, expert]
            free[group] = False
            free &= ~self.asleep
            if free.any():
                return layer, expert, int(np.where(free, room, -1).argmax())
        return None
