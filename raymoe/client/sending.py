"""Sending: a batch's pairs cut into messages, written into slots, or queued for one.

A message either is answered once or its link is retired first, with everything that was out on it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from raymoe.arena import Cutter
from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.connections import Connections
from raymoe.client.load import Load
from raymoe.client.routes import Attempt, Connection, Routes
from raymoe.client.stats import ClientStats
from raymoe.dispatch import Ints, Message, count_experts, cut_messages
from raymoe.errors import PeerLost
from raymoe.links.protocol import Call, Wire
from raymoe.logs import fields
from raymoe.native import native

log = logging.getLogger(__name__)

_now = time.monotonic


class Sender:
    """Everything here happens under the client's lock. `link_lost()` is called for every link that
    ends unasked."""

    def __init__(
        self,
        config: ClientConfig,
        wire: Wire,
        mode: int,
        stats: ClientStats,
        connections: Connections,
        link_lost: Callable[[], None],
    ) -> None:
        self._config, self._wire, self._mode, self._stats = config, wire, mode, stats
        self._connections, self._link_lost = connections, link_lost
        functions = native()
        self._cutter = None if functions is None else Cutter(functions)

    def send(self, batch: Batch, routes: Routes, load: Load) -> None:
        """Send every pair of a new batch, and count it in `load`."""
        layer, cutter = batch.layer, self._cutter
        if cutter is not None and not routes.any_replicated[layer]:
            messages = self._cut(
                cutter, batch, routes, routes.home_address[layer], load.address(layer)
            )
            if messages is not None:
                self._send_all(batch, routes, messages)
                return
        counts = count_experts(batch.expert_of_pair, routes.experts)
        load.add(layer, counts)
        groups = routes.groups_of_pairs(layer, batch.expert_of_pair, counts)
        if cutter is not None and routes.complete[layer]:
            messages = self._cut(cutter, batch, routes, groups.ctypes.data, None)
            if messages is not None:
                self._send_all(batch, routes, messages)
                return
        self.send_pairs(batch, routes, groups, None)

    def _cut(
        self,
        cutter: Cutter,
        batch: Batch,
        routes: Routes,
        groups_of: int,
        load: int | None,
    ) -> list[Message] | None:
        messages = cutter.cut(
            batch.expert_ids.data_ptr(),
            groups_of,
            by_pair=load is None,
            load=load,
            pairs=batch.open_pairs,
            top_k=batch.top_k,
            tokens=batch.tokens,
            experts=routes.experts,
            groups=len(routes.connections),
            message_tokens=self._message_tokens(batch, routes),
        )
        if messages:
            arena = messages[0].arena
            assert arena is not None
            batch.arenas.append(arena)
        return messages

    def _message_tokens(self, batch: Batch, routes: Routes) -> int:
        return routes.message_tokens(
            batch.top_k, self._wire, self._mode, self._config.message_tokens
        )

    def send_pairs(
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
        messages = cut_messages(
            expert_of_pair,
            group_of_pair,
            top_k=batch.top_k,
            tokens=batch.tokens,
            experts=routes.experts,
            message_tokens=self._message_tokens(batch, routes),
            pairs=pairs,
        )
        self._send_all(batch, routes, messages)

    def _send_all(self, batch: Batch, routes: Routes, messages: list[Message]) -> None:
        for message in messages:
            connection = routes.connections[message.group]
            if connection is None or connection.lost:
                batch.homeless.append(message.pairs)
            else:
                self._send(connection, batch, message, routes.epoch)

    def _send(self, connection: Connection, batch: Batch, message: Message, epoch: int) -> None:
        """Write the message into a slot and submit it; without a free slot it waits for one."""
        link = connection.link
        slot = None if connection.waiting else link.acquire()
        if slot is None:
            connection.waiting.append((batch, message, epoch))
            batch.queued = True
            batch.deadline_s = min(batch.deadline_s, connection.first_deadline_s())
            return
        pairs = message.pair_count
        call = Call(
            batch.layer, batch.mode, message.token_count, message.expert_count, pairs, epoch
        )
        batch.write(message, slot, call)
        connection.pairs_out += pairs
        now = _now()
        deadline_s = now + connection.patience.limit_s(
            connection.pairs_out + connection.queued_pairs, len(connection.attempts) + 1
        )
        batch.last = connection
        connection.attempts[slot.index] = Attempt(batch, message, now, deadline_s)
        if deadline_s < batch.deadline_s:
            batch.deadline_s = deadline_s
        try:
            link.submit(slot, call)
        except PeerLost as lost:
            self.lose(connection, lost.why)

    def send_waiting(self, connection: Connection) -> None:
        """Slots have become free."""
        waiting, connection.waiting = connection.waiting, deque()
        while waiting and not connection.lost:
            batch, message, epoch = waiting.popleft()
            if batch.abandoned:
                continue
            self._send(connection, batch, message, epoch)
            if connection.waiting:  # no slot was left
                break
        connection.waiting.extend(waiting)
        if connection.lost:
            self._orphan(connection)

    def finish(self, batch: Batch) -> None:
        """Every pair has been added: no message of the batch is out any more."""
        if self._cutter is not None:
            for arena in batch.arenas:
                self._cutter.give(arena)
            batch.arenas.clear()

    def lose(self, connection: Connection, why: str) -> None:
        """Retire the link; all that was out on it is homeless; reconnect in the background."""
        if connection.lost:
            return
        self._connections.forget(connection)
        self._stats.links_lost += 1
        log.warning(
            "lost group %s: %s", connection.group_id, why, extra=fields(group=connection.group_id)
        )
        self._orphan(connection)
        self._link_lost()

    def _orphan(self, connection: Connection) -> None:
        """What was out on a lost link, or waited for it, has to go elsewhere."""
        out = [(attempt.batch, attempt.message) for attempt in connection.attempts.values()]
        waiting = [(batch, message) for batch, message, _ in connection.waiting]
        for batch, message in [*out, *waiting]:
            batch.homeless.append(message.pairs)
        connection.attempts.clear()
        connection.waiting.clear()
