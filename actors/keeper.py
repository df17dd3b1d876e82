"""Keeps the groups of a deployment alive: starts, finds, watches, replaces and ends them.

Level-triggered: `follow` says which groups there are to be, `tend` compares with what is and
starts the next call where the two differ. Every call can be repeated, so that a controller that
starts anew just looks and goes on. What the groups hold is none of its business (actors/hands.py).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.cluster import RayCluster
from actors.fleet import DRAINED, LOADING, LOST, PENDING, READY, STARTING, LiveGroup, reason
from actors.intent import Intent
from actors.spawn import RUNNING, group_name
from actors.starting import spec_of
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.types import Bools
from raymoe.budget import fleet_of, memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.errors import ConfigError
from raymoe.table import GroupEndpoint

log = logging.getLogger("raymoe.controller")
_RESTART_PAUSE_S = (0.0, 0.5, 2.0, 5.0, 15.0)  # by deaths in a row, the last for all further ones
_HEAD_PAUSE_S = 5.0  # before it is tried again when Ray itself could not start a group
_LOOK_S = 15.0  # a start that takes longer is looked into, this often
_MOST_SAMPLES = 4096  # timings of a group kept until they are looked at


class GroupKeeper:
    """All groups by id, in the order of every array. `lock` guards what callbacks change."""

    def __init__(
        self,
        config: DeploymentConfig,
        spec: ModelSpec,
        term: int,
        lock: threading.RLock,
        cluster: RayCluster,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._spec, self._lock = config, spec, lock
        self._cluster, self._calls, self._term = cluster, cluster.calls, term
        self._clock = clock
        place = config.placement
        self._every_s = min(place.interval_s, place.unreachable_s / 4)
        self._tended_s = clock()
        self._stopping = False
        self._kinds = {kind.kind: kind for kind in config.groups}
        self._budget = memory_bytes(config, spec)
        self._lives: dict[str, int] = {}  # the last life of each id, also of groups that ended
        self.groups: dict[str, LiveGroup] = {}
        self.changes = 0  # grows whenever what can be served has changed

    def begin(self, intent: Intent) -> None:
        """Finds the groups that run already, by name, and starts the others."""
        alive = self._cluster.names_alive()
        with self._lock:
            for member in intent.members:
                group = self._add(member.id, member.kind, member.draining != "")
                prefix = group_name(self._config.name, group.id, 0).removesuffix("0")
                lives = sorted(int(n.removeprefix(prefix)) for n in alive if n.startswith(prefix))
                group.gone_since_s = self._clock()
                if lives and self._adopt(group, lives[-1]):
                    group.was_up = True
                elif not group.draining:
                    self._spawn(group)
            self._end_strays(alive)

    def follow(self, intent: Intent) -> None:
        """The groups there are to be from now on: starts new ones, and those wanted back."""
        with self._lock:
            for member in intent.members:
                group = self.groups.get(member.id)
                if group is None:
                    self._spawn(self._add(member.id, member.kind, member.draining != ""))
                    continue
                group.draining = member.draining != ""
                if group.state == DRAINED and not group.draining:
                    self._spawn(group)
            wanted = {member.id for member in intent.members}
            for group_id in [i for i in self.groups if i not in wanted]:
                self.end(group_id)
                del self.groups[group_id]

    def hear(self, timeout_s: float) -> None:
        """Takes what has come in; waits for it up to `timeout_s`."""
        self._calls.wait(min(timeout_s, self._every_s))

    def tend(self) -> None:
        """Starts what is due, and ends what has not answered for long."""
        with self._lock:
            now = self._clock()
            # Only time that this loop was awake: while it stood still itself (a stopped process,
            # a paused machine, a long plan) answers that had come were not read.
            awake_s = min(now - self._tended_s, 2 * self._every_s)
            self._tended_s = now
            for group in self.groups.values():
                if self._stopping:
                    return
                if group.pinged or not group.up:
                    group.silent_s += awake_s
                self._tend_group(group, now)

    def end(self, group_id: str) -> None:
        """Ends the process of a group that has been emptied (or never came up)."""
        with self._lock:
            group = self.groups[group_id]
            if group.actor is not None:  # nobody sends to it any more, so nothing is lost
                self._cluster.kill_frozen(group.actor, group.node, group.pid)
            life = group.incarnation
            self._clear(group)
            group.state = DRAINED
            group.incarnation = self._lives[group_id] = life + 1  # what it says now is old news
            group.retry_at_s, group.gone_since_s = None, None
            group.last_error, group.was_up = "", False
            self.changes += 1

    def stop(self) -> None:
        """Ends every group."""
        with self._lock:
            self._stopping = True
            actors = [g.actor for g in self.groups.values() if g.actor is not None]
        self._cluster.close_all(actors, patience_s=1.5)

    def _end_strays(self, alive: set[str]) -> None:
        """Lives that an earlier controller had given up but did not come to end."""
        kept = {group_name(self._config.name, g.id, g.incarnation) for g in self.groups.values()}
        prefix = group_name(self._config.name, "", 0).removesuffix(":0")
        for name in sorted(alive - kept):
            if name.startswith(prefix):
                try:
                    self._cluster.kill(self._cluster.find(name))
                except ValueError:
                    continue  # it has ended since it was listed

    # ---- one group

    def _add(self, group_id: str, kind: str, draining: bool) -> LiveGroup:
        shape = (self._spec.layers, self._spec.experts)
        group = LiveGroup(
            id=group_id,
            kind=self._kinds[kind],
            memory_bytes=self._budget[kind],
            # above every life that an earlier controller started
            incarnation=max(self._term << 20, self._lives.get(group_id, 0)),
            resident=np.zeros(shape, np.bool_),
            loading=np.zeros(shape, np.bool_),
            draining=draining,
            spawned_s=self._clock(),
            state=DRAINED if draining else STARTING,
        )
        self.groups[group_id] = group
        return group

    def _tend_group(self, group: LiveGroup, now: float) -> None:
        if group.state == LOST:
            if group.draining:  # it was to go anyhow
                self.end(group.id)
            elif group.retry_at_s is not None and now >= group.retry_at_s:
                self._spawn(group)
        elif group.state in (STARTING, PENDING):
            self._look_at_start(group, now)
        elif group.up:
            if group.silent_s > self._config.placement.unreachable_s:
                self._abandon(group)
            else:
                self._ping(group, now)

    def _adopt(self, group: LiveGroup, life: int) -> bool:
        try:
            group.actor = self._cluster.find(group_name(self._config.name, group.id, life))
        except ValueError:  # it died since it was listed
            return False
        group.incarnation = self._lives[group.id] = life
        group.state, group.spawned_s = STARTING, -math.inf  # looked into at once
        self._watch(group)
        return True

    def _spawn(self, group: LiveGroup) -> None:
        group.incarnation += 1
        self._lives[group.id] = group.incarnation
        self._clear(group)
        group.state, group.spawned_s = STARTING, self._clock()
        group.retry_at_s, group.load_failures = None, 0
        if group.gone_since_s is None:
            group.gone_since_s = group.spawned_s
        try:
            group.actor = self._start(group)
        except Exception as error:  # Ray's head is away: what serves serves on
            log.exception("group %s is not started", group.id)
            group.state, group.last_error = LOST, f"cannot be started: {reason(error)}"
            group.retry_at_s = group.spawned_s + _HEAD_PAUSE_S
            group.deaths += not group.was_up  # so that a start that cannot succeed ends
            return
        self._watch(group)

    def _start(self, group: LiveGroup) -> Any:
        kind = group.kind
        # max_restarts=0: the death of a group that Ray does not restart is known within
        # milliseconds, and where its experts come back is decided here.
        return self._cluster.start_group(
            group_name(self._config.name, group.id, group.incarnation),
            {
                "max_restarts": 0,
                "max_concurrency": 8,
                "num_cpus": kind.num_cpus,
                "num_gpus": kind.num_gpus,
                "resources": kind.resources or None,
                "label_selector": kind.label_selector or None,
            },
            group_id=group.id,
            incarnation=group.incarnation,
            config=self._config.model_dump(mode="json"),
            spec_json=self._spec.to_json(),
            memory_bytes=group.memory_bytes,
            device=kind.device,
            slowdown=kind.slowdown,
            speed=group.pairs_per_s,
            gentle=group.was_up and self._others_can_serve(),
            vllm_kernels=kind.vllm_kernels,
        )

    def _others_can_serve(self) -> bool:
        """The groups that are up have room for every expert, whether they hold them or not."""
        up = tuple(spec_of(group) for group in self.groups.values() if group.up)
        try:
            place_at_start(fleet_of(self._config, self._spec, up))
        except PlacementError:
            return False
        return True

    @staticmethod
    def _clear(group: LiveGroup) -> None:
        """Nothing is known of it any more."""
        group.actor, group.endpoint, group.pid = None, None, 0
        group.bringing = group.dropping = group.pinged = False
        group.resident[:] = False
        group.loading[:] = False
        group.resident_bytes = group.queued_pairs = 0
        group.reading_s = 0.0
        group.busy, group.worked, group.served_since = 0.0, None, None
        group.silent_s, group.stage = 0.0, PENDING
        group.samples.clear()

    def _watch(self, group: LiveGroup) -> None:
        """Asks the group who it is, and keeps one call open whose end tells of its death."""
        assert group.actor is not None
        life = group.incarnation

        def let_go(closed: bool | None, error: Exception | None) -> None:
            if closed or self._cluster.died(error):  # else a newer controller has it
                self._on_ended(group, life, error)

        self._calls.start(group.actor.hold.remote(self._term), let_go)
        self._calls.start(
            group.actor.describe.remote(self._term),
            lambda answer, error: self._on_up(group, life, answer, error),
        )

    def _on_up(self, group: LiveGroup, life: int, answer: Any, error: Exception | None) -> None:
        with self._lock:
            if life != group.incarnation:
                return
            if error is not None:
                group.last_error = reason(error)
                if not (self._cluster.died(error) or isinstance(error, ConfigError)):
                    self._cluster.kill(group.actor)  # it lives, but cannot say who it is
                return
            group.endpoint = GroupEndpoint.from_dict(answer["endpoint"])
            group.node, group.pid = answer["node"], answer["pid"]
            group.pairs_per_s = answer["speed"]
            group.resident = np.array(answer["resident"], np.bool_)
            group.resident_bytes = answer["resident_bytes"]
            group.silent_s, group.gone_since_s = 0.0, None
            group.state, group.was_up, group.last_error = LOADING, True, ""
            group.given_up = False
            self.changes += 1

    def _on_ended(self, group: LiveGroup, life: int, error: Exception | None) -> None:
        with self._lock:
            if self._stopping or life != group.incarnation or group.state == LOST:
                return
            now = self._clock()
            if group.gone_since_s is None:
                group.gone_since_s = now
            self._clear(group)
            group.state = LOST
            group.deaths += 1
            group.deaths_in_a_row += 1
            if error is not None and not group.last_error:
                group.last_error = reason(error)
            pause = _RESTART_PAUSE_S[min(group.deaths_in_a_row, len(_RESTART_PAUSE_S)) - 1]
            group.retry_at_s = now + pause
            self.changes += 1

    def became_ready(self, group: LiveGroup) -> None:
        """It holds all that is planned for it, for the first time in this life."""
        group.state = READY
        group.deaths_in_a_row = 0
        group.last_error = ""
        self.changes += 1

    def _look_at_start(self, group: LiveGroup, now: float) -> None:
        """One that takes long may wait for resources that the cluster does not have, for as long
        as it likes; or it hangs, and is ended."""
        place = self._config.placement
        limit_s = place.unreachable_s if group.stage == RUNNING else place.load_timeout_s
        if group.stage != PENDING and group.silent_s > limit_s:
            self._abandon(group)
            return
        if now - max(group.spawned_s, group.looked_s) < min(_LOOK_S, place.unreachable_s):
            return
        group.looked_s = now
        try:
            stage, group.node, group.pid = self._cluster.place_of(group.actor)
        except Exception:
            log.exception("Ray's head does not answer")
            return
        if stage != group.stage:
            group.stage, group.silent_s = stage, 0.0
        pending = stage == PENDING and now - group.spawned_s >= _LOOK_S
        if pending != (group.state == PENDING):
            group.state = PENDING if pending else STARTING
            group.last_error = "waits for resources: " + _asked_for(group) if pending else ""
            self.changes += 1

    def _ping(self, group: LiveGroup, now: float) -> None:
        """One call at a time, and not before its interval has passed: each answer wakes `tend`."""
        if group.pinged or now - group.pinged_at_s < self._every_s:
            return
        group.pinged, group.pinged_at_s = True, now
        life, asked = group.incarnation, group.asked

        def ponged(answer: Any, error: Exception | None) -> None:
            with self._lock:
                if life == group.incarnation:
                    group.pinged, group.silent_s = False, 0.0  # a refusal is an answer, too
                    if error is None:
                        group.queued_pairs = answer["queued_pairs"]
                        group.reading_s = answer["reading_s"]
                        group.has_worked(answer["busy_s"], self._clock())
                        group.served_since = answer["served_since"]
                        group.samples += answer["samples"]
                        del group.samples[:-_MOST_SAMPLES]
                        if group.asked == asked and not (group.bringing or group.dropping):
                            self._believe(group, answer)

        assert group.actor is not None
        self._calls.start(group.actor.ping.remote(self._term), ponged)

    def _believe(self, group: LiveGroup, answer: Any) -> None:
        """What it says it holds counts, while we ask nothing of it: a call of an earlier controller
        may have had its effect late."""
        bits = np.unpackbits(answer["resident"], count=group.resident.size)
        resident: Bools = bits.reshape(group.resident.shape).astype(np.bool_)
        if not np.array_equal(resident, group.resident):
            more, less = resident & ~group.resident, group.resident & ~resident
            log.warning(
                "group %s has %d replicas more and %d less than it told before",
                *(group.id, more.sum(), less.sum()),
            )
            group.resident[:], group.resident_bytes = resident, answer["resident_bytes"]
            self.changes += 1

    def _abandon(self, group: LiveGroup) -> None:
        """It does not answer (frozen, hung in its start, its node cut off): end it, start another
        life.

        Should it wake up, nobody talks to it any more: its incarnation is an old one.
        """
        group.last_error = f"did not answer for {group.silent_s:.0f} s"
        self._cluster.kill_frozen(group.actor, group.node, group.pid)
        self._on_ended(group, group.incarnation, None)


def _asked_for(group: LiveGroup) -> str:
    kind = group.kind
    asked = {"CPU": kind.num_cpus, "GPU": kind.num_gpus, **kind.resources}
    parts = [f"{amount:g} {name}" for name, amount in asked.items() if amount]
    parts += [f"label {name}={value}" for name, value in kind.label_selector.items()]
    return ", ".join(parts) or "a node"
