"""Tables down, counts up: one connection from each dispatching process to the controller.

Free of Ray, because a dispatching process need not be a Ray actor (a vLLM rank is not), and on a
thread of its own, because the engine's thread may be waiting for experts whose new home only the
next table tells.

Frames are a u32 length and msgpack: `{"table": ...}` and `{"ping": 1}` down, `{"report": ...}` up.
A report is also the acknowledgement of the epoch it names. Counts not delivered are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import numpy as np
import numpy.typing as npt

from raymoe.errors import FrameError, LinkError
from raymoe.links.handshake import Identity, Initiator, Peer, Responder
from raymoe.links.streams import LENGTH, shake_asyncio, shake_socket
from raymoe.table import RoutingTable

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20
_MAX_CLIENTS = 1024
_PING_S = 1.0
Timings = dict[str, list[tuple[int, int, float]]]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientReport:
    """What one client said: pairs it dispatched (int64 [L, E], None when nothing), timings of
    each group's messages (pairs, active experts, busy seconds), the epoch it uses."""

    name: str
    order: tuple[int, int] | None
    counts: Counts | None
    timings: Timings


class TableUser(Protocol):
    """The part of `ExpertClient` that the control connection needs."""

    def set_table(self, routing: RoutingTable) -> bool: ...
    def take_counts(self) -> Counts: ...
    def take_timings(self) -> Timings: ...
    @property
    def epoch(self) -> tuple[int, int] | None: ...


@dataclass(eq=False)
class _Connected:
    writer: asyncio.StreamWriter
    name: str
    order: tuple[int, int] | None = None
    heard_s: float = field(default_factory=time.monotonic)


class ControlServer:
    """The controller's end: its own thread and event loop. `publish` may come from any thread."""

    def __init__(self, *, identity: Identity, secret: bytes, host: str = "127.0.0.1") -> None:
        self._identity = identity
        self._secret = secret
        self._loop = asyncio.new_event_loop()
        self._clients: set[_Connected] = set()
        self._lock = threading.Lock()
        self._reports: list[ClientReport] = []
        self._table: bytes | None = None
        self._order: tuple[int, int] | None = None
        self._thread = threading.Thread(target=self._run, name="raymoe-control", daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._listen(host), self._loop)
        try:
            self.address: tuple[str, int] = started.result(10)
        except BaseException:
            self.close()
            raise

    def publish(self, routing: RoutingTable) -> None:
        """Sends the table to every client, now and to those that connect later.

        A table older than the last one published is ignored.
        """
        data = _frame({"table": routing.to_dict()})
        self._loop.call_soon_threadsafe(self._push, routing.order, data)

    def take_reports(self) -> list[ClientReport]:
        """What clients have reported since the last call."""
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def clients(self) -> dict[str, tuple[int, int] | None]:
        """Connected clients and the (term, epoch) each has acknowledged."""
        return {client.name: client.order for client in tuple(self._clients)}

    def close(self) -> None:
        """Ends every connection and the thread. Repeatable."""
        if not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    # ---- the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _listen(self, host: str) -> tuple[str, int]:
        self._server = await asyncio.start_server(self._serve, host, 0)
        self._pings = asyncio.get_running_loop().create_task(self._ping())
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    def _push(self, order: tuple[int, int], data: bytes) -> None:
        if self._order is not None and order <= self._order:
            return
        self._order, self._table = order, data
        for client in tuple(self._clients):
            self._send(client, data)

    async def _ping(self) -> None:
        data = _frame({"ping": 1})
        while True:
            await asyncio.sleep(_PING_S)
            for client in tuple(self._clients):
                self._send(client, data)

    def _send(self, client: _Connected, data: bytes) -> None:
        transport = client.writer.transport
        if transport.get_write_buffer_size() > MAX_FRAME_BYTES:
            log.warning("client %s does not read its tables: dropped", client.name)
            transport.abort()
            return
        client.writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client: _Connected | None = None
        try:
            if len(self._clients) >= _MAX_CLIENTS:
                return
            responder = Responder(self._identity, ("router",), self._secret, role="controller")
            peer: Peer = await shake_asyncio(reader, writer, responder)
            client = _Connected(writer, peer.name)
            self._clients.add(client)
            if self._table is not None:
                self._send(client, self._table)
            while True:
                self._take(client, await _read_frame(reader))
        except LinkError as e:
            log.warning("a control connection ends: %s", e)
        except (asyncio.IncompleteReadError, OSError):
            pass  # it closed; it comes back when it lives
        finally:
            if client is not None:
                self._clients.discard(client)
            writer.close()

    def _take(self, client: _Connected, message: Any) -> None:
        report = _report_of(client.name, message)
        client.order = report.order
        client.heard_s = time.monotonic()
        with self._lock:
            self._reports.append(report)


class ControlClient:
    """The dispatching process's end: a thread that keeps one connection to the controller.

    `resolve()` says where it listens now; it may raise OSError or any `LookupError`,
    `RuntimeError` or `ValueError` while there is none, and is asked again.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        secret: bytes,
        name: str,
        resolve: Callable[[], tuple[str, int]],
        client: TableUser,
        interval_s: float = 1.0,
        silence_s: float = 5.0,
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._name = name
        self._resolve = resolve
        self._client = client
        self._interval_s = interval_s
        self._silence_s = silence_s
        self._closing = threading.Event()
        self._unsent: Counts | None = None
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="raymoe-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the connection and the thread. Repeatable."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        pause_s = 0.05
        while not self._closing.is_set():
            try:
                with socket.create_connection(self._resolve(), timeout=2) as sock:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    shake_socket(
                        sock, Initiator(self._identity, "router", self._secret, name=self._name)
                    )
                    pause_s = 0.05
                    self._talk(sock)
            except (LinkError, OSError, LookupError, RuntimeError, ValueError) as e:
                if str(e) != self.last_error:
                    log.info("no controller: %s", e)
                self.last_error = str(e)
            self._closing.wait(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def _talk(self, sock: socket.socket) -> None:
        """Until the connection ends (OSError) or is silent for too long."""
        buffer = bytearray()
        heard_s = time.monotonic()
        due_s = heard_s
        reported: tuple[int, int] | None = None
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= due_s or self._client.epoch != reported:
                reported = self._client.epoch
                self._report(sock, reported)
                due_s = now + self._interval_s
            sock.settimeout(max(min(due_s - time.monotonic(), 0.2), 0.01))
            try:
                data = sock.recv(1 << 20)
            except TimeoutError:
                if time.monotonic() - heard_s > self._silence_s:
                    raise OSError(f"silent for {self._silence_s:g} s") from None
                continue
            if not data:
                raise OSError("the controller closed it")
            heard_s = time.monotonic()
            buffer += data
            while (message := _cut(buffer)) is not None:
                if "table" in message:
                    self._client.set_table(RoutingTable.from_dict(message["table"]))

    def _report(self, sock: socket.socket, order: tuple[int, int] | None) -> None:
        counts = self._client.take_counts()
        if self._unsent is not None:
            counts = counts + self._unsent if counts.shape == self._unsent.shape else counts
        self._unsent = counts
        body: dict[str, Any] = {"order": order, "timings": self._client.take_timings()}
        if counts.any():
            body["shape"] = list(counts.shape)
            body["counts"] = counts.astype("<i8").tobytes()
        sock.settimeout(5)
        sock.sendall(_frame({"report": body}))
        self._unsent = None


def _frame(message: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a control message of {len(body)} bytes, over {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


def _checked(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a control frame of {length} bytes, over {MAX_FRAME_BYTES}")
    return length


def _unpack(body: bytes) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(body, raw=False)
    except (ValueError, msgpack.UnpackException) as e:
        raise FrameError(f"a control frame that is not msgpack: {e}") from None
    if not isinstance(message, dict):
        raise FrameError("a control frame that is no message")
    return message


def _cut(buffer: bytearray) -> dict[str, Any] | None:
    """The first whole message of `buffer`, taken out of it."""
    if len(buffer) < LENGTH.size:
        return None
    end = LENGTH.size + _checked(LENGTH.unpack_from(buffer)[0])
    if len(buffer) < end:
        return None
    body = bytes(buffer[LENGTH.size : end])
    del buffer[:end]
    return _unpack(body)


async def _read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return _unpack(await reader.readexactly(_checked(length)))


def _report_of(name: str, message: dict[str, Any]) -> ClientReport:
    """Checked: a client that reports nonsense is refused, the controller goes on."""
    try:
        body = message["report"]
        order = None if body["order"] is None else (int(body["order"][0]), int(body["order"][1]))
        counts: Counts | None = None
        if "counts" in body:
            layers, experts = (int(n) for n in body["shape"])
            counts = np.frombuffer(body["counts"], "<i8").reshape(layers, experts).astype(np.int64)
            if (counts < 0).any():
                raise ValueError("negative counts")
        timings = {
            str(group): [(int(p), int(n), float(s)) for p, n, s in samples]
            for group, samples in body["timings"].items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise FrameError(f"not a report: {e!r}") from None
    return ClientReport(name=name, order=order, counts=counts, timings=timings)
