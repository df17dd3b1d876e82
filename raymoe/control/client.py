"""A client process's end: takes tables, gives counts, timings and acknowledgements."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from raymoe.client.stats import ClientStats
from raymoe.control.messages import ClientReport, FrameReader, pack
from raymoe.dispatch import Ints
from raymoe.errors import ConfigError, FrameError, LinkError
from raymoe.links.handshake import Identity, Initiator
from raymoe.links.streams import shake_socket
from raymoe.table import RoutingTable

log = logging.getLogger(__name__)

Resolve = Callable[[], tuple[str, int]]

CONNECT_TIMEOUT_S = 5.0
LONGEST_PAUSE_S = 2.0
SILENT_INTERVALS = 5  # a controller that answers no report for so long is looked up anew
MAX_TIMINGS = 2048


class Controlled(Protocol):
    """What is controlled: an ExpertClient."""

    stats: ClientStats

    @property
    def epoch(self) -> tuple[int, int] | None: ...
    def set_table(self, routing: RoutingTable) -> bool: ...
    def connected(self) -> tuple[str, ...]: ...
    def take_counts(self) -> Ints: ...
    def take_timings(self) -> Mapping[str, list[tuple[int, int, float]]]: ...


class ControlClient:
    """Its own thread from start() to close(); serving goes on whatever becomes of the controller.

    `resolve()` says where the controller listens now; it may raise anything while there is none.
    What could not be reported is kept and reported to the next controller.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        name: str,
        resolve: Resolve,
        client: Controlled,
        interval_s: float = 0.5,
    ) -> None:
        self._identity, self._secret, self._name = identity, secret, name
        self._resolve = resolve
        self._client = client
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._near, self._far = socket.socketpair()  # close() wakes the thread
        self._unsent = ClientReport(name=name)
        self.last_error: str | None = None
        self.connected = False
        self._thread = threading.Thread(target=self._run, name="raymoe-control", daemon=True)

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and the connection. Idempotent."""
        self._closed.set()
        self._far.close()
        if self._thread.is_alive():
            self._thread.join(CONNECT_TIMEOUT_S + 1)
        self._near.close()

    def _run(self) -> None:
        pause_s = 0.05
        while not self._closed.is_set():
            try:
                with self._connect() as sock:
                    self.connected, self.last_error, pause_s = True, None, 0.05
                    self._talk(sock)
            except Exception as error:  # resolve() may raise anything
                self.last_error = f"{type(error).__name__}: {error}"
                log.info("control: %s", self.last_error)
            self.connected = False
            self._closed.wait(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._resolve(), timeout=CONNECT_TIMEOUT_S)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            side = Initiator(self._identity, "router", self._secret, name=self._name)
            peer = shake_socket(sock, side)
            if peer.role != "controller":
                raise LinkError(f"{peer.name} is a {peer.role}, not a controller")
        except BaseException:
            sock.close()
            raise
        return sock

    def _talk(self, sock: socket.socket) -> None:
        """Until the connection ends, the controller falls silent, or close()."""
        frames = FrameReader()
        heard_s = time.monotonic()
        next_report_s = 0.0
        poll = select.poll()  # not select(): a process may have more than 1,024 descriptors
        poll.register(sock, select.POLLIN)
        poll.register(self._near, select.POLLIN)
        while not self._closed.is_set():
            now = time.monotonic()
            if now >= next_report_s:
                self._report(sock)
                next_report_s = now + self._interval_s
            if now - heard_s > max(SILENT_INTERVALS * self._interval_s, 2.0):
                raise LinkError("the controller has fallen silent")
            ready = poll.poll(1e3 * max(next_report_s - now, 0))
            if sock.fileno() not in [fd for fd, _ in ready]:
                continue
            data = sock.recv(1 << 16)
            if not data:
                raise LinkError("the controller closed the connection")
            heard_s = time.monotonic()
            for message in frames.feed(data):
                if self._take(message):
                    next_report_s = 0.0  # acknowledge at once

    def _take(self, message: dict[str, Any]) -> bool:
        """True when there is a table to acknowledge, used or refused as older."""
        if "table" not in message:
            return False
        try:
            used = self._client.set_table(RoutingTable.from_dict(message["table"]))
        except (FrameError, ConfigError) as error:
            self.last_error = f"a table was refused: {error}"
            log.error("control: %s", self.last_error)
            return True
        if not used:
            log.info("control: a table no newer than %s was refused", self._client.epoch)
        return True

    def _report(self, sock: socket.socket) -> None:
        client = self._client
        order = client.epoch
        counts = None if order is None else client.take_counts()
        latest = ClientReport(
            name=self._name,
            counts=counts if counts is not None and counts.any() else None,
            timings=client.take_timings(),
            stats=asdict(client.stats),
            order=order,
            connected=client.connected(),
        )
        self._unsent = self._unsent.followed_by(latest, MAX_TIMINGS)
        sock.sendall(pack({"report": self._unsent.to_dict()}))
        self._unsent = ClientReport(name=self._name)  # only now: a failed one is sent again
