"""The placement controller actor: what Ray and HTTP ask of it, and the thread it works in.

It observes and executes. Where experts go is decided in `placement` (the simulator runs the same
code); the loop is in `actors/loop.py`. Routers and groups serve on when the controller dies: Ray
restarts it, it finds the groups of its deployment by name, and what they hold stays where it is.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.cluster import RayCluster
from actors.fleet import reason
from actors.head import Head
from actors.intent import Intent, Pin, drained, pinned, scaled
from actors.loop import ControlLoop
from actors.memory import Memory
from actors.metrics import status_values
from actors.ray_metrics import RayMetrics
from actors.spawn import controller_name, find, spawn
from actors.views import balancedness, group_row, placement_view, router_rows
from placement.dry_run import Question, dry_run
from placement.errors import PlacementError
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.control import ControlServer
from raymoe.errors import ConfigError
from raymoe.gateway.metrics import Values
from raymoe.identity import identity_of
from raymoe.logs import configure, fields
from raymoe.observe.ledger import Ledger
from raymoe.observe.observer import Observer

__all__ = ["PlacementController", "ensure_controller", "find_controller", "reason"]

log = logging.getLogger("raymoe.controller")
_ROUTER_SILENT_S = 5.0
_HEAD_LIMIT_S = 3.0  # it answers in milliseconds; a loaded machine may take longer


class PlacementController:
    """One per deployment. Public methods are called through Ray, from several threads."""

    def __init__(self, config: dict[str, Any], spec_json: str) -> None:
        self._config = DeploymentConfig.model_validate(config)
        configure(self._config.logging, "controller", self._config.name, self._surroundings)
        self._spec = ModelSpec.from_json(spec_json)
        self._routers: dict[str, dict[str, Any]] = {}
        self._head = Head()
        self._memory = Memory(self._config.name, self._head)
        secret = read_secret(self._config)
        identity = identity_of(self._config, self._spec)
        self._control = ControlServer(identity, secret, host=_listen_host(self._config))
        self._loop = ControlLoop(
            self._config, self._spec, self._control, self._memory, RayCluster(self._head)
        )
        self._lock = self._loop.lock
        self._ledger = Ledger(time.monotonic(), restarted=self._loop.term > 1)
        self._observer = Observer()
        self._ray_metrics = RayMetrics(self._config.name) if self._config.ray.metrics else None
        self._weighing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    # ---- what routers and the launcher ask

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
        """A router says that it is there: {"id", "pid", "node", "state", "endpoint", "profile"}.

        state: "ready", "draining" (no new requests), "failed" or, for the last time, "gone".
        """
        with self._lock:
            if info["state"] == "gone":
                self._routers.pop(info["id"], None)
                return
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
        return self._loop.progress()

    # ---- what operators ask

    def status(self) -> dict[str, Any]:
        """The answer of `raymoe status --json`."""
        loop = self._loop
        with self._lock:
            return {
                "deployment": self._config.name,
                "model": self._config.served_model_name,
                "family": self._spec.family,
                "ready": loop.complete(),
                "problem": loop.problem,
                "term": loop.term,
                "epoch": loop.publisher.epoch,
                "balancedness": balancedness(loop.publisher.table, loop.traffic.load),
                "groups": [group_row(group) for group in loop.groups.values()],
                "routers": router_rows(self.routers()),
                "controller": {"pid": os.getpid(), "state": "failed" if loop.failed else "ready"},
                "copies": vars(loop.executor.stats),
            }

    def placement(self) -> dict[str, Any]:
        """The answer of `GET /placement` (`actors.views.placement_view`)."""
        loop = self._loop
        with self._lock:
            table = loop.publisher.table
            if table is None:
                return {"term": loop.term, "epoch": loop.publisher.epoch, "layers": []}
            return placement_view(self._spec, table, loop.traffic.load, loop.history)

    def history(self) -> dict[str, Any]:
        """The answer of `GET /placement/history`: plans and events, newest first."""
        with self._lock:
            return self._loop.history.to_dict(self._loop.mind)

    def exchange(self, gateway_id: str, entries: Any, experts: bool | None) -> dict[str, Any]:
        """A gateway tells what it has counted and hears what all have (`actors.metrics.Scrapes`).

        With `experts` the series of single experts are among what is shown; None: nobody looks.
        """
        with self._lock:
            answer = self._ledger.exchange(gateway_id, entries, time.monotonic())
            if experts is None:
                return answer
            shown = self._observer.shown(experts=experts)
            return {**answer, "status": self.status(), "shown": shown}

    def view(self, since_seq: int, since_at: float, layers: list[int], why: bool) -> dict[str, Any]:
        """What the web page shows (`Observer.view`), with the status."""
        with self._lock:
            view = self._observer.view(since_seq, since_at, layers, why)
            return {**view, "status": self.status()}

    def _look(self) -> None:
        """Lets the observer see what there is, once a second."""
        now, loop = time.monotonic(), self._loop
        if not self._observer.due(now):
            return
        with self._lock:
            told = self._observer.events.seq
            self._observer.look(
                self.status(),
                loop.publisher.table,
                loop.traffic.load,
                loop.history.to_dict(loop.mind),
                loop.history.why_of,
                self._ledger.values(now),
                now=now,
                at=time.time(),
            )
        for event in self._observer.events.since(told):
            level = logging.WARNING if event["kind"] == "alarm" else logging.INFO
            log.log(level, "%s", event["text"], extra=fields(event=event["kind"]))
        self._tell_ray(now)

    def _tell_ray(self, now: float) -> None:
        """Ray's agents show what /metrics shows, once all gateways have spoken."""
        told = self._ray_metrics
        if told is None or not told.due(now):
            return
        with self._lock:
            if not self._ledger.settled(now):
                return
            values: dict[str, Values] = {
                **self._ledger.values(now),
                "raymoe_controller_up": {(): 1},
            }
            values |= status_values(self.status()) | self._observer.shown(experts=False)
        try:
            told.tell(values, now)
        except Exception:  # whatever Ray's metrics object to, placement goes on
            log.exception("Ray's agents are told no more metrics")
            self._ray_metrics = None

    def _surroundings(self) -> dict[str, Any]:
        """What is true of every line that this process logs."""
        return {"term": self._loop.term, "epoch": self._loop.publisher.epoch}

    def scale(self, groups: int, kind: str | None = None) -> dict[str, Any]:
        """So many groups of a kind are to serve. {"members"}, or {"error"}: why not."""
        wanted = self._loop.wanted
        return self._ask(
            lambda intent: scaled(self._config, intent, groups, kind, wanted.cheapest_to_give_up())
        )

    def drain(self, group: str, undo: bool = False) -> dict[str, Any]:
        """Empty a group and end it; with `undo` have it back. {"members"}, or {"error"}."""
        return self._ask(lambda intent: drained(intent, group, undo))

    def pin(
        self, layer: int, expert: int, group: str, keep: bool = True, undo: bool = False
    ) -> dict[str, Any]:
        """Fix a replica where it is to be (`keep`), or is not to be; with `undo` let it go.
        {"members", "pins"}, or {"error"}."""
        pin = Pin(layer=layer, expert=expert, group=group, keep=keep)
        known = self._spec.experts_of_layer
        return self._ask(lambda intent: pinned(intent, pin, known, undo))

    def dry_run(self, question: dict[str, Any]) -> dict[str, Any]:
        """Would moving help? What `placement.dry_run` says, or {"error"}; nothing changes.

        One at a time: planning takes CPU that this process has other uses for.
        """
        if not self._weighing.acquire(blocking=False):
            return {"error": "another dry run is under way: ask again when it has ended"}
        try:
            with self._lock:
                basis = self._loop.basis()
            if basis is None:
                return {"error": "no expert is placed yet: the deployment is still starting"}
            without = tuple(question.pop("without", ()))
            return dry_run(basis, Question(**question, without=without))
        except PlacementError as e:
            return {"error": str(e)}
        finally:
            self._weighing.release()

    def _ask(self, change: Callable[[Intent], Intent]) -> dict[str, Any]:
        with self._lock:
            try:
                return self._loop.wanted.ask(change).to_dict()
            except (ConfigError, PlacementError) as e:
                return {"error": str(e)}

    def set_slowdown(self, group: str, factor: float) -> None:
        """For tests: this group takes so many times as long from now on."""
        with self._lock:
            actor: Any = self._loop.groups[group].actor
        ray.get(actor.set_slowdown.remote(factor), timeout=10)

    def stop(self) -> None:
        """Ends every group. The controller itself is killed by the caller."""
        self._stop.set()
        self._thread.join(timeout=2)
        self._head.limit_s = None
        self._loop.stop()
        self._control.close()
        self._memory.forget()

    def _run(self) -> None:
        try:
            self._loop.begin()
            self._head.limit_s = _HEAD_LIMIT_S
            while not self._stop.is_set():
                self._loop.turn(self._config.placement.interval_s)
                self._look()
        except Exception:
            log.exception("the placement controller fails")
            if not self._stop.is_set():
                os._exit(1)  # Ray starts it again, and it observes anew


def ensure_controller(config: DeploymentConfig, spec_json: str) -> ActorHandle:
    """The deployment's controller, started if it is not there; Ray restarts it when it dies."""
    options = {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0, "max_concurrency": 64}
    # An actor that asks for nothing is put on any node, and keeps a node of experts from being
    # given back when its group has gone: the controller goes where routers go.
    where = config.routers.label_selector
    return spawn(
        PlacementController,
        controller_name(config.name),
        {**options, "label_selector": where} if where else options,
        config=config.model_dump(mode="json"),
        spec_json=spec_json,
    )


def find_controller(deployment: str) -> ActorHandle:
    """Handle of the running controller; raises `ValueError` when there is none."""
    return find(controller_name(deployment))


def _listen_host(config: DeploymentConfig) -> str:
    host = config.data_plane.host
    return str(ray.util.get_node_ip_address()) if host == "node" else host
