"""A group's end of the data plane: every link, one event loop, one queue for the compute thread.

The loop has no thread of its own while the compute thread waits: poll() itself waits on the epoll,
so that a request reaches the kernels without a hand-over between threads (a bare 64-byte ping-pong
takes 9 us, with a hand-over 16-19). While the compute thread computes, a second thread looks at the
same epoll every few milliseconds: it accepts, reads, writes on and answers heartbeats. The lock is
held while events are handled, never while waiting or computing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time

import numpy as np

from raymoe.errors import FrameError
from raymoe.links.entrance import Bulk, Entrance
from raymoe.links.fair import FairQueue
from raymoe.links.handshake import Identity, Peer, Responder
from raymoe.links.link import Endpoint, Request
from raymoe.links.protocol import (
    _HEADER,
    ERROR,
    HEADER_BYTES,
    MAGIC,
    MAX_TEXT_BYTES,
    NACK,
    PONG,
    REPLY,
    Call,
    Wire,
    make_header,
)
from raymoe.links.serverconfig import ServerConfig
from raymoe.links.serverlink import ServerLink, Waiting
from raymoe.links.spin import Spin

__all__ = ["Bulk", "Server", "ServerConfig"]

log = logging.getLogger(__name__)

_BUSY_TICK_S = 0.003  # between two looks of the second thread while the first computes
_IDLE_TICK_S = 0.05


class Server:
    """A group's end of all its links (a LinkServer).

    `layers` and `experts` bound what a request may name. `bulk(sock, peer)` is given the blocking
    socket of every TCP connection whose role is `group`, in the loop's thread: it must hand it on.
    poll() and reply() belong to one compute thread; everything else may come from any.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        layers: int,
        experts: int,
        name: str = "",
        incarnation: int = 0,
        node: str = "",
        config: ServerConfig | None = None,
        bulk: Bulk | None = None,
    ) -> None:
        self.config = config or ServerConfig()
        self.identity = identity
        self.progress = 0  # work done; told in every PONG. The compute thread may raise it too
        self._wire = Wire(hidden=identity.hidden, dtype=identity.wire_dtype)
        self._layers, self._experts = layers, experts
        self._name, self._incarnation = name, incarnation
        self._lock = threading.RLock()
        self._queue: FairQueue[Waiting] = FairQueue(self.config.fairness)
        self._links: dict[int, ServerLink] = {}  # by id
        self._link_of_fd: dict[int, ServerLink] = {}
        self._next_id = 1
        self._raw = bytearray(HEADER_BYTES)
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._polling = False  # the compute thread serves the loop
        self._spin = Spin(self.config.spin_s)
        self._woken = False
        self._closed = False
        self._stopped = threading.Event()
        self._look_again_s = 0.0  # when leases and handshakes are next looked at
        try:
            self._entrance = Entrance(
                self.config,
                self._epoll,
                self._wire,
                name=name,
                label=f"{identity.deployment}.{name}",
                node=node,
                responder=lambda roles, terms: Responder(
                    identity, roles, secret, name=name, incarnation=incarnation, terms=terms
                ),
                links_open=self._links.__len__,
                admit=self._admit,
                adopt=self.adopt,
                bulk=bulk,
            )
        except OSError:  # e.g. the port is taken
            self._epoll.close()
            os.close(self._wake_fd)
            raise
        self._thread = threading.Thread(target=self._serve_beside, name="links", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- for the compute thread

    def poll(self, timeout_s: float) -> list[Request]:
        """The next request(s), chosen fairly; [] after `timeout_s`, wake() or stop()."""
        queue, epoll_poll = self._queue, self._epoll.poll
        self._polling = True
        try:
            now = time.monotonic()
            deadline = now + timeout_s
            waiting = queue.count or self._woken
            events = [] if waiting or self._stopped.is_set() else self._look(now)
            wait = 0.0 if waiting or events else timeout_s
            while not self._stopped.is_set():  # stop() waits for us before it closes the epoll
                if not events:
                    events = epoll_poll(wait)
                with self._lock:
                    if self._stopped.is_set():
                        break
                    self._handle(events)
                    now = time.monotonic()
                    chosen = queue.pop(now) if queue.count else []
                    if not chosen and self._woken:
                        self._woken = False
                        return []
                requests = [r for item in chosen if (r := self._checked(item)) is not None]
                if requests or now >= deadline:
                    return requests
                events = []
                wait = 0.0 if queue.count else deadline - now
            return []
        finally:
            self._polling = False

    def poll_decode(self) -> list[Request]:
        """Small requests that wait now, to be served together; for the thread that polls, in the
        midst of a large one."""
        with self._lock:
            if self._closed:
                return []
            self._handle(self._epoll.poll(0))
            chosen = self._queue.pop_decode()
        return [r for item in chosen if (r := self._checked(item)) is not None]

    def is_large(self, call: Call) -> bool:
        """Whether small requests may pass it by."""
        return call.tokens > self.config.fairness.decode_tokens

    def _look(self, now: float) -> list[tuple[int, int]]:
        """Spin while that pays; the events that came."""
        limit_s = self._spin.limit_s()
        if not limit_s:
            return []
        until, epoll_poll = now + limit_s, self._epoll.poll
        while not (events := epoll_poll(0)) and time.monotonic() < until:
            continue
        self._spin.note(bool(events))
        return events

    def _checked(self, item: Waiting) -> Request | None:
        try:
            return item.request(self._experts)
        except (FrameError, IndexError) as error:  # IndexError: closed since, no regions any more
            with self._lock:
                if not item.link.closed:
                    self._close(item.link, f"bad frame: {error}")
            return None

    def reply(
        self,
        request: Request,
        *,
        missing: list[int] | None = None,
        error: str | None = None,
        busy_ns: int = 0,
    ) -> bool:
        """Answer a request; see LinkServer."""
        link = self._links.get(request.link_id)
        header, call = request.header, request.call
        self.progress += 1
        if link is None:
            return False
        kind, count = REPLY, call.experts
        size = call.out_rows * self._wire.row_bytes
        with self._lock:
            if link.closed:
                return False
            region = link.regions[header.slot].reply
            if error is not None:
                text = error.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
                kind, size = ERROR, len(text)
                region[:size] = np.frombuffer(text, dtype=np.uint8)
            elif missing:
                kind, count, size = NACK, len(missing), 4 * len(missing)
                region[:size].view("<i4")[:] = missing
            queue = self._queue
            _HEADER.pack_into(
                self._raw, 0, MAGIC, kind, call.mode, header.slot, header.seq, call.layer,
                min(queue.experts, 0xFFFF), call.tokens, count, call.pairs, size, header.epoch,
                self._incarnation, busy_ns, min(queue.pairs, 0xFFFFFFFF),
            )  # fmt: skip
            try:
                link.send(self._raw, header.slot, size)
                if link.wants_write:
                    self._watch(link)
            except (FrameError, OSError) as reason:
                self._close(link, f"cannot reply: {reason}")
                return False
        return True

    def wake(self) -> None:
        """Make a waiting poll() return."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    # ---------------------------------------------------------------- what others see

    def endpoints(self) -> list[Endpoint]:
        """Where clients connect."""
        return list(self._entrance.endpoints)

    def peers(self) -> list[Peer]:
        """Who is connected."""
        with self._lock:
            return [link.peer for link in self._links.values()]

    def strangers(self) -> int:
        """Connections that have not proved themselves."""
        return self._entrance.strangers

    def queued(self) -> tuple[int, int]:
        """Pairs and experts that wait."""
        return self._queue.pairs, self._queue.experts

    def stop(self) -> None:
        """Close everything."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        until = time.monotonic() + 1.0
        while self._polling and time.monotonic() < until:
            time.sleep(0.0005)  # closing the descriptor of the wake-up could take the wake-up back
        with self._lock:
            self._close_all()

    # ---------------------------------------------------------------- the loop

    def _serve_beside(self) -> None:
        """The second thread: looks at the loop now and then while the compute thread computes.

        It never waits on the epoll, for the kernel would wake it instead of the compute thread.
        """
        seen = -1
        while True:
            active = not self._polling or seen != self.progress
            seen = self.progress
            if self._stopped.wait(_BUSY_TICK_S if active else _IDLE_TICK_S):
                return
            if not self._polling:
                events = self._epoll.poll(0)
                with self._lock:
                    self._handle(events)
                    if self._polling and (self._woken or self._queue.count):
                        os.eventfd_write(self._wake_fd, 1)  # we took what poll() waits for
            self._look_after()

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Deal with what epoll reported. The lock is held."""
        for fd, what in events:
            link = self._link_of_fd.get(fd)
            if link is not None:
                try:
                    item = link.on_ready(what)
                    if item is not None:
                        self._queue.push(item)
                    if link.wants_write != link.watched:
                        self._watch(link)
                except (FrameError, OSError) as error:
                    self._close(link, str(error))
                except Exception:  # a mistake of ours that a peer has found must not end the group
                    log.exception("a link failed")
                    self._close(link, "internal error")
            elif fd == self._wake_fd:
                try:
                    os.eventfd_read(self._wake_fd)
                except BlockingIOError:
                    continue
                self._woken = True
            else:
                self._entrance.on_ready(fd)

    def _watch(self, link: ServerLink) -> None:
        link.watched = link.wants_write
        what = select.EPOLLIN | (select.EPOLLOUT if link.wants_write else 0)
        self._epoll.modify(link.sock, what)

    def _look_after(self) -> None:
        """End handshakes and leases that have run out; at most four times a second."""
        now = time.monotonic()
        if now < self._look_again_s:
            return
        self._look_again_s = now + min(0.25, self.config.lease_s / 4, self.config.handshake_s / 4)
        with self._lock:
            self._entrance.look_after(now)
            for link in list(self._links.values()):
                if now - link.heard_s > self.config.lease_s:
                    self._close(link, f"silent for {self.config.lease_s:g} s")

    # ---------------------------------------------------------------- links come and go

    def adopt(self, sock: socket.socket) -> None:
        """Take a connected SEQPACKET socket as if it had been accepted (in-process links)."""
        with self._lock:
            if self._stopped.is_set():
                sock.close()
            else:
                self._entrance.welcome(sock, stream=False)

    def _admit(self, link: ServerLink) -> None:
        link.id, self._next_id = self._next_id, self._next_id + 1
        link.incarnation, link.layers, link.pong = self._incarnation, self._layers, self._pong
        self._links[link.id] = self._link_of_fd[link.sock.fileno()] = link

    def _pong(self) -> bytearray:
        raw = bytearray(HEADER_BYTES)
        make_header(
            PONG,
            incarnation=self._incarnation,
            payload_bytes=self.progress,
            queued_pairs=min(self._queue.pairs, 0xFFFFFFFF),
            queued_experts=min(self._queue.experts, 0xFFFF),
        ).pack_into(raw)
        return raw

    # ---------------------------------------------------------------- ends

    def _close(self, link: ServerLink, why: str) -> None:
        log.info("%s closed the link of %s: %s", self._name or "group", link.peer.name, why)
        self._queue.drop(link.id)
        self._links.pop(link.id, None)
        self._link_of_fd.pop(link.sock.fileno(), None)
        link.close()

    def _close_all(self) -> None:
        self._closed = True
        for link in list(self._links.values()):
            self._close(link, "stopped")
        self._entrance.close()
        self._epoll.close()
        os.close(self._wake_fd)
