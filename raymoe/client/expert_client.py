"""ExpertClient: dispatch a layer's pairs to groups, combine what comes back, whatever fails.

    batch = client.dispatch(layer, hidden, expert_ids, gate_weights)   # all messages are out
    ...                                                                # overlap
    out = client.combine(batch)                                        # [T, D]

Pairs of a message that failed (link lost, refused, error, deadline) go to another replica within
the layer: raymoe/client/sending.py sends, settling.py takes what comes back.

Threads: dispatch and combine belong to the engine's thread, everything else may come from any.
The lock is held for microseconds, never while waiting.
"""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import numpy as np
import torch

from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.connections import Connections
from raymoe.client.deadline import Patience
from raymoe.client.dialer import Dial, Dialer
from raymoe.client.load import Load
from raymoe.client.routes import Connection, Routes
from raymoe.client.sending import Sender
from raymoe.client.settling import Settler
from raymoe.client.stats import ClientStats
from raymoe.dispatch import Ints
from raymoe.errors import ConfigError, ExpertsUnavailable
from raymoe.links.connect import connect
from raymoe.links.handshake import Identity
from raymoe.links.link import Link
from raymoe.links.protocol import PARTIAL, ROWS, Wire
from raymoe.links.spin import Spin
from raymoe.table import GroupEndpoint, RoutingTable

_HOUSEKEEPING_S = 0.05
_IDLE_PING_S = 5.0  # groups close links that are silent for long
_FEW_TOKENS = 64
_now = time.monotonic
_clock = time.perf_counter


class ExpertClient:
    """The remote `Experts` of one engine. One deployment, one model, any number of groups."""

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        node: str,
        config: ClientConfig | None = None,
        *,
        name: str = "",
        dial: Dial | None = None,
    ) -> None:
        """`node` decides which endpoint of a group is near. `dial` replaces connecting (tests)."""
        self.config = config or ClientConfig()
        self.wire = Wire(hidden=identity.hidden, dtype=identity.wire_dtype)
        self.stats = ClientStats()
        self._mode = PARTIAL if self.config.mode == "partial" else ROWS
        self._lock = threading.Lock()
        self._building = threading.Lock()  # taken before _lock, by whoever makes new routes
        self._routes: Routes | None = None
        self._wanted: RoutingTable | None = None
        self._connections = Connections()
        self._patience: dict[str, Patience] = {}
        self._load = Load(0, 0)
        self._spin = Spin(self.config.spin_s)
        self._cores = len(os.sched_getaffinity(0))
        self._closed = threading.Event()
        self._dialer = Dialer(
            dial
            or partial(
                _dial,
                identity=identity,
                secret=secret,
                node=node,
                name=name,
                timeout_s=self.config.connect_timeout_s,
            ),
            self._connected,
            self.config.reconnect_s,
        )
        self._sender = Sender(
            self.config, self.wire, self._mode, self.stats, self._connections, self._dial_missing
        )
        self._settler = Settler(self.config, self.stats, self._connections, self._sender)
        self._keeper = threading.Thread(target=self._keep_house, name="raymoe-client", daemon=True)
        self._keeper.start()

    # --- the table -------------------------------------------------------------------------

    def set_table(self, routing: RoutingTable) -> bool:
        """Use this table from the next dispatch on. From any thread; never waits for a connect.

        False, and nothing changes, when a table as new or newer is in use. Groups new in it are
        connected in the background; links to groups no longer in it close once nothing is out.
        """
        with self._lock:
            wanted = self._wanted
            if wanted is not None and routing.order <= wanted.order:
                return False
            shape = routing.table.resident.shape[:2]
            if wanted is not None and shape != self._load.shape:
                raise ConfigError(
                    f"a table of {shape[0]} layers x {shape[1]} experts cannot replace one of "
                    f"{self._load.shape[0]} x {self._load.shape[1]}"
                )
            if wanted is None:
                self._load = Load(*shape)
            self._wanted = routing
            for group_id, connection in list(self._connections.live.items()):
                target = routing.endpoints.get(group_id)
                if target is None or target.incarnation != connection.incarnation:
                    self._connections.retire(connection)
        self._rebuild()
        with self._lock:
            self._connections.close_idle()
        return True

    @property
    def epoch(self) -> tuple[int, int] | None:
        """(term, epoch) of the table in use."""
        wanted = self._wanted
        return None if wanted is None else wanted.order

    def connected(self) -> tuple[str, ...]:
        """Ids of the groups with a live link, sorted."""
        with self._lock:
            return tuple(sorted(self._connections.live))

    def absent(self, layer: int) -> list[int] | None:
        """Experts of a layer without a live replica; None when there are none, or no table yet.

        Cheap while all are there: the engine asks once a layer and step.
        """
        routes = self._routes
        if routes is None or routes.complete[layer]:
            return None
        missing: list[int] = np.flatnonzero(routes.home[layer] < 0).tolist()
        return missing

    def out_of_reach(self) -> int | None:
        """How many experts that the table calls ready no live link leads to; None without one."""
        routes = self._routes
        if routes is None:
            return None
        ready = routes.routing.table.resident.any(2)  # [L, E]
        return int((ready & ~routes.resident.any(2)).sum())

    def take_counts(self) -> Ints:
        """Pairs dispatched to each expert since the last call: int64 [L, E]."""
        with self._lock:
            return self._load.take()

    def take_timings(self) -> dict[str, list[tuple[int, int, float]]]:
        """Since the last call, of each group: (pairs, active experts, busy seconds) a message."""
        with self._lock:
            taken = {}
            for group_id, connection in self._connections.live.items():
                taken[group_id] = [(p, n, ns * 1e-9) for p, n, ns in connection.samples]
                connection.samples.clear()
        return taken

    # --- the engine's side -----------------------------------------------------------------

    def dispatch(
        self,
        layer: int,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        gate_weights: torch.Tensor,
    ) -> Batch:
        """Send the pairs of one layer's batch; returns without waiting for any answer.

        hidden [T, D], expert_ids int64 [T, K] in 0..E-1, gate_weights [T, K], host memory;
        `hidden` must not change until combine. Waits only for the very first table; raises
        ExpertsUnavailable when none came within `stall_limit_s`.
        """
        started = _clock()
        batch = Batch(layer, hidden, expert_ids, gate_weights, self.wire, self._mode)
        if self._routes is None:
            self._await_first_table(batch)
        with self._lock:
            routes = self._routes
            assert routes is not None
            if batch.open_pairs:
                self._sender.send(batch, routes, self._load)
        self.stats.dispatched(layer, _clock() - started)
        return batch

    def combine(self, batch: Batch) -> torch.Tensor:
        """The weighted sum of every pair, [T, D] in the dtype of `hidden`.

        Raises ExpertsUnavailable when pairs had no live replica for `stall_limit_s`.
        """
        started = _clock()
        waited_s = 0.0
        try:
            while batch.open_pairs:
                if batch.homeless:
                    with self._lock:
                        assert self._routes is not None
                        self._settler.send_again(batch, self._routes)
                asked = _clock()
                events = self._wait(batch)
                waited_s += _clock() - asked
                with self._lock:
                    self._settler.take(events)
                    if _now() > batch.deadline_s:
                        self._settler.strike(batch)
            if batch.arenas:
                with self._lock:
                    self._sender.finish(batch)
            return batch.result()
        finally:
            self.stats.combined(batch.layer, waited_s, _clock() - started - waited_s)

    def abandon(self, batch: Batch) -> None:
        """This batch is never going to be combined: its answers are read and thrown away."""
        with self._lock:
            batch.abandoned = True

    def close(self) -> None:
        """Close every link and end every thread."""
        self._closed.set()
        self._dialer.close(timeout_s=1.0)
        self._keeper.join(1.0)
        with self._lock:
            self._connections.close()

    def _wait(self, batch: Batch) -> list[tuple[int, int]]:
        """Descriptors that have something, after a short spin and then a sleep.

        It sleeps until the group asked last has answered, when others have too as a rule: being
        woken once a batch and not once a group is worth more than adding a reply early. Not for
        large batches, and not while pairs wait for a replica or messages for slots.
        """
        connections = self._connections
        poll = connections.wait
        # with a group on every core our looking would keep one of them from computing
        limit_s = self._spin.limit_s() if len(connections.live) < self._cores else 0.0
        until = _clock() + limit_s
        while not (events := poll(0)) and _clock() < until:
            pass
        if limit_s:
            self._spin.note(bool(events))
        if events:
            return events
        until_s = batch.deadline_s
        if batch.homeless:
            until_s = min(until_s, batch.retry_s)
        timeout_s = min(max(until_s - _now(), 0.0) + 0.001, 1.0)
        last = batch.last
        if last is not None and batch.tokens <= _FEW_TOKENS and last.attempts and not last.lost:
            batch.last = None  # once: then whoever answers
            if batch.homeless or batch.queued:
                return poll(timeout_s)
            if last.sleep(timeout_s):
                return poll(0)
        return poll(timeout_s)

    # --- in the background -----------------------------------------------------------------

    def _connected(self, target: GroupEndpoint, link: Link) -> None:
        """A dialer's thread has reached a group."""
        with self._lock:
            wanted = self._wanted
            current = wanted.endpoints.get(target.id) if wanted is not None else None
            if self._closed.is_set() or current != target or target.id in self._connections.live:
                link.close()
                self._dial_missing()
                return
            config = self.config
            patience = self._patience.setdefault(
                target.id,
                Patience(
                    multiple=config.deadline_multiple,
                    floor_s=config.deadline_floor_s,
                    first_s=config.first_deadline_s,
                ),
            )
            self._connections.add(Connection(target.id, link, patience, config.samples))
        self._rebuild()

    def _rebuild(self) -> None:
        """New routes from the wanted table and the live connections; wakes a waiting combine.

        Preparing a large table takes milliseconds: not under the engine's lock.
        """
        with self._building:
            with self._lock:
                wanted, previous = self._wanted, self._routes
                assert wanted is not None
                connections = tuple(self._connections.live.get(i) for i in wanted.table.group_ids)
            routes = Routes(wanted, connections, previous)
            with self._lock:
                self._routes = routes
                self._dial_missing()
                self._connections.wake()

    def _dial_missing(self) -> None:
        wanted = self._wanted
        if wanted is not None and not self._closed.is_set():
            self._dialer.want(
                {
                    group_id: target
                    for group_id, target in wanted.endpoints.items()
                    if group_id not in self._connections.live and target.endpoints
                }
            )

    def _keep_house(self) -> None:
        """Heartbeats; links that end while the engine rests; routes around lost ones."""
        next_ping_s = 0.0
        while not self._closed.wait(_HOUSEKEEPING_S):
            now = _now()
            with self._lock:
                for connection in list(self._connections.live.values()):
                    if connection.idle:
                        self._settler.poll(connection)
                    if not connection.lost:
                        connection.watch(now, ping=now >= next_ping_s)
                self._connections.close_idle()
                routes = self._routes
                broken = routes is not None and routes.broken
            if now >= next_ping_s:
                next_ping_s = now + _IDLE_PING_S
            if broken:
                self._rebuild()

    def _await_first_table(self, batch: Batch) -> None:
        started = _now()
        while self._routes is None:
            waited_s = _now() - started
            if waited_s > self.config.stall_limit_s:
                experts = np.unique(batch.expert_of_pair)
                raise ExpertsUnavailable(batch.layer, tuple(experts.tolist()), waited_s)
            time.sleep(0.005)


def _dial(
    target: GroupEndpoint,
    *,
    identity: Identity,
    secret: bytes,
    node: str,
    name: str,
    timeout_s: float,
) -> Link:
    return connect(
        target.endpoints,
        identity,
        secret,
        node=node,
        name=name,
        incarnation=target.incarnation,
        timeout_s=timeout_s,
    )
