"""The controller's loop: observe, ask the reconciler, execute. `turn` is one round of it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

import numpy as np

from actors.executor import Executor
from actors.fleet import DRAINED, LOADING, PENDING, STARTING, Calls, LiveGroup
from actors.hands import Hands
from actors.history import History
from actors.intent import SCALE, Intent, replaced
from actors.keeper import GroupKeeper
from actors.memory import Memory
from actors.observe import counted, live_fleet, self_measured, snapshot_of
from actors.publisher import Publisher
from actors.settings import autoscaler, reconcile_config
from actors.spawn import draining_nodes
from actors.speeds import SpeedBook
from actors.traffic import Behind, Traffic
from placement.actions import Action, Drain, Publish, Retire, Snapshot, Spawn
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.reconcile import Reconciler
from placement.types import GroupSpec
from raymoe.budget import fleet_of, memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.control import ControlServer
from raymoe.table import GroupEndpoint

log = logging.getLogger("raymoe.controller")
_MAX_START_FAILURES = 3  # deaths or failed loads of a group before it ever served: give up
_ADOPT_S = 5.0  # a restarted controller waits so long for groups that do not answer
_LOOK_AROUND_S = 2.0  # draining nodes and newer controllers are looked for so often


class ControlLoop:
    """Everything the controller knows. `lock` guards it between `turn` and whoever asks."""

    def __init__(
        self, config: DeploymentConfig, spec: ModelSpec, control: ControlServer, memory: Memory
    ) -> None:
        self._config, self._spec, self._control, self._memory = config, spec, control, memory
        self.lock = threading.RLock()
        self.term = memory.next_term()
        self.intent = _stored_intent(config, memory)
        self.failed: str | None = None
        self.history = History()
        self.mind = Reconciler(
            config=reconcile_config(config, spec),
            term=self.term,
            autoscaler=autoscaler(config, spec),
        )
        calls = Calls()
        self.keeper = GroupKeeper(config, spec, self.term, self.lock, calls)
        self.groups = self.keeper.groups
        hands = Hands(self.groups, calls, self.lock, self.term, self._changed)
        self.executor = Executor(
            hands,
            self.mind.converger,
            time.monotonic,
            limit_bytes_per_s=config.placement.copy_bytes_per_s,
            noted=self.history.noted,
        )
        self.publisher = Publisher(control, self.term, memory.epoch(), memory.keep_epoch)
        self.speeds = SpeedBook()
        self._began_s = time.monotonic()
        self.traffic = Traffic(spec.layers, spec.experts, config.placement.window_s, self._began_s)
        self._behind = Behind(config.placement.ack_limit_s)
        self._placed = False
        self._seen = -1  # the keeper's changes at the last step
        self._stepped_s = self._looked_s = 0.0

    # ---- one round

    def begin(self) -> None:
        """Finds or starts the groups."""
        self.keeper.begin(self.intent)
        if any(group.was_up for group in self.groups.values()):
            self.history.say(f"a new controller, term {self.term}, found groups that run")

    def turn(self, timeout_s: float) -> None:
        """Waits for news up to `timeout_s`; steps when there are any, or it is time."""
        self.keeper.tend(timeout_s)
        with self.lock:
            now = time.monotonic()
            self._look_around(now)
            news = self.keeper.changes != self._seen
            if not news and now - self._stepped_s < self._config.placement.interval_s:
                return
            self._seen, self._stepped_s = self.keeper.changes, now
            self.traffic.add(self._control.take_reports(), now)
            self._take_samples(now)
            self._end_what_never_came()
            self._give_up_a_failing_start()
            if self._may_place(now):
                self._step(now)

    def stop(self) -> None:
        """Ends every group."""
        self.keeper.stop()

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
        self.history.follow(self.mind)
        for action in actions:
            self._act(action)
        measured = self.speeds.measured({g.id: g.kind.kind for g in self.groups.values()})
        for action in actions:
            if isinstance(action, Publish) and (self._all_served() or not self._starting()):
                self.publisher.publish(action.table, self._endpoints(), measured)
        self.publisher.follow_endpoints(self._endpoints(), measured)
        self._tell_ready(snapshot)

    def _observe(self, now: float) -> Snapshot | None:
        config = self._config
        groups = counted(self.groups.values(), config.placement.restore_s, now)
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
        starting = tuple(
            _spec_of(group)
            for group in self.groups.values()
            if group.state in (STARTING, PENDING) and group.id not in kinds
        )
        queue_s = max(g.queued_pairs / r for g, r in zip(groups, fleet.pair_rate, strict=True))
        return snapshot_of(
            fleet,
            groups,
            starting,
            table=table,
            drained=drained,
            counts=counts,
            window_s=window_s,
            queue_s=queue_s,
        )

    def _act(self, action: Action) -> None:
        """Groups that come and go."""
        if isinstance(action, Retire):
            self.history.say(f"group {action.group} retires: {action.why}")
            self.keeper.end(action.group)
            self.want(self.intent.retired(action.group))
        elif isinstance(action, Spawn):
            kind = next(k for k in self._config.groups if k.kind == action.kind)
            if kind.max_count is None or len(self.intent.active(action.kind)) < kind.max_count:
                self.want(self.intent.added(action.group, action.kind))
        elif isinstance(action, Drain):
            member = self.intent.member(action.group)
            kind = next(k for k in self._config.groups if k.kind == member.kind)
            if not member.draining and len(self.intent.active(member.kind)) > kind.min_count:
                self.want(self.intent.with_draining(action.group, SCALE))

    def _tell_ready(self, snapshot: Snapshot) -> None:
        """A group that has come so far as to hold all that is planned for it is ready."""
        target = self.mind.target
        if target is None:
            return
        for g, group_id in enumerate(snapshot.fleet.ids):
            group = self.groups.get(group_id)
            if group is None or group.state != LOADING:
                continue
            if not (target.resident[:, :, g] & ~group.resident).any():
                self.keeper.became_ready(group)

    # ---- before the first plan

    def _may_place(self, now: float) -> bool:
        """The groups are up, or those that are not are not waited for."""
        if self.failed:
            return False
        if self._placed:
            return True
        wanted = [g for g in self.groups.values() if not g.draining]
        if wanted and all(g.up for g in wanted):
            return True
        waited_s = now - self._began_s
        if any(g.resident.any() for g in self.groups.values()):
            return waited_s > _ADOPT_S
        up = tuple(_spec_of(g) for g in wanted if g.up)
        rest_pends = all(g.up or g.state == PENDING for g in wanted)
        if not up or not rest_pends or waited_s < self._config.placement.pending_s:
            return False
        try:
            place_at_start(fleet_of(self._config, self._spec, up))
        except PlacementError:
            return False  # too small without those that wait for resources
        return True

    def _starting(self) -> bool:
        """While starting nobody can serve anyhow: the first table is a complete one."""
        return self.publisher.table is None and self.term == 1

    def _give_up_a_failing_start(self) -> None:
        if not self._starting():
            return
        for group in self.groups.values():
            if max(group.deaths, group.load_failures) >= _MAX_START_FAILURES:
                self.failed = f"expert group {group.id} does not start: {group.last_error}"

    def complete(self) -> bool:
        """Every expert has a ready replica, and clients were told."""
        return self._placed and self.publisher.table is not None and self._all_served()

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

    # ---- what is wanted

    def want(self, intent: Intent) -> None:
        """From now on these groups, durably."""
        if intent != self.intent:
            self.intent = intent
            self._memory.keep_intent(_to_store(self._config, intent))
            self.keeper.follow(intent)
            self._changed()

    def check_room(self, intent: Intent) -> None:
        """Raises PlacementError, with the bytes, when one of each expert does not fit the groups
        that would stay."""
        budget = memory_bytes(self._config, self._spec)
        staying = tuple(
            GroupSpec(id=m.id, node="?", memory_bytes=budget[m.kind])
            for m in intent.members
            if not m.draining
        )
        place_at_start(fleet_of(self._config, self._spec, staying))

    def cheapest_to_give_up(self) -> Sequence[str]:
        """Ids: first groups that do not run, then those that hold the fewest bytes that nobody
        else holds; the youngest first among equals."""
        groups = list(self.groups.values())
        copies = np.sum([g.resident for g in groups], axis=0)
        sizes = np.array(self._spec.expert_bytes)
        order = [
            (g.up, int(((g.resident & (copies == 1)).sum(1) * sizes).sum()), -at, g.id)
            for at, g in enumerate(groups)
        ]
        return [group_id for *_, group_id in sorted(order)]

    def _end_what_never_came(self) -> None:
        """Groups to be emptied that do not run hold nothing: they end, and are forgotten."""
        for member in self.intent.members:
            group = self.groups.get(member.id)
            if not member.draining or group is None or group.up:
                continue
            if group.state != DRAINED:
                self.keeper.end(member.id)
            self.want(self.intent.retired(member.id))

    # ---- looking around

    def _look_around(self, now: float) -> None:
        if now - self._looked_s < _LOOK_AROUND_S:
            return
        self._looked_s = now
        try:
            newest, leaving = self._memory.term(), draining_nodes()
        except Exception:
            log.exception("Ray's head does not answer")
            return
        if newest > self.term:
            log.error("a controller of term %d has taken over from %d", newest, self.term)
            os._exit(1)
        for group in list(self.groups.values()):
            if group.up and group.node in leaving and not group.draining:
                self.history.say(f"node {group.node} is about to go: {group.id} is replaced")
                self.want(replaced(self._config, self.intent, group.id))

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


def _spec_of(group: LiveGroup) -> GroupSpec:
    return GroupSpec(
        id=group.id, node=group.node or "?", memory_bytes=group.memory_bytes, kind=group.kind.kind
    )


def _to_store(config: DeploymentConfig, intent: Intent) -> dict[str, object]:
    return {**intent.to_dict(), "configured": {k.kind: k.count for k in config.groups}}


def _stored_intent(config: DeploymentConfig, memory: Memory) -> Intent:
    """What an earlier controller of this deployment, so configured, was asked for."""
    stored = memory.intent()
    asked = Intent.of(config)
    if stored is None or stored["configured"] != _to_store(config, asked)["configured"]:
        return asked
    return Intent.from_dict(stored)
