"""Shared memory between a client and a group on one node.

The group listens on an abstract unix SEQPACKET socket, so that no file is left behind. After the
handshake it makes a memfd, seals its size (so that nobody can shrink it under the other's feet)
and passes it with the welcome. One segment a link, never used again: a frozen peer that wakes up
can only write into memory that is nobody's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymoe.errors import FrameError, HandshakeRefused, PeerLost
from raymoe.links.handshake import MAX_MESSAGE_BYTES, Initiator
from raymoe.links.link import Endpoint
from raymoe.links.mapped import MappedLink
from raymoe.links.protocol import Wire
from raymoe.links.slots import segment_bytes, terms_of

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


def listen(name: str) -> socket.socket:
    """A listening abstract SEQPACKET socket of that name (without its NUL)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind("\0" + name)
        sock.listen(64)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as our user: abstract sockets have no mode."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.getuid())


def make_segment(name: str, size: int) -> tuple[int, NDArray[np.uint8]]:
    """A sealed memfd of `size` bytes, and its memory mapped here. Pages come when touched."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, map_segment(fd, size)
    except OSError:
        os.close(fd)
        raise


def map_segment(fd: int, size: int) -> NDArray[np.uint8]:
    """Map a segment; FrameError when it is not sealed or not of that size."""
    if os.fstat(fd).st_size != size:
        raise FrameError(f"the segment has {os.fstat(fd).st_size} bytes, agreed were {size}")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise FrameError("the segment is not sealed")
    buffer: Any = mmap.mmap(fd, size)
    return np.frombuffer(buffer, dtype=np.uint8)


def connect_shm(
    endpoint: Endpoint, side: Initiator, wire: Wire, timeout_s: float = 5.0
) -> MappedLink:
    """Connect to a group on this node. HandshakeRefused, PeerLost, or ConnectionError when nobody
    listens there (also from another network namespace)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        sock.connect("\0" + endpoint.address)
        if not same_user(sock):
            raise HandshakeRefused(f"{endpoint.address} belongs to another user")
    except BaseException:
        sock.close()
        raise
    return adopt_segment(sock, side, wire, timeout_s)


def adopt_segment(sock: socket.socket, side: Initiator, wire: Wire, timeout_s: float) -> MappedLink:
    """Shake hands on a connected SEQPACKET socket and map the segment that comes with the welcome.
    Raises HandshakeRefused, PeerLost or FrameError, and closes the socket then."""
    fds: list[int] = []
    deadline = time.monotonic() + timeout_s
    try:
        sock.settimeout(timeout_s)
        sock.send(side.start())
        while not side.done:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data, passed, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES + 1, 1)
            fds += passed
            if not data:
                raise PeerLost(side.role, "it closed during the handshake")
            answer = side.feed(data)
            if answer is not None:
                sock.send(answer)
        assert side.peer is not None
        terms = terms_of(side.peer)
        if len(fds) != 1:
            raise FrameError("the welcome came without its segment")
        return MappedLink(sock, side.peer, wire, map_segment(fds[0], segment_bytes(terms)), terms)
    except TimeoutError:
        sock.close()
        raise HandshakeRefused(f"the peer did not answer within {timeout_s:g} s") from None
    except BaseException:
        sock.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)
