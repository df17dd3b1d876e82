"""A link that fails on order, for tests: drop, delay, corrupt, or lose the peer at some message.

Wraps any Link. Messages are the submitted requests, counted from 1.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from raymoe.errors import LinkError, PeerLost
from raymoe.links.handshake import Peer
from raymoe.links.link import Completion, Link, Slot
from raymoe.links.protocol import Call, Wire


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, by number of the request."""

    drop: frozenset[int] = frozenset()  # never sent: the reply never comes
    delay_s: Mapping[int, float] = field(default_factory=dict)  # the reply shows up so much later
    corrupt: frozenset[int] = frozenset()  # sent with an expert that cannot exist
    kill: frozenset[int] = frozenset()  # the link is lost right after it was sent
    on_kill: Callable[[], None] | None = None  # e.g. os.kill of the group; else the link is closed


class FaultyLink:
    """A Link whose faults are known."""

    def __init__(self, inner: Link, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults
        self.sent = 0
        self._dropped: set[int] = set()  # slot indices
        self._late: dict[int, float] = {}  # sequence number -> seconds of delay
        self._held: list[tuple[float, Completion]] = []  # due, completion
        self._timers: list[threading.Timer] = []
        self._lost: PeerLost | None = None
        # ready when the inner link is, or when a held completion is due
        self._due_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._due_fd, select.EPOLLIN)
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._closing = threading.Lock()

    @property
    def peer(self) -> Peer:
        """The inner link's."""
        return self.inner.peer

    @property
    def wire(self) -> Wire:
        """The inner link's."""
        return self.inner.wire

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The inner link's."""
        return self.inner.slots

    @property
    def incarnation(self) -> int:
        """The inner link's."""
        return self.inner.incarnation

    @property
    def last_heard_s(self) -> float:
        """The inner link's."""
        return self.inner.last_heard_s

    @property
    def progress(self) -> int:
        """The inner link's."""
        return self.inner.progress

    @property
    def slot_bytes(self) -> int:
        """The inner link's."""
        return self.inner.slot_bytes

    def acquire(self) -> Slot | None:
        """As the inner link."""
        return self.inner.acquire()

    def submit(self, slot: Slot, call: Call) -> int:
        """As the inner link, with the faults of this message."""
        if self._lost is not None:
            raise self._lost
        self.sent += 1
        number, faults = self.sent, self.faults
        if number in faults.drop:
            self._dropped.add(slot.index)
            return -1
        if number in faults.corrupt:
            slot.arrays(call).expert_ids[0] = -1
        seq = self.inner.submit(slot, call)
        if number in faults.delay_s:
            self._late[seq] = faults.delay_s[number]
        if number in faults.kill:
            if faults.on_kill is not None:
                faults.on_kill()  # poll() will see the end of file
            else:
                self._lost = PeerLost(self.peer.name, f"killed at message {number} (a test)")
                os.eventfd_write(self._due_fd, 1)  # so that a waiting client polls, and learns
        return seq

    def poll(self) -> list[Completion]:
        """As the inner link, later."""
        if self._lost is not None:
            self._finish()
            raise self._lost
        try:
            arrived = self.inner.poll()
        except PeerLost as error:
            self._lost = error
            self._finish()
            raise
        now = time.monotonic()
        done = []
        for completion in arrived:
            delay_s = self._late.pop(completion.header.seq, 0.0)
            if delay_s > 0:
                self._held.append((now + delay_s, completion))
                self._ring_in(delay_s)
            else:
                done.append(completion)
        if self._held:
            done += [completion for due, completion in self._held if due <= now]
            self._held = [entry for entry in self._held if entry[0] > now]
            self._clear_bell()
        return done

    def _ring_in(self, delay_s: float) -> None:
        def ring() -> None:
            with self._closing:
                if not self._epoll.closed:
                    os.eventfd_write(self._due_fd, 1)

        timer = threading.Timer(delay_s + 0.001, ring)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _clear_bell(self) -> None:
        try:
            os.eventfd_read(self._due_fd)
        except BlockingIOError:
            return

    def release(self, slot: Slot) -> None:
        """As the inner link; a dropped request stays in flight."""
        if slot.index in self._dropped:
            raise LinkError("a slot in flight cannot be released: close the link to abandon it")
        self.inner.release(slot)

    def in_flight(self) -> int:
        """Also what was dropped or is held back."""
        return self.inner.in_flight() + len(self._dropped) + len(self._held)

    def ping(self) -> None:
        """As the inner link."""
        self.inner.ping()

    def fileno(self) -> int:
        """An epoll of its own; -1 when closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def close(self) -> None:
        """Close the inner link too."""
        self._lost = self._lost or PeerLost(self.peer.name, "closed here")
        self._finish()

    def _finish(self) -> None:
        with self._closing:
            if not self._epoll.closed:
                self._epoll.close()
                os.close(self._due_fd)
        for timer in self._timers:
            timer.cancel()
        self.inner.close()
