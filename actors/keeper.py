"""Keeps the groups of a deployment alive and brings each to what it is assigned.

Level-triggered: `tend` compares what is with what is to be, and starts the next call where the two
differ. Every call can be repeated, so that a controller that starts anew just looks and goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import psutil
import ray

from actors.expert_group import ExpertGroup
from actors.fleet import LOADING, LOST, READY, STARTING, Calls, LiveGroup, reason
from actors.spawn import find, group_name, names_alive, spawn
from raymoe.budget import group_ids, memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.table import GroupEndpoint

_RESTART_PAUSE_S = (0.0, 0.5, 2.0, 5.0, 15.0)  # by deaths in a row, the last for all further ones
_LOAD_PAUSE_S = 2.0  # after a load that failed in a group that lives
_LOAD_AT_ONCE = 32  # experts in one call
_DROP_AFTER_S = 1.0  # a replica out of the table is kept so long for what is on its way


class GroupKeeper:
    """All groups by id, in the order of every array. `lock` guards what callbacks change."""

    def __init__(
        self, config: DeploymentConfig, spec: ModelSpec, term: int, lock: threading.RLock
    ) -> None:
        self._config, self._spec, self._lock = config, spec, lock
        self._calls = Calls()
        self._stopping = False
        self._unassigned_since: dict[str, float] = {}
        self.changes = 0  # grows whenever what can be served has changed
        budget = memory_bytes(config, spec)
        shape = (spec.layers, spec.experts)
        self.groups = {
            group_id: LiveGroup(
                id=group_id,
                kind=kind,
                memory_bytes=budget[kind.kind],
                incarnation=term << 20,  # above every life that an earlier controller started
                assigned=np.zeros(shape, np.bool_),
                resident=np.zeros(shape, np.bool_),
                borrowed=np.zeros(shape, np.bool_),
            )
            for group_id, kind in group_ids(config)
        }

    def begin(self) -> None:
        """Finds the groups that run already, by name, and starts the others."""
        alive = names_alive()
        for group in self.groups.values():
            prefix = group_name(self._config.name, group.id, 0).removesuffix("0")
            lives = sorted(int(n.removeprefix(prefix)) for n in alive if n.startswith(prefix))
            with self._lock:
                group.gone_since_s = time.monotonic()
                if not lives or not self._adopt(group, lives[-1]):
                    self._spawn(group)

    def tend(self, timeout_s: float) -> None:
        """Takes what has come in, waits for it up to `timeout_s`, and starts what is due."""
        self._calls.wait(timeout_s)
        with self._lock:
            now = time.monotonic()
            for group in self.groups.values():
                if self._stopping:
                    return
                self._tend_group(group, now)

    def stop(self) -> None:
        """Ends every group."""
        with self._lock:
            self._stopping = True
            actors = [g.actor for g in self.groups.values() if g.actor is not None]
        refs = [actor.close.remote() for actor in actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=1.5)
        for actor in actors:
            ray.kill(actor)

    # ---- one group

    def _tend_group(self, group: LiveGroup, now: float) -> None:
        if group.state == LOST:
            if group.retry_at_s is not None and now >= group.retry_at_s:
                self._spawn(group)
            return
        if not group.up:
            return
        if now - group.heard_s > self._config.placement.unreachable_s:
            self._abandon(group)
            return
        self._ping(group, now)
        due = group.retry_at_s is None or now >= group.retry_at_s
        if due and not group.busy and not self._load(group):
            self._drop(group, now)

    def _adopt(self, group: LiveGroup, life: int) -> bool:
        try:
            group.actor = find(group_name(self._config.name, group.id, life))
        except ValueError:  # it died since it was listed
            return False
        group.incarnation = life
        self._watch(group)
        return True

    def _spawn(self, group: LiveGroup) -> None:
        kind = group.kind
        group.incarnation += 1
        group.state, group.endpoint = STARTING, None
        group.retry_at_s, group.busy, group.load_failures = None, False, 0
        # max_restarts=0: the death of a group that Ray does not restart is known within
        # milliseconds, and where its experts come back is decided here.
        group.actor = spawn(
            ExpertGroup,
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
        )
        self._watch(group)

    def _watch(self, group: LiveGroup) -> None:
        """Asks the group who it is, and keeps one call open whose end tells of its death."""
        assert group.actor is not None
        life = group.incarnation
        self._calls.start(
            group.actor.hold.remote(), lambda _, error: self._on_ended(group, life, error)
        )
        self._calls.start(
            group.actor.describe.remote(), lambda answer, e: self._on_up(group, life, answer, e)
        )

    def _on_up(self, group: LiveGroup, life: int, answer: Any, error: Exception | None) -> None:
        with self._lock:
            if life != group.incarnation:
                return
            if error is not None:
                group.last_error = reason(error)
                if not isinstance(error, ray.exceptions.RayActorError):
                    ray.kill(group.actor)  # it lives, but cannot say who it is
                return
            group.endpoint = GroupEndpoint.from_dict(answer["endpoint"])
            group.node, group.pid = answer["node"], answer["pid"]
            group.pairs_per_s = answer["speed"]
            group.resident = np.array(answer["resident"], np.bool_)
            group.resident_bytes = answer["resident_bytes"]
            group.heard_s, group.gone_since_s = time.monotonic(), None
            group.state = LOADING
            self.changes += 1

    def _on_ended(self, group: LiveGroup, life: int, error: Exception | None) -> None:
        with self._lock:
            if self._stopping or life != group.incarnation or group.state == LOST:
                return
            now = time.monotonic()
            if group.gone_since_s is None:
                group.gone_since_s = now
            group.state, group.actor, group.endpoint, group.pid = LOST, None, None, 0
            group.busy = group.pinged = False
            group.deaths += 1
            group.deaths_in_a_row += 1
            group.resident[:] = False
            group.resident_bytes = 0
            if error is not None and not group.last_error:
                group.last_error = reason(error)
            pause = _RESTART_PAUSE_S[min(group.deaths_in_a_row, len(_RESTART_PAUSE_S)) - 1]
            group.retry_at_s = now + pause
            self.changes += 1

    def _ping(self, group: LiveGroup, now: float) -> None:
        """One call at a time, and not before its interval has passed: each answer wakes `tend`."""
        placement = self._config.placement
        every_s = min(placement.interval_s, placement.unreachable_s / 4)
        if group.pinged or now - group.pinged_at_s < every_s:
            return
        group.pinged, group.pinged_at_s = True, now
        life = group.incarnation

        def ponged(_: Any, error: Exception | None) -> None:
            with self._lock:
                if life == group.incarnation:
                    group.pinged = False
                    if error is None:
                        group.heard_s = time.monotonic()

        assert group.actor is not None
        self._calls.start(group.actor.ping.remote(), ponged)

    def _abandon(self, group: LiveGroup) -> None:
        """It runs but does not answer (frozen, its node cut off): end it, start another life.

        Should it wake up, nobody talks to it any more: its incarnation is an old one.
        """
        silent_s = time.monotonic() - group.heard_s
        group.last_error = f"did not answer for {silent_s:.0f} s"
        ray.kill(group.actor)
        if group.node == str(ray.get_runtime_context().get_node_id()):
            # Ray asks the process to end itself, which a stopped one does not hear.
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if "ExpertGroup" in " ".join(psutil.Process(group.pid).cmdline()):
                    os.kill(group.pid, signal.SIGKILL)
        self._on_ended(group, group.incarnation, None)

    # ---- towards what is assigned

    def _load(self, group: LiveGroup) -> bool:
        """Asks for the next few experts that are missing; whether there were any."""
        missing = np.argwhere(group.assigned & ~group.resident)
        if not len(missing):
            if group.state == LOADING and group.assigned.any():
                group.state = READY
                group.deaths_in_a_row = 0
                group.last_error = ""
                self.changes += 1
            return False
        pairs = [(int(layer), int(expert)) for layer, expert in missing[:_LOAD_AT_ONCE]]
        self._change(group, "load", pairs, present=True)
        return True

    def _drop(self, group: LiveGroup, now: float) -> None:
        """Frees what is no longer assigned, once nothing sent by the last table is on its way."""
        surplus = np.argwhere(group.resident & ~group.assigned)
        if not len(surplus) or not group.assigned.any():
            self._unassigned_since.pop(group.id, None)
            return
        since = self._unassigned_since.setdefault(group.id, now)
        if now - since >= _DROP_AFTER_S:
            pairs = [(int(layer), int(expert)) for layer, expert in surplus]
            self._change(group, "drop", pairs, present=False)

    def _change(
        self, group: LiveGroup, method: str, pairs: list[tuple[int, int]], *, present: bool
    ) -> None:
        life = group.incarnation
        group.busy = True

        def done(resident_bytes: Any, error: Exception | None) -> None:
            with self._lock:
                if life != group.incarnation:
                    return
                group.busy = False
                if error is not None:
                    group.last_error = f"{method}: {reason(error)}"
                    group.load_failures += 1
                    group.retry_at_s = time.monotonic() + _LOAD_PAUSE_S
                    return
                for layer, expert in pairs:
                    group.resident[layer, expert] = present
                group.resident_bytes = resident_bytes
                group.retry_at_s = None
                self.changes += 1

        assert group.actor is not None
        self._calls.start(getattr(group.actor, method).remote(pairs), done)
