"""The placement controller actor: assigns experts to groups and publishes the table.

It observes and executes; where experts go is decided in `placement`, lives of groups are kept in
`actors/keeper.py`. Routers and groups serve on when it dies: Ray restarts it, it finds the groups
of its deployment by name, and what they hold stays where it is.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.fleet import Bools, reason
from actors.keeper import GroupKeeper
from actors.spawn import controller_name, find, spawn
from actors.views import balancedness, group_row, placement_view, router_rows
from placement.complete import complete
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.table import Table, make_table
from placement.types import Placement
from raymoe.budget import fleet_of
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.control import ControlServer
from raymoe.identity import identity_of
from raymoe.table import RoutingTable

__all__ = ["PlacementController", "ensure_controller", "find_controller", "reason"]

log = logging.getLogger("raymoe.controller")
_SAME_SPEED = 0.25  # speeds measured this close to the fastest group's are taken for equal
_MAX_START_FAILURES = 3  # deaths or failed loads of a group before it ever served: give up
_LOAD_TAU_S = 10.0  # the load shown is smoothed over about this long
_ROUTER_SILENT_S = 5.0
_ADOPT_S = 5.0  # a restarted controller waits so long for groups that do not answer


class PlacementController:
    """One per deployment. Public methods are called through Ray, from several threads."""

    def __init__(self, config: dict[str, Any], spec_json: str) -> None:
        logging.basicConfig(level=logging.INFO)
        self._config = DeploymentConfig.model_validate(config)
        self._spec = ModelSpec.from_json(spec_json)
        self._lock = threading.RLock()
        self._table: Table | None = None
        self._placed = False
        self._home: Bools | None = None  # [L, E, G] as first placed
        self._why: dict[tuple[int, int, str], tuple[float, str]] = {}
        self._routers: dict[str, dict[str, Any]] = {}
        self._failed: str | None = None
        self._load = np.zeros((self._spec.layers, self._spec.experts))  # pairs/s
        self._counted_at_s = self._began_s = time.monotonic()
        self._memory = _Memory(self._config.name)
        self._term, self._epoch = self._memory.next_term(), self._memory.epoch()
        self._stop = threading.Event()
        secret = read_secret(self._config)
        identity = identity_of(self._config, self._spec)
        self._control = ControlServer(identity, secret, host=_listen_host(self._config))
        self._keeper = GroupKeeper(self._config, self._spec, self._term, self._lock)
        self._groups = self._keeper.groups
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    # ---- what others ask

    def identity(self) -> dict[str, Any]:
        """What this controller serves: {"fingerprint", "config"}."""
        return {
            "fingerprint": self._spec.fingerprint,
            "config": self._config.model_dump(mode="json"),
        }

    def control_address(self) -> tuple[str, int]:
        """Where clients connect for tables: (host, port)."""
        return self._control.address

    def router_beat(self, info: dict[str, Any]) -> None:
        """A router says that it is there: {"id", "pid", "node", "state", "endpoint", "profile"}."""
        with self._lock:
            self._routers[info["id"]] = {**info, "seen": time.monotonic()}

    def routers(self) -> list[dict[str, Any]]:
        """Routers heard of lately, with the address of their token stream."""
        with self._lock:
            now = time.monotonic()
            self._routers = {
                k: r for k, r in self._routers.items() if now - r["seen"] < _ROUTER_SILENT_S
            }
            return [{k: v for k, v in r.items() if k != "seen"} for r in self._routers.values()]

    def progress(self) -> dict[str, Any]:
        """How far the start is: {"ready", "failed", "text"}."""
        with self._lock:
            groups = self._groups.values()
            text = f"groups up {sum(g.up for g in groups)}/{len(groups)}"
            if self._placed:
                wanted = sum(int(g.assigned.sum()) for g in groups)
                text += f", experts loaded {sum(int(g.serving.sum()) for g in groups)}/{wanted}"
            troubled = [f"{g.id}: {g.last_error}" for g in groups if g.last_error]
            text += f" ({'; '.join(troubled)})" if troubled else ""
            return {"ready": self._complete(), "failed": self._failed, "text": text}

    def status(self) -> dict[str, Any]:
        """The answer of `raymoe status --json`."""
        with self._lock:
            return {
                "deployment": self._config.name,
                "model": self._config.served_model_name,
                "family": self._spec.family,
                "ready": self._complete(),
                "term": self._term,
                "epoch": self._epoch,
                "balancedness": balancedness(self._table, self._load),
                "groups": [group_row(group) for group in self._groups.values()],
                "routers": router_rows(self.routers()),
                "controller": {"pid": os.getpid(), "state": "failed" if self._failed else "ready"},
            }

    def placement(self) -> dict[str, Any]:
        """The answer of `GET /placement` (`actors.views.placement_view`)."""
        with self._lock:
            if self._table is None:
                return {"term": self._term, "epoch": self._epoch, "layers": []}
            return placement_view(self._spec, self._table, self._load, self._why)

    def stop(self) -> None:
        """Ends every group of the deployment. The controller itself is killed by the caller."""
        self._stop.set()
        self._thread.join(timeout=2)
        self._keeper.stop()
        self._control.close()

    # ---- the loop

    def _run(self) -> None:
        try:
            self._keeper.begin()
            published = self._keeper.changes
            while not self._stop.is_set():
                self._keeper.tend(self._config.placement.interval_s)
                with self._lock:
                    self._take_counts()
                    self._give_up_a_failing_start()
                    if self._place_all() or self._place_again():
                        self._keeper.changes += 1
                    if self._placed and self._keeper.changes != published:
                        published = self._keeper.changes
                        self._publish()
        except Exception:
            log.exception("the placement controller fails")
            if not self._stop.is_set():
                os._exit(1)  # Ray starts it again, and it observes anew

    def _give_up_a_failing_start(self) -> None:
        if self._table is not None or self._term > 1:
            return
        for group in self._groups.values():
            if max(group.deaths, group.load_failures) >= _MAX_START_FAILURES:
                self._failed = f"expert group {group.id} does not start: {group.last_error}"

    def _place_all(self) -> bool:
        """The first placement of this controller, once the groups are up: what they hold already
        stays, the rest is placed by bytes and speed. Whether anything was assigned."""
        if self._placed or self._failed:
            return False
        groups = list(self._groups.values())
        held = np.stack([g.resident for g in groups], axis=2)
        adopting = held.any() and time.monotonic() - self._began_s > _ADOPT_S
        if not all(g.up for g in groups) and not adopting:
            return False
        fastest = max(g.pairs_per_s for g in groups)
        for group in groups:
            ratio = group.pairs_per_s / fastest if group.up else 1.0
            group.speed = 1.0 if ratio >= 1 - _SAME_SPEED else ratio
        fleet = fleet_of(self._config, self._spec, tuple(g.spec() for g in groups))
        try:
            placed = complete(fleet, held) if held.any() else place_at_start(fleet)
        except PlacementError as e:
            self._failed = str(e)
            return False
        self._home = placed.resident
        why = "found here by a new controller" if held.any() else "placed at start"
        for i, group in enumerate(groups):
            group.assigned = placed.resident[:, :, i].copy()
            self._explain(group.id, group.assigned, f"{why}, by bytes and speed")
        self._placed = True
        return True

    def _place_again(self) -> bool:
        """Experts of a group that stays away go to the others, reserve included; back home when
        the group is ready again. Whether an assignment changed."""
        if not self._placed:
            return False
        now, changed = time.monotonic(), False
        groups = list(self._groups.values())
        away = [
            g
            for g in groups
            if g.gone_since_s is not None
            and now - g.gone_since_s > self._config.placement.restore_s
        ]
        here = [g for g in groups if g not in away]
        if away and here:
            fleet = fleet_of(self._config, self._spec, tuple(g.spec() for g in here))
            held = np.stack([g.assigned for g in here], axis=2)
            placed = complete(fleet, held, self._load, use_reserve=True).resident
            for i, group in enumerate(here):
                added = placed[:, :, i] & ~group.assigned
                if added.any():
                    group.assigned |= added
                    group.borrowed |= added
                    self._explain(group.id, added, "restored: its group is gone")
                    changed = True
        served = np.stack([g.serving & ~g.borrowed for g in groups], axis=2).any(axis=2)
        for group in groups:
            back = group.borrowed & served
            if back.any():
                group.assigned &= ~back
                group.borrowed &= ~back
                changed = True
        return changed

    def _explain(self, group_id: str, replicas: Bools, why: str) -> None:
        now = time.time()
        for layer, expert in np.argwhere(replicas):
            self._why[int(layer), int(expert), group_id] = (now, why)

    # ---- the table

    def _publish(self) -> None:
        """A new epoch from what is ready now, to every client. Incomplete ones too: a router
        must hear of a dead group at once, and waits for the experts that are missing."""
        if self._table is None and not self._complete() and self._term == 1:
            return  # while starting nobody can serve anyhow
        groups = list(self._groups.values())
        fleet = fleet_of(self._config, self._spec, tuple(g.spec() for g in groups))
        assigned = np.stack([g.assigned for g in groups], axis=2)
        share = assigned * fleet.pair_rate
        share = share / np.maximum(share.sum(axis=2, keepdims=True), 1e-300)
        self._epoch += 1
        self._memory.keep_epoch(self._epoch)
        self._table = make_table(
            fleet,
            Placement(resident=assigned, share=share),
            term=self._term,
            epoch=self._epoch,
            ready=np.stack([g.serving for g in groups], axis=2),
        )
        endpoints = {g.id: g.endpoint for g in groups if g.endpoint is not None}
        self._control.publish(RoutingTable(table=self._table, endpoints=endpoints))

    def _complete(self) -> bool:
        """Every expert has a ready replica."""
        if not self._placed:
            return False
        served = np.logical_or.reduce([g.serving for g in self._groups.values()])
        return int(served.sum()) == sum(self._spec.experts_of_layer)

    def _take_counts(self) -> None:
        """Pairs/s of every expert, smoothed exponentially over the time that has passed."""
        now = time.monotonic()
        passed_s, self._counted_at_s = max(now - self._counted_at_s, 1e-3), now
        counts = np.zeros_like(self._load)
        for report in self._control.take_reports():
            if report.counts is not None:
                counts += report.counts
        keep = math.exp(-passed_s / _LOAD_TAU_S)
        self._load = keep * self._load + (1 - keep) * counts / passed_s


class _Memory:
    """What outlives a controller's process: its term and epoch, in Ray's internal KV."""

    def __init__(self, deployment: str) -> None:
        self._prefix = f"raymoe:{deployment}:"

    def next_term(self) -> int:
        """A number larger than that of any earlier controller of the deployment."""
        term = self._get("term") + 1
        self._put("term", term)
        return term

    def epoch(self) -> int:
        """The last epoch that any controller of the deployment has published."""
        return self._get("epoch")

    def keep_epoch(self, epoch: int) -> None:
        self._put("epoch", epoch)

    def _get(self, name: str) -> int:
        from ray.experimental.internal_kv import _internal_kv_get

        return int(_internal_kv_get((self._prefix + name).encode()) or b"0")

    def _put(self, name: str, value: int) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put((self._prefix + name).encode(), str(value).encode(), overwrite=True)


def ensure_controller(config: DeploymentConfig, spec_json: str) -> ActorHandle:
    """The deployment's controller, started if it is not there; Ray restarts it when it dies."""
    return spawn(
        PlacementController,
        controller_name(config.name),
        {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0, "max_concurrency": 64},
        config=config.model_dump(mode="json"),
        spec_json=spec_json,
    )


def find_controller(deployment: str) -> ActorHandle:
    """Handle of the running controller; raises `ValueError` when there is none."""
    return find(controller_name(deployment))


def _listen_host(config: DeploymentConfig) -> str:
    host = config.data_plane.host
    return str(ray.util.get_node_ip_address()) if host == "node" else host


def forget(deployment: str) -> None:
    """Removes what a deployment's controllers have left in Ray's KV: the next one starts afresh."""
    from ray.experimental.internal_kv import _internal_kv_del

    for name in ("term", "epoch"):
        _internal_kv_del(f"raymoe:{deployment}:{name}".encode())
