"""The handshake over a byte stream (TCP, unix stream): blocking and asyncio.

Each message travels as u32 little-endian length and bytes; a length over the limit is refused
before anything is allocated for it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Protocol

from raymoe.errors import HandshakeRefused
from raymoe.links.handshake import MAX_MESSAGE_BYTES, Initiator, Peer, Responder, refusal

LENGTH = struct.Struct("<I")
HANDSHAKE_TIMEOUT_S = 5.0


def frame(message: bytes) -> bytes:
    """A handshake message with its length before it."""
    return LENGTH.pack(len(message)) + message


def checked_length(prefix: bytes | bytearray) -> int:
    """The length announced by 4 bytes. HandshakeRefused when it is over the limit."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_MESSAGE_BYTES:
        raise HandshakeRefused(
            f"the peer does not speak the raymoe handshake (a message of {length} bytes)"
        )
    return int(length)


def shake_socket(
    sock: socket.socket, side: Initiator | Responder, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Peer:
    """Run a handshake on a connected blocking stream socket, in `timeout_s` altogether.

    Raises HandshakeRefused, also for a peer that closes or says nothing. The socket's timeout is
    put back; closing the socket is the caller's.
    """
    before = sock.gettimeout()
    deadline = time.monotonic() + timeout_s
    try:
        if isinstance(side, Initiator):
            sock.sendall(frame(side.start()))
        while not side.done:
            length = checked_length(_read(sock, LENGTH.size, deadline))
            answer = side.feed(_read(sock, length, deadline))
            if answer is not None:
                sock.sendall(frame(answer))
    except HandshakeRefused as reason:
        _tell(sock, side, reason)
        raise
    except TimeoutError:
        raise HandshakeRefused(f"the peer did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise HandshakeRefused(f"the peer closed during the handshake ({error})") from error
    finally:
        if sock.fileno() >= 0:
            sock.settimeout(before)
    assert side.peer is not None
    return side.peer


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        got = sock.recv(count - len(data))
        if not got:
            raise HandshakeRefused("the peer closed during the handshake")
        data += got
    return bytes(data)


def _tell(sock: socket.socket, side: Initiator | Responder, reason: HandshakeRefused) -> None:
    """Let an initiator know why; it may be gone already, which changes nothing."""
    if isinstance(side, Responder):
        try:
            sock.sendall(frame(refusal(reason)))
        except OSError:
            return


class _Reader(Protocol):
    async def readexactly(self, n: int) -> bytes: ...


class _Writer(Protocol):
    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...


async def shake_asyncio(
    reader: _Reader,
    writer: _Writer,
    side: Initiator | Responder,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> Peer:
    """As `shake_socket`, on asyncio streams."""
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(side, Initiator):
                writer.write(frame(side.start()))
                await writer.drain()
            while not side.done:
                length = checked_length(await reader.readexactly(LENGTH.size))
                answer = side.feed(await reader.readexactly(length))
                if answer is not None:
                    writer.write(frame(answer))
                    await writer.drain()
    except HandshakeRefused as reason:
        if isinstance(side, Responder):
            writer.write(frame(refusal(reason)))
        raise
    except TimeoutError:
        raise HandshakeRefused(f"the peer did not answer within {timeout_s:g} s") from None
    except (asyncio.IncompleteReadError, OSError) as error:
        raise HandshakeRefused(f"the peer closed during the handshake ({error})") from error
    assert side.peer is not None
    return side.peer
