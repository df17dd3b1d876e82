"""Half-sent and half-read messages on a non-blocking stream socket."""

from __future__ import annotations

import socket

from raymoe.links.protocol import HEADER_BYTES


class Outbox:
    """What could not be sent yet. Nothing blocks, nothing is copied but single headers."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unsent: list[tuple[memoryview, int]] = []  # bytes, slot they free (-1: none)

    def __len__(self) -> int:
        return len(self._unsent)

    def send(self, header: bytearray, payload: memoryview | None, slot: int = -1) -> bool:
        """Send a message, or as much as fits; whether all of it went out."""
        if self._unsent:
            sent = 0
        else:
            try:
                sent = (
                    self._sock.send(header)
                    if payload is None
                    else self._sock.sendmsg((header, payload))
                )
            except BlockingIOError:
                sent = 0
        size = len(payload) if payload is not None else 0
        if sent == HEADER_BYTES + size:
            return True
        if sent < HEADER_BYTES:
            # a copy of the rest: the caller's header buffer is used again
            self._unsent.append((memoryview(bytes(header[sent:])), -1 if size else slot))
        if payload is not None:
            self._unsent.append((payload[max(0, sent - HEADER_BYTES) :], slot))
        return False

    def flush(self) -> list[int]:
        """Send what fits now; the slots whose messages are out."""
        freed: list[int] = []
        while self._unsent:
            data, slot = self._unsent[0]
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                break
            if sent < len(data):
                self._unsent[0] = (data[sent:], slot)
                continue
            self._unsent.pop(0)
            if slot >= 0:
                freed.append(slot)
        return freed


class Inbox:
    """One message being read: its header, then its payload, into memory chosen in between."""

    def __init__(self, sock: socket.socket) -> None:
        self._recv_into = sock.recv_into
        self.raw = bytearray(HEADER_BYTES)
        self._header = memoryview(self.raw)
        self._payload: memoryview | None = None
        self._got = 0

    def read_header(self) -> bool:
        """Read on; whether a header is complete that has not been told of a payload yet."""
        self._got += self._read(self._header[self._got :])
        return self._got == HEADER_BYTES

    @property
    def in_payload(self) -> bool:
        """Whether a payload is expected."""
        return self._payload is not None

    def expect(self, payload: memoryview) -> None:
        """Where the payload goes; it may be empty."""
        self._payload = payload
        self._got = 0

    def reset(self) -> None:
        """The message had no payload."""
        self._payload = None
        self._got = 0

    def read_payload(self, limit: int) -> bool:
        """Read on, at most about `limit` bytes; whether the payload is complete."""
        payload = self._payload
        assert payload is not None
        size = len(payload)
        stop = min(size, self._got + limit)
        while self._got < stop:
            got = self._read(payload[self._got : stop])
            if not got:
                return False
            self._got += got
        if self._got < size:
            return False
        self.reset()
        return True

    def _read(self, into: memoryview) -> int:
        """Bytes read, 0 when there are none now; ConnectionResetError at the end of the stream."""
        try:
            got = self._recv_into(into)
        except BlockingIOError:
            return 0
        if got == 0:
            raise ConnectionResetError("it closed the connection")
        return got
