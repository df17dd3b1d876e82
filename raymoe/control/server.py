"""The controller's end: pushes the routing table to every client, collects their reports."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from raymoe.control.messages import ClientReport, FrameReader, pack
from raymoe.errors import ConfigError, FrameError, HandshakeRefused
from raymoe.links.handshake import Identity, Responder, Role
from raymoe.links.streams import shake_asyncio
from raymoe.table import RoutingTable

log = logging.getLogger(__name__)

_ROLES: tuple[Role, ...] = ("router",)
READ_BYTES = 1 << 16
MAX_STRANGERS = 16
MAX_CLIENTS = 1024
MAX_TIMINGS = 2048  # kept of a group and client until they are taken
MAX_UNSENT_BYTES = 64 << 20  # a client that reads nothing is cut off


class _Connection:
    def __init__(self, name: str, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.writer = writer
        self.order: tuple[int, int] | None = None  # acknowledged
        self.heard_s = time.monotonic()

    def send(self, frame: bytes) -> None:
        """Never waits; a client too slow to read is dropped, and will connect again."""
        if self.writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.warning("control: %s does not read, dropped", self.name)
            self.writer.transport.abort()
            return
        self.writer.write(frame)


class ControlServer:
    """One event loop in a thread of its own; every method may be called from any thread."""

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "controller",
        incarnation: int = 0,
        lease_s: float = 10.0,
    ) -> None:
        """Listens on return; `port` 0: the system chooses. A client silent for `lease_s` is taken
        for gone: that counts as its acknowledgement. Raises ConfigError when it cannot listen."""
        self._identity, self._secret = identity, secret
        self._name, self._incarnation = name, incarnation
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._reports: dict[str, ClientReport] = {}
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._latest: RoutingTable | None = None
        self._frame: bytes | None = None
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="raymoe-control-server", daemon=True
        )
        self._thread.start()
        try:
            self._server = asyncio.run_coroutine_threadsafe(
                asyncio.start_server(self._accepted, host, port), self._loop
            ).result(10)
        except OSError as error:
            self._end_loop()
            raise ConfigError(f"cannot listen on {host}:{port} for control: {error}") from error
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        self.address: tuple[str, int] = (str(bound_host), int(bound_port))
        self._watch = asyncio.run_coroutine_threadsafe(self._drop_silent(), self._loop)

    def publish(self, routing: RoutingTable) -> bool:
        """Push this table to every client, now and when one connects. Never waits.

        False, and nothing is sent, when one as new or newer has been published.
        """
        with self._lock:
            if self._latest is not None and routing.order <= self._latest.order:
                return False
            self._latest = routing
            self._frame = frame = pack({"table": routing.to_dict()})
            if not self._closed:
                self._loop.call_soon_threadsafe(self._push, frame)
        return True

    def take_reports(self) -> list[ClientReport]:
        """One report a client heard of since the last call, by name: its counts and timings of all
        that time."""
        with self._lock:
            reports, self._reports = self._reports, {}
        return [reports[name] for name in sorted(reports)]

    def acknowledged(self) -> dict[str, tuple[int, int] | None]:
        """(term, epoch) in use at every connected client, by name."""
        with self._lock:
            return {c.name: c.order for c in sorted(self._connections, key=lambda c: c.name)}

    def behind(self, order: tuple[int, int]) -> tuple[str, ...]:
        """Connected clients that do not use a table at least as new as `order` yet."""
        acknowledged = self.acknowledged()
        return tuple(name for name, used in acknowledged.items() if used is None or used < order)

    def close(self) -> None:
        """End every connection and the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(5)
        self._end_loop()

    # --- in the loop -----------------------------------------------------------------------

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (HandshakeRefused, FrameError, OSError, asyncio.IncompleteReadError) as error:
            log.info("control: a connection ended: %s", error)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MAX_STRANGERS or len(self._connections) >= MAX_CLIENTS:
            raise HandshakeRefused("too many connections")
        side = Responder(
            self._identity,
            _ROLES,
            self._secret,
            role="controller",
            name=self._name,
            incarnation=self._incarnation,
        )
        self._strangers += 1
        try:
            peer = await shake_asyncio(reader, writer, side)
        finally:
            self._strangers -= 1
        connection = _Connection(peer.name, writer)
        with self._lock:
            self._connections.add(connection)
            frame = self._frame
        try:
            if frame is not None:
                connection.send(frame)
            frames = FrameReader()
            while data := await reader.read(READ_BYTES):
                for message in frames.feed(data):
                    self._heard(connection, message)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _heard(self, connection: _Connection, message: dict[str, object]) -> None:
        raw = message.get("report")
        if not isinstance(raw, dict):
            raise FrameError(f"{connection.name} sent something that is no report")
        report = ClientReport.from_dict(raw)
        with self._lock:
            connection.order = report.order
            connection.heard_s = time.monotonic()
            before = self._reports.get(connection.name)
            self._reports[connection.name] = (
                report if before is None else before.followed_by(report, MAX_TIMINGS)
            )
        connection.send(pack({"heard": True}))

    def _push(self, frame: bytes) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.send(frame)

    async def _drop_silent(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            limit = time.monotonic() - self._lease_s
            with self._lock:
                silent = [c for c in self._connections if c.heard_s < limit]
            for connection in silent:
                log.warning("control: %s is silent, dropped", connection.name)
                connection.writer.transport.abort()

    async def _shut(self) -> None:
        self._watch.cancel()
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close in the next turn

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
