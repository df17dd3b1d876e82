"""One gateway's connection, as the router sees it: a socket, a state, a bounded way out."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque

from raymoe.links.handshake import MAX_MESSAGE_BYTES, Responder
from raymoe.stream.frames import FrameReader


class GatewayPeer:
    """Reads belong to the server's thread; `send` may be called from any.

    `send` tries the socket at once, so that a token leaves from the engine's own thread without a
    switch; what the kernel does not take waits in `outgoing`. A frame that finds more than
    `max_pending_bytes` waiting breaks the connection, so that one large frame always passes.
    """

    def __init__(
        self, sock: socket.socket, responder: Responder, deadline: float, max_pending_bytes: int
    ) -> None:
        self.sock = sock
        self.responder = responder
        self.deadline = deadline  # of the handshake, monotonic seconds
        self.reader = FrameReader(MAX_MESSAGE_BYTES)  # until the handshake is done
        self.ready = False  # handshake done, hello sent
        self.last_sent = 0.0
        self._max_pending_bytes = max_pending_bytes
        self._lock = threading.Lock()
        self._outgoing: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._last_progress = 0.0
        self._broken: str | None = None

    @property
    def broken(self) -> str | None:
        """Why nothing more can be sent; None while all is well."""
        return self._broken

    @property
    def wants_write(self) -> bool:
        return self._pending_bytes > 0

    def stalled_s(self, now: float) -> float:
        """For how long nothing of what waits could be written."""
        return now - self._last_progress if self._pending_bytes else 0.0

    def send(self, frame: bytes) -> bool:
        """Sends or queues one frame. False: the server's thread must see to this peer."""
        with self._lock:
            if self._broken is not None:
                return False
            if self._pending_bytes > self._max_pending_bytes:
                self._broken = f"{self._pending_bytes} bytes unread: too slow"
                return False
            self._outgoing.append(memoryview(frame))
            self._pending_bytes += len(frame)
            if len(self._outgoing) == 1:
                self._last_progress = time.monotonic()
                self._flush()
            return self._pending_bytes == 0 and self._broken is None

    def flush(self) -> None:
        """Writes what the socket takes now. Called by the server's thread."""
        with self._lock:
            if self._broken is None:
                self._flush()

    def close(self) -> None:
        with self._lock:
            self._broken = self._broken or "closed"
            self._outgoing.clear()
            self._pending_bytes = 0
            self.sock.close()

    def _flush(self) -> None:
        while self._outgoing:
            first = self._outgoing[0]
            try:
                sent = self.sock.send(first)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._broken = str(error)
                return
            self._pending_bytes -= sent
            self._last_progress = time.monotonic()
            if sent < len(first):
                self._outgoing[0] = first[sent:]
                return
            self._outgoing.popleft()
