"""A stranger's connection until it has proved itself: a handshake fed as its bytes arrive.

Capped in number and in time by the server; a length is checked before it is believed.
"""

from __future__ import annotations

import socket

from raymoe.errors import HandshakeRefused
from raymoe.links.handshake import MAX_MESSAGE_BYTES, Responder, refusal
from raymoe.links.streams import LENGTH, checked_length, frame


class Greeting:
    """One inbound connection. `stream` tells TCP from SEQPACKET."""

    def __init__(self, sock: socket.socket, responder: Responder, *, stream: bool, now: float):
        self.sock = sock
        self.responder = responder
        self.stream = stream
        self.since_s = now
        self._buffer = bytearray()
        self._need = LENGTH.size
        self._in_body = False

    def on_ready(self) -> bytes | None:
        """Read on. The welcome, not sent yet, once the peer has proved itself; None before.

        HandshakeRefused or OSError end the connection.
        """
        message = self._read_stream() if self.stream else self._read_packet()
        if message is None:
            return None
        try:
            answer = self.responder.feed(message)
        except HandshakeRefused as reason:
            self._tell(reason)
            raise
        if self.responder.done:
            return answer
        self.sock.send(frame(answer) if self.stream else answer)
        return None

    def _tell(self, reason: HandshakeRefused) -> None:
        message = refusal(reason)
        try:
            self.sock.send(frame(message) if self.stream else message)
        except OSError:
            return  # gone, or its buffer is full of our few bytes: it does not want to know

    def _read_packet(self) -> bytes | None:
        try:
            data = self.sock.recv(MAX_MESSAGE_BYTES + 1)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("it closed during the handshake")
        return data

    def _read_stream(self) -> bytes | None:
        """At most the rest of one message, so that nothing of what follows is swallowed."""
        try:
            data = self.sock.recv(self._need - len(self._buffer))
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("it closed during the handshake")
        self._buffer += data
        if len(self._buffer) < self._need:
            return None
        message = bytes(self._buffer)
        self._buffer.clear()
        if self._in_body:
            self._in_body, self._need = False, LENGTH.size
            return message
        self._need = checked_length(message)
        self._in_body = True
        if self._need == 0:
            raise HandshakeRefused("an empty handshake message")
        return None
