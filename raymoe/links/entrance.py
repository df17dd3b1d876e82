"""Where strangers come in: listeners, the cap on who has not proved itself, and the handshake.

Part of a Server, under its lock and on its epoll; who comes out is a link, or a socket for bulk.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
import socket
import time
from collections.abc import Callable

from raymoe.errors import HandshakeRefused
from raymoe.links import inproc, shm, tcp
from raymoe.links.greeting import Greeting
from raymoe.links.handshake import Peer, Responder, Role
from raymoe.links.link import Endpoint, SlotTerms
from raymoe.links.mapped import MappedServerLink
from raymoe.links.protocol import Wire
from raymoe.links.serverconfig import ServerConfig
from raymoe.links.serverlink import ServerLink
from raymoe.links.slots import granted, segment_bytes
from raymoe.links.streams import frame

log = logging.getLogger(__name__)

Bulk = Callable[[socket.socket, Peer], None]


class Entrance:
    """Not thread-safe: the server holds its lock. OSError when it cannot listen."""

    def __init__(
        self,
        config: ServerConfig,
        epoll: select.epoll,
        wire: Wire,
        *,
        name: str,
        label: str,
        node: str,
        responder: Callable[[tuple[Role, ...], Callable[[Peer], dict[str, int]]], Responder],
        links_open: Callable[[], int],
        admit: Callable[[ServerLink], None],
        adopt: Callable[[socket.socket], None],
        bulk: Bulk | None,
    ) -> None:
        """`name` is for the log, `label` for what the system shows (sockets, segments).
        `responder(roles, terms)` makes a handshake; `admit(link)` takes a new link; `adopt` is
        what in-process clients call."""
        self.endpoints: list[Endpoint] = []
        self._config, self._epoll, self._wire, self._name = config, epoll, wire, name
        self._responder, self._links_open, self._admit_link = responder, links_open, admit
        self._bulk = bulk
        self._label = re.sub(r"[^A-Za-z0-9._-]", "_", label)[:70]
        self._strangers: dict[int, Greeting] = {}  # by fd, oldest first
        self._listeners: dict[int, tuple[socket.socket, bool]] = {}  # fd -> socket, is a stream
        self._deaf_until_s = 0.0  # accept() failed: the process is out of descriptors
        try:
            self._listen(node, adopt)
        except OSError:
            self.close()
            raise

    @property
    def strangers(self) -> int:
        """Connections that have not proved themselves."""
        return len(self._strangers)

    def on_ready(self, fd: int) -> None:
        """Deal with an event of a listener or a stranger; any other descriptor is ignored."""
        greeting = self._strangers.get(fd)
        if greeting is not None:
            self._greet(greeting)
        elif fd in self._listeners:
            self._accept(*self._listeners[fd])

    def look_after(self, now: float) -> None:
        """End handshakes that have run out; listen again."""
        for greeting in list(self._strangers.values()):
            if now - greeting.since_s > self._config.handshake_s:
                self._dismiss(greeting, "it took too long")
        if self._deaf_until_s and now >= self._deaf_until_s:
            self._deaf_until_s = 0.0
            for sock, _ in self._listeners.values():
                self._epoll.modify(sock, select.EPOLLIN)

    def close(self) -> None:
        """Close every listener and stranger."""
        for endpoint in self.endpoints:
            if endpoint.kind == "inproc":
                inproc.withdraw(endpoint.address)
        for greeting in self._strangers.values():
            greeting.sock.close()
        for sock, _ in self._listeners.values():
            sock.close()
        self._strangers.clear()
        self._listeners.clear()

    def _listen(self, node: str, adopt: Callable[[socket.socket], None]) -> None:
        config = self._config
        if config.shm:
            # a random name: whoever guesses it still has to prove itself
            name = f"raymoe/{self._label}/{secrets.token_hex(8)}"
            self._add_listener(shm.listen(name), stream=False)
            self.endpoints.append(Endpoint(kind="shm", address=name, node=node))
        if config.tcp_host is not None:
            sock = tcp.listen(config.tcp_host, config.tcp_port)
            self._add_listener(sock, stream=True)
            host = config.advertise_host or config.tcp_host
            address = f"{host}:{sock.getsockname()[1]}"
            self.endpoints.append(Endpoint(kind="tcp", address=address, node=node))
        if config.inproc:
            name = f"{self._name}/{secrets.token_hex(8)}"
            inproc.publish(name, adopt)
            self.endpoints.append(Endpoint(kind="inproc", address=name, node=node))

    def _add_listener(self, sock: socket.socket, *, stream: bool) -> None:
        self._listeners[sock.fileno()] = sock, stream
        self._epoll.register(sock, select.EPOLLIN)

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
        self.welcome(sock, stream=stream)

    def welcome(self, sock: socket.socket, *, stream: bool) -> None:
        """Take a connected socket; the oldest stranger goes when there are too many."""
        while len(self._strangers) >= self._config.max_strangers:
            # the oldest goes: a handshake takes a millisecond, so who still waits is not shaking
            self._dismiss(next(iter(self._strangers.values())), "too many wait")
        sock.setblocking(False)
        roles: tuple[Role, ...] = ("router", "group") if stream and self._bulk else ("router",)
        responder = self._responder(roles, self._terms)
        greeting = Greeting(sock, responder, stream=stream, now=time.monotonic())
        self._strangers[sock.fileno()] = greeting
        self._epoll.register(sock, select.EPOLLIN)

    def _terms(self, peer: Peer) -> dict[str, int]:
        if peer.role != "router":
            return {}
        if self._links_open() >= self._config.max_links:
            raise HandshakeRefused(f"{self._config.max_links} links are open, which is the limit")
        terms = granted(dict(peer.offer), self._config.terms)
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
        except Exception:  # a mistake of ours must not end the group: strangers can reach this
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
            fd, memory = shm.make_segment(f"raymoe-{self._label}", segment_bytes(terms))
            try:
                socket.send_fds(sock, [welcome], [fd])
            finally:
                os.close(fd)
            link = MappedServerLink(sock, peer, self._wire, memory, terms)
        del self._strangers[sock.fileno()]
        self._admit_link(link)

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
