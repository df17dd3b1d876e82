"""Settling: what comes back is added to its batch, or its pairs are sent to another replica.

A pair is settled by exactly one reply: it is in one message at a time.
"""

from __future__ import annotations

import time

import numpy as np

from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.connections import Connections
from raymoe.client.routes import Connection, Routes
from raymoe.client.sending import Sender
from raymoe.client.stats import ClientStats
from raymoe.dispatch import Message
from raymoe.errors import ExpertsUnavailable, LinkError, PeerLost
from raymoe.links.link import Completion
from raymoe.links.protocol import NACK, REPLY

_now = time.monotonic


class Settler:
    """Everything here happens under the client's lock."""

    def __init__(
        self, config: ClientConfig, stats: ClientStats, connections: Connections, sender: Sender
    ) -> None:
        self._config, self._stats = config, stats
        self._connections, self._sender = connections, sender

    def take(self, events: list[tuple[int, int]]) -> None:
        """What has come by these descriptors."""
        of = self._connections.of
        for fd, _ in events:
            connection = of(fd)
            if connection is not None:
                self.poll(connection)

    def poll(self, connection: Connection) -> None:
        """Settle what this link has received, and send what has waited for its slots."""
        try:
            while done := connection.link.poll():
                for completion in done:
                    self._settle(connection, completion)
                if not connection.attempts:
                    break
        except LinkError as error:
            self._sender.lose(connection, error.why if isinstance(error, PeerLost) else str(error))
            return
        if connection.waiting:
            self._sender.send_waiting(connection)
        if connection.retiring and connection.idle:
            self._connections.forget(connection)

    def _settle(self, connection: Connection, done: Completion) -> None:
        """One answer: add it, or have its pairs sent elsewhere. Its slot is free afterwards."""
        slot, header = done.slot, done.header
        attempt = connection.attempts.pop(slot.index)
        batch, message = attempt.batch, attempt.message
        pairs = message.pair_count
        connection.pairs_out -= pairs
        if header.kind == REPLY:
            connection.queued_pairs = header.queued_pairs
            took_s = _now() - attempt.sent_s
            connection.patience.observe(pairs, header.busy_ns * 1e-9, took_s)
            self._stats.answered(connection.group_id, took_s, pairs, header.busy_ns * 1e-9)
            connection.samples.append((pairs, message.expert_count, header.busy_ns))
            if not batch.abandoned:
                if not batch.add_at(message, slot.reply_address):
                    batch.add(message, done.out_array())
                batch.stalled_s = None
        elif not batch.abandoned:
            self._refused(connection, batch, message, done)
        connection.link.release(slot)

    def _refused(
        self, connection: Connection, batch: Batch, message: Message, done: Completion
    ) -> None:
        refused = message.experts.tolist()
        if done.header.kind == NACK:
            missing = set(done.missing())
            refused = [expert for expert in refused if expert in missing] or refused
            self._stats.nacks += 1
        else:
            self._stats.errors += 1
            self._stats.last_error = f"{connection.group_id}: {done.text()}"
        batch.excluded.update((connection, expert) for expert in refused)
        batch.homeless.append(message.pairs)

    def strike(self, batch: Batch) -> None:
        """A deadline has passed. A group that has answered others since is slow, and gets more
        time; one that has not counts as hung, and its link as lost."""
        now = _now()
        batch.deadline_s = float("inf")
        for connection in self._connections:
            if connection.first_deadline_s() <= now:
                connection.patience.struck()
                if connection.progressing(now, self._config.slow_limit_s):
                    self._stats.slow += 1
                    limit_s = connection.patience.limit_s(
                        connection.pairs_out + connection.queued_pairs, len(connection.attempts)
                    )
                    connection.extend(now + limit_s)
                else:
                    self._stats.deadlines += 1
                    self._sender.lose(connection, "no answer within its deadline")
                    continue
            batch.deadline_s = min(batch.deadline_s, connection.first_deadline_s())

    def send_again(self, batch: Batch, routes: Routes) -> None:
        """Homeless pairs go to another replica, or wait for one until the stall limit.

        Raises ExpertsUnavailable then.
        """
        now = _now()
        if batch.routes is routes and now < batch.retry_s:
            return
        if batch.routes is not None:
            batch.excluded.clear()  # a refusal holds for this table, and not for long
            batch.routes = None
        pairs = np.sort(np.concatenate(batch.homeless))
        batch.homeless.clear()
        groups = routes.other_groups(batch, batch.expert_of_pair[pairs])
        self._stats.retried_pairs += int(np.count_nonzero(groups >= 0))
        self._sender.send_pairs(batch, routes, groups, pairs)
        if (groups >= 0).all():
            return
        batch.routes, batch.retry_s = routes, now + self._config.retry_s
        if batch.stalled_s is None:
            batch.stalled_s = now
        elif now - batch.stalled_s > self._config.stall_limit_s:
            batch.abandoned = True
            lost = np.unique(batch.expert_of_pair[pairs[groups < 0]])
            raise ExpertsUnavailable(batch.layer, tuple(lost.tolist()), now - batch.stalled_s)
