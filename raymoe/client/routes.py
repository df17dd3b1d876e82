"""A routing table joined with the links that are up: where the pairs of a batch go."""

from __future__ import annotations

import select
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placement.split import TableSplit
from placement.types import Bools
from raymoe.client.deadline import Patience
from raymoe.dispatch import Ints, Message, spread_over_replicas
from raymoe.errors import FrameError
from raymoe.links.link import Link
from raymoe.links.protocol import MAX_TEXT_BYTES, PARTIAL, Wire
from raymoe.table import RoutingTable

if TYPE_CHECKING:
    from raymoe.client.batch import Batch


class Attempt:
    """One message on its way to one group."""

    __slots__ = ("batch", "deadline_s", "message", "sent_s")

    def __init__(self, batch: Batch, message: Message, sent_s: float, deadline_s: float) -> None:
        self.batch = batch
        self.message = message
        self.sent_s = sent_s
        self.deadline_s = deadline_s


class Connection:
    """A link to one incarnation of a group, and what is out on it. Guarded by the client's lock."""

    def __init__(self, group_id: str, link: Link, patience: Patience, samples: int) -> None:
        self.group_id = group_id
        self.incarnation = link.incarnation
        self.link = link
        self.fd = link.fileno()
        self.request_bytes = link.slots[0].request_memory.nbytes
        self.reply_bytes = link.slots[0].reply_memory.nbytes
        self.patience = patience
        self.attempts: dict[int, Attempt] = {}  # by slot index
        self.waiting: deque[tuple[Batch, Message, int]] = deque()  # for a slot; and the epoch
        self.pairs_out = 0
        self.queued_pairs = 0  # ahead of the last answer, as the group said
        self.lost = False
        self.retiring = False  # no longer in the table: closed once nothing is out
        self.samples: deque[tuple[int, int, int]] = deque(maxlen=samples)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        self._poll = poll.poll
        self._watched_s = 0.0
        self._oldest: Attempt | None = None  # out when last looked at
        self._mark: int | None = None  # the group's progress heard of first since then

    def sleep(self, timeout_s: float) -> bool:
        """Until this link has something, or the timeout; whether it has."""
        return bool(self._poll(int(timeout_s * 1000) + 1))

    def first_deadline_s(self) -> float:
        """When the next answer is due; infinity when nothing is out."""
        return min((a.deadline_s for a in self.attempts.values()), default=float("inf"))

    def watch(self, now: float, *, ping: bool) -> None:
        """Heartbeats: often while an answer is out, else when `ping`. Every 50 ms or so."""
        oldest = next(iter(self.attempts.values()), None)
        if oldest is not self._oldest:
            self._oldest, self._mark = oldest, None
            self._watched_s = now
        elif oldest is not None and self._mark is None and self.link.last_heard_s > self._watched_s:
            self._mark = self.link.progress
        if ping or oldest is not None:
            self.link.ping()

    def progressing(self, now: float, longest_s: float) -> bool:
        """The group has answered somebody while our oldest message is out (and not for longer than
        `longest_s`): it is slow, not hung."""
        oldest = next(iter(self.attempts.values()), None)
        if oldest is None or oldest is not self._oldest or self._mark is None:
            return False
        return self.link.progress > self._mark and now - oldest.sent_s < longest_s

    def extend(self, deadline_s: float) -> None:
        """More time for everything out; progress counts anew."""
        for attempt in self.attempts.values():
            attempt.deadline_s = max(attempt.deadline_s, deadline_s)
        self._mark = self.link.progress

    @property
    def idle(self) -> bool:
        """Nothing is out or waiting."""
        return not self.attempts and not self.waiting


class Routes:
    """Immutable, but for connections that get lost; then `Routes` are built anew."""

    def __init__(
        self,
        routing: RoutingTable,
        connections: tuple[Connection | None, ...],
        previous: Routes | None = None,
    ) -> None:
        """`connections` [G] in the order of the table's groups.

        An expert whose ready replicas are all on groups not reached yet keeps its replicas of
        `previous`: their groups refuse what they no longer hold, so that asking is safe.
        """
        table = routing.table
        self.routing = routing
        self.epoch = table.epoch
        self.connections = connections
        live = np.array([c is not None and not c.lost for c in connections], np.bool_)
        resident: Bools = table.resident & live  # [L, E, G]
        if previous is not None:
            unserved = ~resident.any(2) & table.resident.any(2)  # [L, E]
            for g, group_id in enumerate(table.group_ids):
                if live[g] and group_id in previous.routing.table.group_ids:
                    h = previous.routing.table.group_ids.index(group_id)
                    resident[:, :, g] |= unserved & previous.resident[:, :, h]
        self.resident: Bools = resident
        self.split = TableSplit(replace(table, resident=resident))
        copies = resident.sum(2)
        self.home: list[Ints] = [
            np.ascontiguousarray(h, np.int64) for h in self.split.home
        ]  # L x [E]
        self.home_address: list[int] = [home.ctypes.data for home in self.home]
        self.replicated = [np.flatnonzero(row > 1) for row in copies]
        self.any_replicated = [len(experts) > 0 for experts in self.replicated]
        self.complete: list[bool] = (copies > 0).all(1).tolist()  # L: every expert has a home
        self._message_tokens: dict[int, int] = {}

    @property
    def broken(self) -> bool:
        """A connection has been lost since."""
        return any(c is not None and c.lost for c in self.connections)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.home)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.home[0])

    def groups_of_pairs(self, layer: int, expert_of_pair: Ints, counts: Ints) -> Ints:
        """A group for every pair, int64 [P]; -1 where no live replica is known."""
        replicated = self.replicated[layer]
        home = self.home[layer]
        if not len(replicated) or not counts[replicated].any():
            return home[expert_of_pair]
        by_group = self.split.split(layer, np.where(home >= 0, counts, 0))
        return spread_over_replicas(expert_of_pair, by_group)

    def other_groups(self, batch: Batch, experts: Ints) -> Ints:
        """Where to try again: the least busy live replica that has not refused, or -1. [P]

        A loop over the distinct experts, since this is the path after a failure.
        """
        group_of_expert = np.full(self.experts, -1, np.int64)
        for expert in np.unique(experts).tolist():
            best = None
            for g in np.flatnonzero(self.resident[batch.layer, expert]).tolist():
                connection = self.connections[g]
                if connection is None or connection.lost:
                    continue
                if (connection, expert) in batch.excluded:
                    continue
                if best is None or connection.pairs_out < best:
                    best = connection.pairs_out
                    group_of_expert[expert] = g
        return group_of_expert[experts]

    def message_tokens(self, top_k: int, wire: Wire, mode: int, most: int) -> int:
        """Tokens that fit a message to any group, whatever their experts."""
        known = self._message_tokens.get(top_k)
        if known is None:
            known = most
            for connection in self.connections:
                if connection is not None:
                    known = min(
                        known,
                        tokens_that_fit(
                            connection.request_bytes,
                            connection.reply_bytes,
                            wire,
                            top_k=top_k,
                            experts=self.experts,
                            mode=mode,
                        ),
                    )
            self._message_tokens[top_k] = known
        return known


def tokens_that_fit(
    request_bytes: int, reply_bytes: int, wire: Wire, *, top_k: int, experts: int, mode: int
) -> int:
    """The most tokens whose request and replies fit a slot, whatever their experts.

    Raises FrameError when not even one does.
    """
    pair_bytes = 8 if mode == PARTIAL else 4
    room = request_bytes - 8 * experts - 64
    fit = room // (wire.row_bytes + top_k * pair_bytes)
    rows = 1 if mode == PARTIAL else top_k
    fit = min(fit, reply_bytes // (rows * wire.row_bytes))
    if fit < 1 or reply_bytes < max(4 * experts, MAX_TEXT_BYTES):
        raise FrameError(
            f"slots of {request_bytes} and {reply_bytes} bytes are too small for one token of "
            f"{wire.row_bytes} bytes with {top_k} of {experts} experts"
        )
    return fit
