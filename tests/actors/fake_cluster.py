"""A cluster without Ray: group processes that answer when the test says so, and a KV store.

`FakeCluster` stands in for `actors.cluster.RayCluster`; keepers, hands and loops of several
controllers may share one, as they would share a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from actors.cluster import RayCluster
from actors.fleet import Calls
from actors.loop import ControlLoop
from actors.spawn import PENDING, RUNNING, STARTING, Place
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.control import ClientReport
from raymoe.errors import ConfigError
from raymoe.table import RoutingTable


class Died(Exception):
    """The process of an actor has ended."""


class Ref:
    """A call under way."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False
        self.begun = 0  # replicas of a load

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error, self.done = result, error, True


class FakeCalls(Calls):
    """Callbacks of calls that have ended run in `wait`, in the order they were started."""

    def __init__(self) -> None:
        self.pending: list[tuple[Ref, Callable[[Any, Exception | None], None]]] = []

    def start(self, ref: Any, done: Callable[[Any, Exception | None], None]) -> None:
        self.pending.append((ref, done))

    def wait(self, timeout_s: float) -> None:
        ended = [(ref, done) for ref, done in self.pending if ref.done]
        self.pending = [(ref, done) for ref, done in self.pending if not ref.done]
        for ref, done in ended:
            done(None if ref.error else ref.result, ref.error)


class Process:
    """One life of a group. Calls queue up; `answer()` works them off, unless it is frozen."""

    def __init__(self, spec: ModelSpec, name: str, arguments: dict[str, Any], node: str) -> None:
        self.name, self.id, self.node = name, arguments["group_id"], node
        self.incarnation, self.told_speed = arguments["incarnation"], arguments["speed"]
        self.resident = np.zeros((spec.layers, spec.experts), np.bool_)
        self.alive, self.frozen, self.placed = True, False, True
        self.created = False  # its constructor has ended
        self.gentle = False
        self.slow_loads = False  # loads wait until this is over
        self.trickle = False  # one replica an answer
        self.reading_s = 0.0  # the checkpoint does not answer
        self.rests = False  # loads with a limit take for ever
        self._way = False  # ... but when they are to make way
        self.memory_bytes: int = arguments["memory_bytes"]
        self.broken_sources: set[str] = set()
        self.bad_disk = False  # nothing can be read from the checkpoint
        self.term = 0
        self._held: Ref | None = None
        self.busy_s = 0.0
        self.slow = 1.0  # it takes so many times as long
        self.samples: list[tuple[int, int, float]] = []
        self._spec = spec
        self._queue: list[tuple[str, tuple[Any, ...], Ref]] = []
        self.brought: list[tuple[int, int, str | None]] = []
        self.limits: list[float | None] = []  # of each call that was to bring something

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or method not in _METHODS:
            raise AttributeError(method)
        return _Method(self, method)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Ref:
        ref = Ref()
        if not self.alive:
            ref.end(error=Died(self.name))
        else:
            self._queue.append((method, arguments, ref))
        return ref

    def die(self) -> None:
        self.alive = False
        for _, _, ref in self._queue:
            ref.end(error=Died(self.name))
        self._queue = []

    def answer(self) -> None:
        if not self.alive or self.frozen or not self.placed:
            return
        self.created = True
        queue, self._queue = self._queue, []
        for method, arguments, ref in queue:
            if method == "bring" and self.slow_loads:
                self._queue.append((method, arguments, ref))
                continue
            if method == "bring" and self.rests and arguments[2] is not None:
                if self._way:
                    left = {"resident_bytes": self._bytes(), "failed": [], "left": arguments[0]}
                    ref.end(left)
                else:
                    self._queue.append((method, arguments, ref))
                self._way = False
                continue
            try:
                if method == "hold":
                    self._hold(*arguments, ref)
                    continue
                if method == "bring" and self.trickle:
                    self._bring_one_more(*arguments, ref)
                    continue
                ref.end(getattr(self, "_do_" + method)(*arguments))
            except ConfigError as e:
                ref.end(error=e)

    def _obey(self, term: int) -> None:
        if term < self.term:
            raise ConfigError(f"a controller of term {self.term} is in charge, not {term}")
        self.term = term

    def _bytes(self) -> int:
        return int((self.resident.sum(1) * np.array(self._spec.expert_bytes)).sum())

    def _hold(self, term: int, ref: Ref) -> None:
        self._obey(term)
        if self._held is not ref:
            if self._held is not None:
                self._held.end(False)
            self._held = ref
        self._queue.append(("hold", (term,), ref))

    def _bring_one_more(
        self, pairs: list[tuple[int, int]], source: Any, limit: float | None, term: int, ref: Ref
    ) -> None:
        """What was begun arrives, then the next is begun: not for an older controller."""
        if ref.begun:
            self._do_bring(pairs[ref.begun - 1 : ref.begun], source, limit, self.term)
        self._obey(term)
        if ref.begun == len(pairs):
            ref.end({"resident_bytes": self._bytes(), "failed": []})
            return
        ref.begun += 1
        self._queue.append(("bring", (pairs, source, limit, term), ref))

    def _do_describe(self, term: int) -> dict[str, Any]:
        self._obey(term)
        endpoint = {
            "id": self.id,
            "node": self.node,
            "incarnation": self.incarnation,
            "endpoints": [],
        }
        return {
            "endpoint": endpoint,
            "pid": 1,
            "node": self.node,
            "speed": 1.0,
            "resident": self.resident.copy(),
            "resident_bytes": self._bytes(),
        }

    def _do_ping(self, term: int) -> dict[str, Any]:
        self._obey(term)
        samples, self.samples = self.samples, []
        return {
            "samples": samples,
            "queued_pairs": 0,
            "busy_s": self.busy_s,
            "served_since": None,
            "reading_s": self.reading_s,
            "resident": np.packbits(self.resident),
            "resident_bytes": self._bytes(),
        }

    def _do_bring(
        self, pairs: list[tuple[int, int]], source: Any, limit: float | None, term: int
    ) -> dict[str, Any]:
        self._obey(term)
        self.limits.append(limit)
        failed = []
        for layer, expert in pairs:
            if source is not None and source["id"] in self.broken_sources:
                failed.append((layer, expert, "broken"))
                continue
            size = 0 if self.resident[layer, expert] else self._spec.expert_bytes[layer]
            if self._bytes() + size > self.memory_bytes:
                failed.append((layer, expert, "over the budget"))
                continue
            if source is None and self.bad_disk:
                failed.append((layer, expert, "the disk cannot be read"))
                continue
            self.resident[layer, expert] = True
            self.brought.append((layer, expert, source and source["id"]))
        return {"resident_bytes": self._bytes(), "failed": failed}

    def _do_drop(self, pairs: list[tuple[int, int]], term: int) -> dict[str, Any]:
        self._obey(term)
        for layer, expert in pairs:
            self.resident[layer, expert] = False
        return {"resident_bytes": self._bytes(), "failed": []}

    def _do_make_way(self, term: int) -> None:
        self._obey(term)
        self._way = True

    def _do_close(self) -> None:
        return None


_METHODS = {"hold", "describe", "ping", "bring", "make_way", "drop", "close"}


class _Method:
    def __init__(self, process: Process, method: str) -> None:
        self._process, self._method = process, method

    def remote(self, *arguments: Any) -> Ref:
        return self._process.call(self._method, arguments)


class FakeCluster(RayCluster):
    """All processes by name; `full`: new groups get no resources; `head_away`: Ray's head does not
    answer, what runs runs on."""

    def __init__(self, spec: ModelSpec) -> None:
        self.calls = FakeCalls()
        self.spec = spec
        self.processes: dict[str, Process] = {}
        self.full = self.head_away = False
        self.leaving: set[str] = set()
        self.nodes = 0

    def names_alive(self) -> set[str]:
        return {name for name, process in self.processes.items() if process.alive}

    def find(self, name: str) -> Any:
        if name not in self.names_alive():
            raise ValueError(name)
        return self.processes[name]

    def start_group(
        self, name: str, options: dict[str, Any], gentle: bool, **arguments: Any
    ) -> Any:
        self._ask_head()
        self.nodes += 1
        process = Process(self.spec, name, arguments, f"node-{self.nodes}")
        process.gentle = gentle
        process.placed = not self.full
        self.processes[name] = process
        return process

    def place_of(self, actor: Any) -> Place:
        self._ask_head()
        stage = RUNNING if actor.created else STARTING if actor.placed else PENDING
        return Place(stage, actor.node, 1)

    def _ask_head(self) -> None:
        if self.head_away:
            raise ConnectionError("Ray's head does not answer")

    def draining_nodes(self) -> set[str]:
        self._ask_head()
        return self.leaving

    def kill(self, actor: Any) -> None:
        actor.die()

    def kill_frozen(self, actor: Any, node: str, pid: int) -> None:
        actor.die()

    def close_all(self, actors: list[Any], patience_s: float) -> None:
        for actor in actors:
            actor.die()

    def died(self, error: Exception | None) -> bool:
        return isinstance(error, Died)

    def of(self, group_id: str) -> Process:
        """The newest living process of a group."""
        lives = [p for p in self.processes.values() if p.id == group_id and p.alive]
        return max(lives, key=lambda p: p.incarnation)

    def living(self) -> dict[str, Process]:
        return {p.id: p for p in self.processes.values() if p.alive}


class FakeMemory:
    """Ray's KV, at its head."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self._term = self._epoch = 0
        self._intent: dict[str, Any] | None = None

    def next_term(self) -> int:
        self._term += 1
        return self._term

    def term(self) -> int:
        self._cluster._ask_head()
        return self._term

    def epoch(self) -> int:
        return self._epoch

    def keep_epoch(self, epoch: int) -> None:
        self._cluster._ask_head()
        self._epoch = epoch

    def intent(self) -> dict[str, Any] | None:
        return self._intent

    def keep_intent(self, intent: dict[str, Any]) -> None:
        self._cluster._ask_head()
        self._intent = intent


class FakeControl:
    """Clients that take every table that is newer at once, unless told to lag."""

    def __init__(self) -> None:
        self.tables: list[RoutingTable] = []
        self.lagging = False
        self.counts: np.ndarray | None = None  # of one report

    def publish(self, routing: RoutingTable) -> bool:
        if self.tables and routing.order <= self.tables[-1].order:
            return False
        self.tables.append(routing)
        return True

    def behind(self, order: tuple[int, int]) -> tuple[str, ...]:
        return ("router",) if self.lagging else ()

    def take_reports(self) -> list[Any]:
        return [] if self.counts is None else [ClientReport(name="router", counts=self.counts)]


class World:
    """One cluster, its memory, its clients, and the controllers that come and go."""

    def __init__(self, config: DeploymentConfig, spec: ModelSpec) -> None:
        self.config, self.spec = config, spec
        self.cluster, self.control = FakeCluster(spec), FakeControl()
        self.memory = FakeMemory(self.cluster)
        self.now = 1000.0
        self.work = 0.0  # of so many groups; those in the table share it
        self.timed = False  # ... evenly; if so: as the table divides `control.counts`, with timings
        self.loop = self.controller()

    def controller(self) -> ControlLoop:
        """A new one, which takes over. Calls of an old one are not heard of any more."""
        self.cluster.calls = FakeCalls()
        loop = ControlLoop(
            self.config,
            self.spec,
            self.control,  # type: ignore[arg-type]
            self.memory,  # type: ignore[arg-type]
            self.cluster,
            clock=lambda: self.now,
        )
        loop.begin()
        self.loop = loop
        return loop

    def turns(self, count: int = 40, step_s: float = 0.25) -> None:
        """Time goes on; groups answer; every table is checked."""
        for _ in range(count):
            self.now += step_s
            self._compute(step_s)
            for process in list(self.cluster.processes.values()):
                process.answer()
            self.loop.turn(0.0)
            self.check()

    def _compute(self, seconds: float) -> None:
        living = self.cluster.living()
        serving = {g: living[g] for g in self.serving() if g in living}
        parts = self._parts() if self.timed else dict.fromkeys(serving, 1 / max(len(serving), 1))
        for group_id, process in serving.items():
            part = self.work * parts[group_id] * process.slow
            process.busy_s += min(part, 1.0) * seconds
            if self.timed and part:
                for n in range(20):
                    pairs, active = 16 + 7 * n % 100, 1 + n % 8
                    took = (2e-5 * pairs + 1e-4 * active) * process.slow
                    process.samples.append((pairs, active, took))

    def _parts(self) -> dict[str, float]:
        """What part of the pairs each group of the table gets."""
        counts, table = self.control.counts, self.control.tables[-1].table
        assert counts is not None
        pairs = np.einsum("le,leg->g", counts, table.share)
        return dict(zip(table.group_ids, (pairs / pairs.sum()).tolist(), strict=True))

    def serving(self) -> set[str]:
        """Ids of the groups that clients send to."""
        if not self.control.tables:
            return set()
        table = self.control.tables[-1].table
        return {
            g for g, held in zip(table.group_ids, table.resident.any((0, 1)), strict=True) if held
        }

    def check(self) -> None:
        """What clients were told last is true, but for what has died since."""
        if not self.control.tables:
            return
        table = self.control.tables[-1].table
        for g, group_id in enumerate(table.group_ids):
            process = self.cluster.living().get(group_id)
            known = self.loop.groups.get(group_id)
            if process is None or known is None or known.incarnation != process.incarnation:
                continue
            assert not (table.resident[:, :, g] & ~process.resident).any(), group_id

    def served(self) -> bool:
        """Every expert is in the table on a group that lives and holds it."""
        table = self.control.tables[-1].table
        held = np.zeros(table.resident.shape[:2], np.bool_)
        for g, group_id in enumerate(table.group_ids):
            process = self.cluster.living().get(group_id)
            if process is not None:
                held |= table.resident[:, :, g] & process.resident
        present = np.arange(self.spec.experts)[None] < np.array(self.spec.experts_of_layer)[:, None]
        return bool(held[present].all())

    def lives(self) -> dict[str, int]:
        """The incarnation of every group that runs."""
        return {i: p.incarnation for i, p in self.cluster.living().items()}

    def states(self) -> dict[str, str]:
        return {g.id: g.shown_state for g in self.loop.groups.values()}
