"""The placement controller actor: brings the fleet up, places experts, publishes the table.

It observes and executes; where experts go is decided in `placement`. Routers and groups serve on
when it dies: Ray restarts it, it finds the groups of its deployment by name and goes on.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.expert_group import ExpertGroup
from actors.fleet import LOADING, LOST, READY, STARTING, Calls, LiveGroup
from actors.spawn import controller_name, find, group_name, names_alive, spawn
from actors.views import balancedness, group_row, placement_view, router_rows
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.table import Table, make_table
from placement.types import Fleet, Placement
from raymoe.budget import fleet_of, group_ids, memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.control import ControlServer
from raymoe.identity import identity_of
from raymoe.table import GroupEndpoint, RoutingTable

_SAME_SPEED = 0.25  # speeds measured this close to the fastest group's are taken for equal
_MAX_START_DEATHS = 3  # a group that dies this often before it ever served: give up, say why
_RESTART_PAUSE_S = (0.0, 0.5, 2.0, 5.0, 15.0)  # by deaths in a row, the last for all further ones
_LOAD_TAU_S = 10.0  # the load shown is smoothed over about this long
_ROUTER_SILENT_S = 5.0


class PlacementController:
    """One per deployment. Public methods are called through Ray, from several threads."""

    def __init__(self, config: dict[str, Any], spec_json: str) -> None:
        self._config = DeploymentConfig.model_validate(config)
        self._spec = ModelSpec.from_json(spec_json)
        self._spec_json = spec_json
        self._lock = threading.RLock()
        self._calls = Calls()
        self._groups: dict[str, LiveGroup] = {}
        self._placement: Placement | None = None
        self._fleet: Fleet | None = None
        self._table: Table | None = None
        self._since: dict[tuple[int, int, str], float] = {}
        self._routers: dict[str, dict[str, Any]] = {}
        self._failed: str | None = None
        self._load = np.zeros((self._spec.layers, self._spec.experts))  # pairs/s
        self._counted_at_s = time.monotonic()
        self._term = _next_term(self._config.name)
        self._epoch = 0
        self._stop = threading.Event()
        secret = read_secret(self._config)
        identity = identity_of(self._config, self._spec)
        self._control = ControlServer(
            identity=identity, secret=secret, host=_listen_host(self._config)
        )
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    # ---- what others ask

    def control_address(self) -> tuple[str, int]:
        """Where clients connect for tables: (host, port)."""
        return self._control.address

    def router_beat(self, info: dict[str, Any]) -> None:
        """A router says that it is there: {"id", "pid", "node", "state", "address"}."""
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
            wanted = sum(int(g.assigned.sum()) for g in self._groups.values())
            have = sum(int(g.resident.sum()) for g in self._groups.values())
            up = sum(g.actor is not None and g.state != STARTING for g in self._groups.values())
            text = f"groups up {up}/{len(self._groups)}"
            if self._placement is not None:
                text += f", experts loaded {have}/{wanted}"
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
                return {"term": self._term, "epoch": 0, "layers": []}
            return placement_view(self._spec, self._table, self._load, self._since)

    def stop(self) -> None:
        """Ends every group of the deployment. The controller itself is killed by the caller."""
        self._stop.set()
        self._thread.join(timeout=2)
        with self._lock:
            refs = [g.actor.close.remote() for g in self._groups.values() if g.actor is not None]
            ray.wait(refs, num_returns=len(refs), timeout=2) if refs else None
            for group in self._groups.values():
                if group.actor is not None:
                    ray.kill(group.actor)
        self._control.close()

    # ---- the loop

    def _run(self) -> None:
        try:
            self._find_or_start_groups()
            while not self._stop.is_set():
                self._calls.wait(self._config.placement.interval_s)
                with self._lock:
                    self._take_counts()
                    self._start_due_lives()
                    self._place_when_all_are_up()
        except Exception as e:
            traceback.print_exc()
            self._failed = f"the placement controller failed: {e!r}"

    def _find_or_start_groups(self) -> None:
        alive = names_alive()
        budget = memory_bytes(self._config, self._spec)
        empty = np.zeros((self._spec.layers, self._spec.experts), np.bool_)
        for group_id, kind in group_ids(self._config):
            prefix = group_name(self._config.name, group_id, 0).removesuffix("0")
            lives = sorted(int(n.removeprefix(prefix)) for n in alive if n.startswith(prefix))
            group = LiveGroup(
                id=group_id,
                kind=kind,
                memory_bytes=budget[kind.kind],
                incarnation=lives[-1] if lives else 1,
                assigned=empty.copy(),
                resident=empty.copy(),
            )
            with self._lock:
                self._groups[group_id] = group
                if lives:
                    group.actor = find(group_name(self._config.name, group_id, lives[-1]))
                    self._watch(group)
                else:
                    self._spawn(group)

    def _spawn(self, group: LiveGroup) -> None:
        group.state = STARTING
        group.endpoint = None
        group.retry_at_s = None
        group.resident[:] = False
        kind = group.kind
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
            spec_json=self._spec_json,
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
                self._end(group, error)
                return
            group.endpoint = GroupEndpoint.from_dict(answer["endpoint"])
            group.node, group.pid = answer["node"], answer["pid"]
            group.pairs_per_s = answer["speed"]
            group.resident = np.array(answer["resident"], np.bool_)
            group.resident_bytes = answer["resident_bytes"]
            for layer, expert in np.argwhere(group.resident):
                self._since.setdefault((int(layer), int(expert), group.id), time.time())
            group.state = LOADING
            if self._placement is not None:
                self._load_missing(group)

    def _end(self, group: LiveGroup, error: Exception) -> None:
        """A call failed. When the group itself lives, it is of no use as it is: another life."""
        group.last_error = reason(error)
        if not isinstance(error, ray.exceptions.RayActorError) and group.actor is not None:
            ray.kill(group.actor)

    def _on_ended(self, group: LiveGroup, life: int, error: Exception | None) -> None:
        with self._lock:
            if self._stop.is_set() or life != group.incarnation:
                return
            group.state = LOST
            group.deaths += 1
            group.deaths_in_a_row += 1
            group.actor = None
            group.resident[:] = False
            group.resident_bytes = 0
            group.pid = 0
            if error is not None and not group.last_error:
                group.last_error = reason(error)
            if self._table is None and group.deaths >= _MAX_START_DEATHS:
                self._failed = f"expert group {group.id} does not start: {group.last_error}"
                return
            self._publish()
            group.incarnation += 1
            pause = _RESTART_PAUSE_S[min(group.deaths_in_a_row, len(_RESTART_PAUSE_S)) - 1]
            group.retry_at_s = time.monotonic() + pause
            if not pause:
                self._spawn(group)

    def _start_due_lives(self) -> None:
        for group in self._groups.values():
            if group.retry_at_s is not None and time.monotonic() >= group.retry_at_s:
                self._spawn(group)

    def _place_when_all_are_up(self) -> None:
        if self._placement is not None or self._failed:
            return
        if any(g.state in (STARTING, LOST) for g in self._groups.values()):
            return
        fastest = max(g.pairs_per_s for g in self._groups.values())
        for group in self._groups.values():
            ratio = group.pairs_per_s / fastest
            group.speed = 1.0 if ratio >= 1 - _SAME_SPEED else ratio
        try:
            specs = tuple(group.spec() for group in self._groups.values())
            self._fleet = fleet_of(self._config, self._spec, specs)
            placed = place_at_start(self._fleet)
        except PlacementError as e:
            self._failed = str(e)
            return
        resident = placed.resident
        found = np.stack([g.resident for g in self._groups.values()], axis=2)
        if found.any():  # a controller that was restarted: what is loaded stays where it is
            resident = np.where(found.any(axis=2, keepdims=True), found, resident)
            count = np.maximum(resident.sum(axis=2, keepdims=True), 1)
            placed = Placement(resident=resident, share=resident / count)
        self._placement = placed
        for i, group in enumerate(self._groups.values()):
            group.assigned = resident[:, :, i].copy()
            self._load_missing(group)

    def _load_missing(self, group: LiveGroup) -> None:
        """Asks for the group's next few experts, until it has all it is to hold."""
        assert group.actor is not None
        missing = np.argwhere(group.assigned & ~group.resident)
        if not len(missing):
            group.state = READY
            group.deaths_in_a_row = 0
            group.last_error = ""
            self._publish()
            return
        batch = [(int(layer), int(expert)) for layer, expert in missing[:32]]
        life = group.incarnation
        self._calls.start(
            group.actor.load.remote(batch),
            lambda answer, error: self._on_loaded(group, life, batch, answer, error),
        )

    def _on_loaded(
        self,
        group: LiveGroup,
        life: int,
        batch: list[tuple[int, int]],
        resident_bytes: Any,
        error: Exception | None,
    ) -> None:
        with self._lock:
            if life != group.incarnation:
                return
            if error is not None:
                self._end(group, error)
                return
            for layer, expert in batch:
                group.resident[layer, expert] = True
                self._since[layer, expert, group.id] = time.time()
            group.resident_bytes = resident_bytes
            self._load_missing(group)

    # ---- the table

    def _publish(self) -> None:
        """A new epoch from what is ready now, to every client. Incomplete ones too: a router
        must hear of a dead group at once, and waits for the experts that are missing."""
        if self._placement is None or self._fleet is None:
            return
        if self._table is None and not self._complete():
            return  # while starting nobody can serve anyhow
        self._epoch += 1
        ready = np.stack([g.resident for g in self._groups.values()], axis=2)
        self._table = make_table(
            self._fleet, self._placement, term=self._term, epoch=self._epoch, ready=ready
        )
        endpoints = {
            g.id: g.endpoint
            for g in self._groups.values()
            if g.endpoint is not None and g.state != LOST
        }
        self._control.publish(RoutingTable(table=self._table, endpoints=endpoints))

    def _complete(self) -> bool:
        """Every expert has a ready replica."""
        if self._placement is None or not self._groups:
            return False
        have = np.logical_or.reduce([g.resident for g in self._groups.values()])
        need = np.logical_or.reduce([g.assigned for g in self._groups.values()])
        return bool(need.any() and have[need].all())

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


def reason(error: Exception) -> str:
    """One line of why a Ray call failed."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    last = lines[-1] if lines else repr(cause)
    return last.partition(": ")[2] if last.startswith("raymoe.errors.") else last


def _next_term(deployment: str) -> int:
    """A number larger than that of any earlier controller of the deployment, kept by Ray."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    key = f"raymoe:{deployment}:term".encode()
    term = int(_internal_kv_get(key) or b"0") + 1
    _internal_kv_put(key, str(term).encode(), overwrite=True)
    return term
