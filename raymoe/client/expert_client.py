"""ExpertClient: dispatch a layer's pairs to groups, combine what comes back, whatever fails.

    batch = client.dispatch(layer, hidden, expert_ids, gate_weights)   # all messages are out
    ...                                                                # overlap
    out = client.combine(batch)                                        # [T, D]

A pair is settled by exactly one reply: it is in one message at a time, and a message either is
answered once or its link is retired first, with everything that was out on it. Pairs of a message
that failed (link lost, refused, error, deadline) go to another replica within the layer.

Threads: dispatch and combine belong to the engine's thread, everything else may come from any.
The lock is held for microseconds, never while waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from functools import partial

import numpy as np
import torch

from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.deadline import Patience
from raymoe.client.dialer import Dial, Dialer
from raymoe.client.routes import Attempt, Connection, Routes
from raymoe.client.stats import ClientStats
from raymoe.dispatch import Ints, Message, count_experts, cut_messages
from raymoe.errors import ConfigError, ExpertsUnavailable, LinkError, PeerLost
from raymoe.links.connect import connect
from raymoe.links.handshake import Identity
from raymoe.links.link import Completion, Link
from raymoe.links.protocol import NACK, PARTIAL, REPLY, ROWS, Call, Wire
from raymoe.table import GroupEndpoint, RoutingTable

log = logging.getLogger(__name__)

_HOUSEKEEPING_S = 0.05
_IDLE_PING_S = 5.0  # groups close links that are silent for long
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
        self._connections: dict[str, Connection] = {}  # live, by group id
        self._retiring: list[Connection] = []
        self._patience: dict[str, Patience] = {}
        self._counts = np.zeros((0, 0), np.int64)  # [L, E]
        self._by_fd: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
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
            if wanted is not None and shape != self._counts.shape:
                raise ConfigError(
                    f"a table of {shape[0]} layers x {shape[1]} experts cannot replace one of "
                    f"{self._counts.shape[0]} x {self._counts.shape[1]}"
                )
            if wanted is None:
                self._counts = np.zeros(shape, np.int64)
            self._wanted = routing
            for group_id, connection in list(self._connections.items()):
                target = routing.endpoints.get(group_id)
                if target is None or target.incarnation != connection.incarnation:
                    del self._connections[group_id]
                    connection.retiring = True
                    self._retiring.append(connection)
        self._rebuild()
        with self._lock:
            self._close_retired()
        return True

    @property
    def epoch(self) -> tuple[int, int] | None:
        """(term, epoch) of the table in use."""
        wanted = self._wanted
        return None if wanted is None else wanted.order

    def connected(self) -> tuple[str, ...]:
        """Ids of the groups with a live link, sorted."""
        with self._lock:
            return tuple(sorted(self._connections))

    def take_counts(self) -> Ints:
        """Pairs dispatched to each expert since the last call: int64 [L, E]."""
        with self._lock:
            counts, self._counts = self._counts, np.zeros_like(self._counts)
        return counts

    def take_timings(self) -> dict[str, list[tuple[int, int, float]]]:
        """Since the last call, of each group: (pairs, active experts, busy seconds) a message."""
        with self._lock:
            taken = {}
            for group_id, connection in self._connections.items():
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
                expert_of_pair = batch.expert_of_pair
                counts = count_experts(expert_of_pair, routes.experts)
                self._counts[layer] += counts
                self._send_to(
                    batch, routes, routes.groups_of_pairs(layer, expert_of_pair, counts), None
                )
        self.stats.dispatch_s += _clock() - started
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
                    self._send_again(batch)
                asked = _clock()
                events = self._wait(batch)
                waited_s += _clock() - asked
                with self._lock:
                    self._take(events)
                    if _now() > batch.deadline_s:
                        self._strike(batch)
            return batch.result()
        finally:
            self.stats.wait_s += waited_s
            self.stats.combine_s += _clock() - started - waited_s
            self.stats.batches += 1

    def close(self) -> None:
        """Close every link and end every thread."""
        self._closed.set()
        self._dialer.close(timeout_s=1.0)
        self._keeper.join(1.0)
        with self._lock:
            for connection in [*self._connections.values(), *self._retiring]:
                self._drop(connection)
            self._connections.clear()
            self._retiring.clear()
            self._epoll.close()
            os.close(self._wake_fd)

    # --- sending ---------------------------------------------------------------------------

    def _send_to(
        self, batch: Batch, routes: Routes, group_of_pair: Ints, pairs: Ints | None
    ) -> None:
        """Cut and send. `group_of_pair` [P] may hold -1: those pairs stay homeless."""
        expert_of_pair = batch.expert_of_pair if pairs is None else batch.expert_of_pair[pairs]
        # a first attempt in a complete layer has a group for every pair; a retry may have none
        known = pairs is None and routes.complete[batch.layer]
        if not known and np.minimum.reduce(group_of_pair) < 0:
            placed = group_of_pair >= 0
            numbers = np.arange(len(placed)) if pairs is None else pairs
            batch.homeless.append(numbers[~placed])
            pairs = numbers[placed]
            if not len(pairs):
                return
            expert_of_pair, group_of_pair = expert_of_pair[placed], group_of_pair[placed]
        for message in cut_messages(
            expert_of_pair,
            group_of_pair,
            top_k=batch.top_k,
            tokens=batch.tokens,
            experts=routes.experts,
            message_tokens=routes.message_tokens(
                batch.top_k, self.wire, self._mode, self.config.message_tokens
            ),
            pairs=pairs,
        ):
            connection = routes.connections[message.group]
            if connection is None or connection.lost:
                batch.homeless.append(message.pairs)
            else:
                self._send(connection, batch, message)

    def _send(self, connection: Connection, batch: Batch, message: Message) -> None:
        """Write the message into a slot and submit it; without a free slot it waits for one."""
        link = connection.link
        slot = None if connection.waiting else link.acquire()
        if slot is None:
            connection.waiting.append((batch, message))
            batch.deadline_s = min(batch.deadline_s, connection.first_deadline_s())
            return
        _, pairs, tokens, token_of_pair, experts, counts = message
        routes = self._routes
        assert routes is not None
        call = Call(batch.layer, batch.mode, len(tokens), len(experts), len(pairs), routes.epoch)
        to = slot.arrays(call)
        to.expert_ids[:] = experts
        to.counts[:] = counts
        to.token_of_pair[:] = token_of_pair
        if to.weights is not None:
            batch.weights.take(pairs, 0, to.weights, "clip")
        if len(tokens) == batch.tokens:  # a plain copy: 200 us against 330 for 512 x 2048
            np.copyto(to.x, batch.x)
        else:  # mode="clip": with "raise" numpy gathers into a buffer first
            batch.x.take(tokens, 0, to.x, "clip")
        patience = connection.patience
        connection.pairs_out += len(pairs)
        now = _now()
        deadline_s = now + patience.limit_s(
            connection.pairs_out + connection.queued_pairs, len(connection.attempts) + 1
        )
        connection.attempts[slot.index] = Attempt(batch, message, now, deadline_s)
        if deadline_s < batch.deadline_s:
            batch.deadline_s = deadline_s
        try:
            link.submit(slot, call)
        except PeerLost as lost:
            self._lose(connection, lost.why)

    def _send_waiting(self, connection: Connection) -> None:
        """Slots have become free."""
        waiting, connection.waiting = connection.waiting, deque()
        while waiting and not connection.lost:
            batch, message = waiting.popleft()
            if batch.abandoned:
                continue
            self._send(connection, batch, message)
            if connection.waiting:  # no slot was left
                break
        connection.waiting.extend(waiting)
        if connection.lost:
            self._orphan(connection)

    def _send_again(self, batch: Batch) -> None:
        """Homeless pairs go to another replica, or wait for one until the stall limit."""
        with self._lock:
            routes = self._routes
            assert routes is not None
            now = _now()
            if batch.routes is routes and now < batch.retry_s:
                return
            if batch.routes is not None:
                batch.excluded.clear()  # a refusal holds for this table, and not for long
                batch.routes = None
            pairs = np.sort(np.concatenate(batch.homeless))
            batch.homeless.clear()
            groups = routes.other_groups(batch, batch.expert_of_pair[pairs])
            self.stats.retried_pairs += int(np.count_nonzero(groups >= 0))
            self._send_to(batch, routes, groups, pairs)
            if (groups >= 0).all():
                return
            batch.routes, batch.retry_s = routes, now + self.config.retry_s
            if batch.stalled_s is None:
                batch.stalled_s = now
            elif now - batch.stalled_s > self.config.stall_limit_s:
                batch.abandoned = True
                lost = np.unique(batch.expert_of_pair[pairs[groups < 0]])
                raise ExpertsUnavailable(batch.layer, tuple(lost.tolist()), now - batch.stalled_s)

    # --- waiting and taking ----------------------------------------------------------------

    def _wait(self, batch: Batch) -> list[tuple[int, int]]:
        """Descriptors that have something, after a short spin and then a sleep."""
        poll = self._epoll.poll
        spin_until = _clock() + self.config.spin_s
        while True:
            events = poll(0)
            if events:
                return events
            if _clock() >= spin_until:
                break
        until_s = batch.deadline_s
        if batch.homeless:
            until_s = min(until_s, batch.retry_s)
        return poll(min(max(until_s - _now(), 0.0) + 0.001, 1.0))

    def _take(self, events: list[tuple[int, int]]) -> None:
        for fd, _ in events:
            connection = self._by_fd.get(fd)
            if connection is None:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                continue
            self._poll(connection)

    def _poll(self, connection: Connection) -> None:
        try:
            while done := connection.link.poll():
                for completion in done:
                    self._settle(connection, completion)
                if not connection.attempts:
                    break
        except LinkError as error:
            self._lose(connection, error.why if isinstance(error, PeerLost) else str(error))
            return
        if connection.waiting:
            self._send_waiting(connection)
        if connection.retiring and connection.idle:
            self._drop(connection)
            self._retiring.remove(connection)

    def _settle(self, connection: Connection, done: Completion) -> None:
        """One answer: add it, or have its pairs sent elsewhere. Its slot is free afterwards."""
        attempt = connection.attempts.pop(done.slot.index)
        batch, message = attempt.batch, attempt.message
        header = done.header
        pairs = len(message.pairs)
        connection.pairs_out -= pairs
        if header.kind == REPLY:
            connection.queued_pairs = header.queued_pairs
            took_s = _now() - attempt.sent_s
            connection.patience.observe(pairs, header.busy_ns * 1e-9, took_s)
            self.stats.answered(connection.group_id, took_s)
            connection.samples.append((pairs, len(message.experts), header.busy_ns))
            if not batch.abandoned:
                batch.add(message, done.out_array())
                batch.stalled_s = None
        elif not batch.abandoned:
            self._refused(connection, batch, message, done)
        connection.link.release(done.slot)

    def _refused(
        self, connection: Connection, batch: Batch, message: Message, done: Completion
    ) -> None:
        refused = message.experts.tolist()
        if done.header.kind == NACK:
            missing = set(done.missing())
            refused = [expert for expert in refused if expert in missing] or refused
            self.stats.nacks += 1
        else:
            self.stats.errors += 1
            self.stats.last_error = f"{connection.group_id}: {done.text()}"
        batch.excluded.update((connection, expert) for expert in refused)
        batch.homeless.append(message.pairs)

    # --- losing ----------------------------------------------------------------------------

    def _strike(self, batch: Batch) -> None:
        """A deadline has passed. A group that has answered others since is slow, and gets more
        time; one that has not counts as hung, and its link as lost."""
        now = _now()
        batch.deadline_s = float("inf")
        for connection in [*self._connections.values(), *self._retiring]:
            if connection.first_deadline_s() <= now:
                connection.patience.struck()
                if connection.progressing(now, self.config.slow_limit_s):
                    self.stats.slow += 1
                    limit_s = connection.patience.limit_s(
                        connection.pairs_out + connection.queued_pairs, len(connection.attempts)
                    )
                    connection.extend(now + limit_s)
                else:
                    self.stats.deadlines += 1
                    self._lose(connection, "no answer within its deadline")
                    continue
            batch.deadline_s = min(batch.deadline_s, connection.first_deadline_s())

    def _lose(self, connection: Connection, why: str) -> None:
        """Retire the link; all that was out on it is homeless; reconnect in the background."""
        if connection.lost:
            return
        self._drop(connection)
        self.stats.links_lost += 1
        log.warning("lost group %s: %s", connection.group_id, why)
        self._orphan(connection)
        if self._connections.get(connection.group_id) is connection:
            del self._connections[connection.group_id]
        if connection in self._retiring:
            self._retiring.remove(connection)
        self._dial_missing()

    def _orphan(self, connection: Connection) -> None:
        """What was out on a lost link, or waited for it, has to go elsewhere."""
        out = [(attempt.batch, attempt.message) for attempt in connection.attempts.values()]
        for batch, message in [*out, *connection.waiting]:
            batch.homeless.append(message.pairs)
        connection.attempts.clear()
        connection.waiting.clear()

    def _drop(self, connection: Connection) -> None:
        """Close the link and forget its descriptor."""
        if not connection.lost:
            connection.lost = True
            del self._by_fd[connection.fd]
            with contextlib.suppress(OSError):  # a link that ended has closed it already
                self._epoll.unregister(connection.fd)
            connection.link.close()

    # --- in the background -----------------------------------------------------------------

    def _connected(self, target: GroupEndpoint, link: Link) -> None:
        """A dialer's thread has reached a group."""
        with self._lock:
            wanted = self._wanted
            current = wanted.endpoints.get(target.id) if wanted is not None else None
            if self._closed.is_set() or current != target or target.id in self._connections:
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
            connection = Connection(target.id, link, patience, config.samples)
            self._connections[target.id] = connection
            self._by_fd[connection.fd] = connection
            self._epoll.register(connection.fd, select.EPOLLIN)
        self._rebuild()

    def _rebuild(self) -> None:
        """New routes from the wanted table and the live connections; wakes a waiting combine.

        Preparing a large table takes milliseconds: not under the engine's lock.
        """
        with self._building:
            with self._lock:
                wanted, previous = self._wanted, self._routes
                assert wanted is not None
                connections = tuple(self._connections.get(i) for i in wanted.table.group_ids)
            routes = Routes(wanted, connections, previous)
            with self._lock:
                self._routes = routes
                self._dial_missing()
                if not self._closed.is_set():
                    os.eventfd_write(self._wake_fd, 1)

    def _dial_missing(self) -> None:
        wanted = self._wanted
        if wanted is not None and not self._closed.is_set():
            self._dialer.want(
                {
                    group_id: target
                    for group_id, target in wanted.endpoints.items()
                    if group_id not in self._connections and target.endpoints
                }
            )

    def _close_retired(self) -> None:
        for connection in [c for c in self._retiring if c.idle]:
            self._drop(connection)
            self._retiring.remove(connection)

    def _keep_house(self) -> None:
        """Heartbeats; links that end while the engine rests; routes around lost ones."""
        next_ping_s = 0.0
        while not self._closed.wait(_HOUSEKEEPING_S):
            now = _now()
            with self._lock:
                for connection in list(self._connections.values()):
                    if connection.idle:
                        self._poll(connection)
                    if not connection.lost:
                        connection.watch(now, ping=now >= next_ping_s)
                self._close_retired()
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
