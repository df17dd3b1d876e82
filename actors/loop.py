"""The controller's loop: observe, ask the reconciler, execute. `turn` is one round of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from actors.cluster import RayCluster
from actors.executor import Executor
from actors.fleet import LOADING, LOST, PENDING, STARTING
from actors.hands import Hands
from actors.history import History
from actors.keeper import GroupKeeper
from actors.memory import Memory
from actors.observe import counted, give_up, live_fleet, self_measured, snapshot_of
from actors.publisher import Publisher
from actors.settings import autoscaler, reconcile_config
from actors.speeds import SpeedBook
from actors.starting import failing, may_place, spec_of
from actors.traffic import Behind, Traffic
from actors.wanted import Wanted
from placement.actions import Publish, Retire, Snapshot
from placement.dry_run import Basis
from placement.errors import PlacementError
from placement.reconcile import Reconciler
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.control import ControlServer
from raymoe.table import GroupEndpoint

T = TypeVar("T")
log = logging.getLogger("raymoe.controller")
_LOOK_AROUND_S = 2.0  # draining nodes and newer controllers are looked for so often


class TakenOver(RuntimeError):
    """There is a newer controller: this one has no say any more."""


class ControlLoop:
    """Everything the controller knows. `lock` guards it between `turn` and whoever asks."""

    def __init__(
        self,
        config: DeploymentConfig,
        spec: ModelSpec,
        control: ControlServer,
        memory: Memory,
        cluster: RayCluster,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._spec, self._control, self._memory = config, spec, control, memory
        self.lock = threading.RLock()
        self.term = memory.next_term()
        self.failed: str | None = None
        self.history = History()
        self.mind = Reconciler(
            config=reconcile_config(config, spec),
            term=self.term,
            autoscaler=autoscaler(config, spec),
        )
        self._cluster, self._clock = cluster, clock
        self.keeper = GroupKeeper(config, spec, self.term, self.lock, cluster, clock)
        self.groups = self.keeper.groups
        self.wanted = Wanted(config, spec, memory, self.keeper, self._changed)
        self._hands = Hands(self.groups, cluster.calls, self.lock, self.term, self._changed)
        self.executor = Executor(
            self._hands,
            self.mind.converger,
            clock,
            limit_bytes_per_s=config.placement.copy_bytes_per_s,
            noted=self.history.noted,
        )
        self.publisher = Publisher(control, self.term, memory.epoch(), memory.keep_epoch)
        self.speeds = SpeedBook()
        self._began_s = self._clock()
        self.traffic = Traffic(spec.layers, spec.experts, config.placement.window_s, self._began_s)
        self._behind = Behind(config.placement.ack_limit_s)
        self._placed = False
        self._nodes_leaving: set[str] = set()
        self._seen = -1  # the keeper's changes at the last step
        self._stepped_s = self._looked_s = 0.0
        self._give_up_s = math.inf  # when a group that is away is not waited for any longer

    # ---- one round

    def begin(self) -> None:
        """Finds or starts the groups."""
        self.keeper.begin(self.wanted.intent)
        if any(group.was_up for group in self.groups.values()):
            self.history.say(f"a new controller, term {self.term}, found groups that run")

    def turn(self, timeout_s: float) -> None:
        """Waits for news up to `timeout_s`; steps when there are any, or it is time."""
        self.keeper.hear(max(min(timeout_s, self._give_up_s - self._clock()), 0.0))
        with self.lock:
            now = self._clock()
            self._look_around(now)  # first: one that stood still may have a successor by now
            self.keeper.tend()
            news = self.keeper.changes != self._seen or now >= self._give_up_s
            if now >= self._give_up_s:
                self._give_up_s = math.inf  # until the next look at the groups says otherwise
            if not news and now - self._stepped_s < self._config.placement.interval_s:
                return
            self._seen, self._stepped_s = self.keeper.changes, now
            self.traffic.add(self._control.take_reports(), now)
            self._take_samples(now)
            self._hands.end_stuck()
            self._try(self.wanted.end_what_never_came)
            if self._may_place(now):
                self._step(now)

    def stop(self) -> None:
        """Ends every group."""
        self.keeper.stop()

    def basis(self) -> Basis | None:
        """What a plan made now would start from; None before the first placement."""
        return self.mind.basis(self._clock()) if self._placed else None

    def _step(self, now: float) -> None:
        snapshot = self._observe(now)
        if snapshot is None:
            return
        try:
            actions = self.mind.step(snapshot, now)
        except PlacementError as e:
            if self.publisher.table is not None:
                raise
            self.failed = str(e)  # one replica of each does not fit
            return
        self._placed = True
        self.executor.execute(actions, snapshot)
        self._make_way(snapshot)
        self.history.follow(self.mind)
        for action in actions:
            if isinstance(action, Retire):
                self.history.say(f"group {action.group} retires: {action.why}")
            self._try(partial(self.wanted.act, action))
        measured = self.speeds.measured({g.id: g.kind.kind for g in self.groups.values()})
        for action in actions:
            if isinstance(action, Publish) and (self._all_served() or not self._starting()):
                self.publisher.publish(action.table, self._endpoints(), measured)
        self.publisher.follow_endpoints(self._endpoints(), measured)
        self._tell_ready(snapshot)

    def _observe(self, now: float) -> Snapshot | None:
        config = self._config
        place = config.placement
        # What nobody serves is restored soon; further copies can wait for the group to come back,
        # instead of being made elsewhere and then made again when it is there.
        wait_s = max(place.restore_s, place.return_s) if self._all_served() else place.restore_s
        self._give_up_s = give_up(self.groups.values(), wait_s, now)
        groups = counted(self.groups.values())
        if not groups:
            return None
        kinds = {group.id: group.kind.kind for group in groups}
        if not self._placed:
            self_measured(groups)
        fleet = live_fleet(
            config, self._spec, groups, self.speeds.measured(kinds), self.speeds.tokens_per_s(now)
        )
        table = self.publisher.table
        drained = 0
        if table is not None:
            drained = self._behind.drained(table.order, self._control.behind(table.order), now)
        counts, window_s = self.traffic.window(now)
        coming = [g for g in self.groups.values() if g.id not in kinds and not g.draining]
        starting = tuple(spec_of(g) for g in coming if g.state in (STARTING, PENDING, LOST))
        pending = frozenset(g.id for g in coming if g.state == PENDING)
        queue_s = max(g.queued_pairs / r for g, r in zip(groups, fleet.pair_rate, strict=True))
        return snapshot_of(
            fleet,
            groups,
            starting,
            pending,
            table=table,
            drained=drained,
            counts=counts,
            window_s=window_s,
            queue_s=queue_s,
            intent=self.wanted.intent,
            nodes_leaving=self._nodes_leaving,
        )

    def _make_way(self, snapshot: Snapshot) -> None:
        """What presses comes into its new group as fast as it goes, and at once."""
        target = self.mind.target
        if target is None:
            return
        wanted = target.resident & snapshot.pressing[:, :, None] & ~snapshot.ready
        for g in np.flatnonzero(wanted.any((0, 1))):
            if snapshot.fleet.ids[g] in self.groups:
                self._hands.make_way(snapshot.fleet.ids[g])

    def _tell_ready(self, snapshot: Snapshot) -> None:
        """A group that has come so far as to hold all that is planned for it is ready; what fails
        to load there is not waited for."""
        if self.mind.target is None:
            return
        awaited, failing = self.mind.awaited, self.mind.converger.failing
        for g, group_id in enumerate(snapshot.fleet.ids):
            group = self.groups.get(group_id)
            if group is None or group.state != LOADING:
                continue
            if not (awaited[:, :, g] & ~group.resident).any():
                error = group.last_error
                self.keeper.became_ready(group)
                group.last_error = error if failing.troubled(group_id) else ""

    # ---- how far it is

    def _may_place(self, now: float) -> bool:
        if self._starting() and self.failed is None:
            self.failed = failing(self.groups.values())
        if self.failed:
            return False
        waited_s = now - self._began_s
        return self._placed or may_place(self._config, self._spec, self.groups.values(), waited_s)

    def _starting(self) -> bool:
        """While starting nobody can serve anyhow: the first table is a complete one."""
        return self.publisher.table is None and self.term == 1

    def complete(self) -> bool:
        """Every expert has a ready replica, and clients were told."""
        return self._placed and self.publisher.table is not None and self._all_served()

    @property
    def problem(self) -> str:
        """Why some experts cannot be served, or a drain does not end, and what to do; "" when all
        is well, or will be soon."""
        if not (self.failed or self._placed):
            return failing(self.groups.values()) or ""
        missing = self.mind.missing
        emptied = ", ".join(g.id for g in self.groups.values() if g.up and g.draining)
        if self.failed or not missing or (self.complete() and not emptied):
            return self.failed or ""
        troubled = self.mind.converger.failing.troubled
        errors = [f"{g.id}: {g.last_error}" for g in self.groups.values() if troubled(g.id)]
        waits = f"the drain of {emptied} waits: " if self.complete() else ""
        return waits + missing + (f" ({'; '.join(errors)})" if errors else "")

    def _all_served(self) -> bool:
        served = np.logical_or.reduce([g.resident for g in self.groups.values()])
        return int(served.sum()) == sum(self._spec.experts_of_layer)

    def progress(self) -> dict[str, object]:
        """How far the start is: {"ready", "failed", "text"}."""
        with self.lock:
            groups = [g for g in self.groups.values() if not g.draining]
            text = f"groups up {sum(g.up for g in groups)}/{len(groups)}"
            if self._placed:
                held = np.logical_or.reduce([g.resident for g in self.groups.values()])
                text += f", experts loaded {int(held.sum())}/{sum(self._spec.experts_of_layer)}"
            troubled = [f"{g.id}: {g.last_error}" for g in groups if g.last_error]
            text += f" ({'; '.join(troubled)})" if troubled else ""
            return {"ready": self.complete(), "failed": self.failed, "text": text}

    # ---- looking around

    def _look_around(self, now: float) -> None:
        if now - self._looked_s < _LOOK_AROUND_S:
            return
        self._looked_s = now
        try:
            newest, leaving = self._memory.term(), self._cluster.draining_nodes()
        except Exception:
            log.exception("Ray's head does not answer")
            return
        if newest > self.term:
            raise TakenOver(f"a controller of term {newest} has taken over from {self.term}")
        self._nodes_leaving = leaving
        for group_id in self._try(partial(self.wanted.leave_nodes, leaving)) or ():
            self.history.say(f"the node of group {group_id} is about to go: it is replaced")

    @staticmethod
    def _try(change: Callable[[], T]) -> T | None:
        """What needs Ray's head, which may be away: it is asked for again at the next step."""
        try:
            return change()
        except Exception:
            log.exception("not done now")
            return None

    def _take_samples(self, now: float) -> None:
        for group in self.groups.values():
            if group.up:
                samples, group.samples = group.samples, []
                self.speeds.add(group.id, group.kind.kind, samples, now)
            else:
                self.speeds.forget(group.id)

    def _endpoints(self) -> dict[str, GroupEndpoint]:
        return {g.id: g.endpoint for g in self.groups.values() if g.endpoint is not None}

    def _changed(self) -> None:
        self.keeper.changes += 1
