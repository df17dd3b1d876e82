"""A group's end of the data plane: every link, one event loop, one queue for the compute thread.

The loop has no thread of its own while the compute thread waits: poll() itself waits on the epoll,
so that a request reaches the kernel without a hand-over between threads (on the two-core machine
that costs 30-100 us, more than the whole round trip). While the compute thread computes, a second
thread looks at the same epoll every few milliseconds: it accepts, reads, writes on and answers
heartbeats. The lock is held while events are handled, never while waiting or computing.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from raymoe.errors import FrameError, HandshakeRefused
from raymoe.links import inproc, shm, tcp
from raymoe.links.fair import Fairness, FairQueue
from raymoe.links.greeting import Greeting
from raymoe.links.handshake import Identity, Peer, Responder
from raymoe.links.link import Endpoint, Request, SlotTerms
from raymoe.links.mapped import MappedServerLink
from raymoe.links.protocol import (
    _HEADER,
    ERROR,
    HEADER_BYTES,
    MAGIC,
    MAX_TEXT_BYTES,
    NACK,
    PONG,
    REPLY,
    Wire,
    make_header,
)
from raymoe.links.serverlink import ServerLink, Waiting
from raymoe.links.slots import granted, segment_bytes
from raymoe.links.streams import frame

log = logging.getLogger(__name__)

_BUSY_TICK_S = 0.003  # between two looks of the second thread while the first computes
_IDLE_TICK_S = 0.05

Bulk = Callable[[socket.socket, Peer], None]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a group's end allows."""

    shm: bool = True
    tcp_host: str | None = "127.0.0.1"  # None: no TCP
    tcp_port: int = 0  # 0: the system chooses
    advertise_host: str = ""  # what other nodes connect to; tcp_host when empty
    inproc: bool = False  # reachable from this process, for tests
    terms: SlotTerms = field(default_factory=SlotTerms)  # the most a link gets
    fairness: Fairness = field(default_factory=Fairness)
    max_links: int = 256
    max_strangers: int = 16  # unauthenticated connections
    handshake_s: float = 5.0
    lease_s: float = 60.0  # a link silent for so long is closed: clients ping
    spin_s: float = 0.0  # poll() looks so long before it sleeps; 0 where peers >= cores


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
        self._secret = secret
        self._layers, self._experts = layers, experts
        self._name, self._incarnation, self._node = name, incarnation, node
        self._bulk = bulk
        self._lock = threading.RLock()
        self._queue: FairQueue[Waiting] = FairQueue(self.config.fairness)
        self._links: dict[int, ServerLink] = {}  # by id
        self._link_of_fd: dict[int, ServerLink] = {}
        self._strangers: dict[int, Greeting] = {}  # by fd, oldest first
        self._listeners: dict[int, tuple[socket.socket, bool]] = {}  # fd -> socket, is a stream
        self._next_id = 1
        self._raw = bytearray(HEADER_BYTES)
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._endpoints: list[Endpoint] = []
        self._polling = False  # the compute thread serves the loop
        self._woken = False
        self._closed = False
        self._stopped = threading.Event()
        self._look_again_s = 0.0  # when leases and handshakes are next looked at
        self._deaf_until_s = 0.0  # accept() failed: the process is out of descriptors
        try:
            self._listen()
        except OSError:
            self._close_all()
            raise
        self._thread = threading.Thread(target=self._serve_beside, name="links", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- for the compute thread

    def poll(self, timeout_s: float) -> list[Request]:
        """The next request(s), chosen fairly; [] after `timeout_s`, wake() or stop()."""
        queue, spin_s = self._queue, self.config.spin_s
        self._polling = True
        try:
            now = time.monotonic()
            deadline, spin_until = now + timeout_s, now + min(spin_s, timeout_s)
            wait = 0.0 if spin_s or queue.count or self._woken else timeout_s
            while not self._stopped.is_set():  # stop() waits for us before it closes the epoll
                events = self._epoll.poll(wait)
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
                wait = 0.0 if queue.count or now < spin_until else deadline - now
            return []
        finally:
            self._polling = False

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
            region = link.regions[header.slot][1]
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
        return list(self._endpoints)

    def peers(self) -> list[Peer]:
        """Who is connected."""
        with self._lock:
            return [link.peer for link in self._links.values()]

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
            elif fd in self._strangers:
                self._greet(self._strangers[fd])
            elif fd in self._listeners:
                self._accept(*self._listeners[fd])

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
            for greeting in list(self._strangers.values()):
                if now - greeting.since_s > self.config.handshake_s:
                    self._dismiss(greeting, "it took too long")
            for link in list(self._links.values()):
                if now - link.heard_s > self.config.lease_s:
                    self._close(link, f"silent for {self.config.lease_s:g} s")
            if self._deaf_until_s and now >= self._deaf_until_s:
                self._deaf_until_s = 0.0
                for sock, _ in self._listeners.values():
                    self._epoll.modify(sock, select.EPOLLIN)

    # ---------------------------------------------------------------- strangers

    def _listen(self) -> None:
        config, node = self.config, self._node
        if config.shm:
            # a random name: whoever guesses it still has to prove itself
            name = f"raymoe/{self.identity.deployment}/{self._name}/{secrets.token_hex(8)}"[-100:]
            self._add_listener(shm.listen(name), stream=False)
            self._endpoints.append(Endpoint(kind="shm", address=name, node=node))
        if config.tcp_host is not None:
            sock = tcp.listen(config.tcp_host, config.tcp_port)
            self._add_listener(sock, stream=True)
            host = config.advertise_host or config.tcp_host
            address = f"{host}:{sock.getsockname()[1]}"
            self._endpoints.append(Endpoint(kind="tcp", address=address, node=node))
        if config.inproc:
            name = f"{self._name}/{secrets.token_hex(8)}"
            inproc.publish(name, self.adopt)
            self._endpoints.append(Endpoint(kind="inproc", address=name, node=node))

    def _add_listener(self, sock: socket.socket, *, stream: bool) -> None:
        self._listeners[sock.fileno()] = sock, stream
        self._epoll.register(sock, select.EPOLLIN)

    def adopt(self, sock: socket.socket) -> None:
        """Take a connected SEQPACKET socket as if it had been accepted (in-process links)."""
        with self._lock:
            if self._stopped.is_set():
                sock.close()
                return
            self._welcome_stranger(sock, stream=False)

    def _accept(self, listener: socket.socket, stream: bool) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: the backlog would keep us spinning
            log.warning("cannot accept: %s; not listening for a second", error)
            self._deaf_until_s = time.monotonic() + 1.0
            for other, _ in self._listeners.values():
                self._epoll.modify(other, 0)
            return
        if stream:
            tcp.tune(sock)
        elif not shm.same_user(sock):
            log.warning("refused a connection of another user")
            sock.close()
            return
        self._welcome_stranger(sock, stream=stream)

    def _welcome_stranger(self, sock: socket.socket, *, stream: bool) -> None:
        while len(self._strangers) >= self.config.max_strangers:
            # the oldest goes: a handshake takes a millisecond, so who still waits is not shaking
            self._dismiss(next(iter(self._strangers.values())), "too many wait")
        sock.setblocking(False)
        roles: tuple[str, ...] = ("router", "group") if stream and self._bulk else ("router",)
        responder = Responder(
            self.identity,
            roles,  # type: ignore[arg-type]
            self._secret,
            name=self._name,
            incarnation=self._incarnation,
            terms=self._terms,
        )
        greeting = Greeting(sock, responder, stream=stream, now=time.monotonic())
        self._strangers[sock.fileno()] = greeting
        self._epoll.register(sock, select.EPOLLIN)

    def _terms(self, peer: Peer) -> dict[str, int]:
        if peer.role != "router":
            return {}
        if len(self._links) >= self.config.max_links:
            raise HandshakeRefused(f"{self.config.max_links} links are open, which is the limit")
        terms = granted(dict(peer.offer), self.config.terms)
        return {
            "slots": terms.slots,
            "request_bytes": terms.request_bytes,
            "reply_bytes": terms.reply_bytes,
        }

    def _greet(self, greeting: Greeting) -> None:
        try:
            welcome = greeting.on_ready()
            if welcome is not None:
                self._admit(greeting, welcome)
        except (HandshakeRefused, OSError) as reason:
            self._dismiss(greeting, str(reason))
        except Exception:  # as above: strangers can reach this
            log.exception("a handshake failed")
            self._dismiss(greeting, "internal error")

    def _dismiss(self, greeting: Greeting, why: str) -> None:
        if self._strangers.pop(greeting.sock.fileno(), None) is not None:
            log.warning("%s refused a connection: %s", self._name or "group", why)
            greeting.sock.close()

    def _admit(self, greeting: Greeting, welcome: bytes) -> None:
        """The peer has proved itself: send the welcome and make it a link (or bulk)."""
        sock, peer = greeting.sock, greeting.responder.peer
        assert peer is not None
        if peer.role == "group":
            self._hand_on(sock, peer, welcome)
            return
        terms = SlotTerms(**peer.terms)
        link: ServerLink
        if greeting.stream:
            sock.send(frame(welcome))
            link = tcp.TcpServerLink(sock, peer, self._wire, terms)
        else:
            fd, memory = shm.make_segment(f"raymoe-{self._name}", segment_bytes(terms))
            try:
                socket.send_fds(sock, [welcome], [fd])
            finally:
                os.close(fd)
            link = MappedServerLink(sock, peer, self._wire, memory, terms)
        del self._strangers[sock.fileno()]
        link.id, self._next_id = self._next_id, self._next_id + 1
        link.incarnation, link.layers, link.pong = self._incarnation, self._layers, self._pong
        self._links[link.id] = self._link_of_fd[sock.fileno()] = link

    def _hand_on(self, sock: socket.socket, peer: Peer, welcome: bytes) -> None:
        assert self._bulk is not None
        sock.send(frame(welcome))
        del self._strangers[sock.fileno()]
        self._epoll.unregister(sock)
        sock.setblocking(True)
        try:
            self._bulk(sock, peer)
        except Exception:
            log.exception("the bulk callback failed")
            sock.close()

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
        for endpoint in self._endpoints:
            if endpoint.kind == "inproc":
                inproc.withdraw(endpoint.address)
        for link in list(self._links.values()):
            self._close(link, "stopped")
        for greeting in list(self._strangers.values()):
            greeting.sock.close()
        for sock, _ in self._listeners.values():
            sock.close()
        self._strangers.clear()
        self._listeners.clear()
        self._epoll.close()
        os.close(self._wake_fd)
