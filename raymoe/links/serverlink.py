"""The group's end of one link: its slots, what it has sent, and what it may send."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raymoe.errors import FrameError
from raymoe.links.handshake import Peer
from raymoe.links.link import Regions, Request
from raymoe.links.protocol import (
    DISPATCH,
    PING,
    Call,
    Header,
    Wire,
    call_of,
)


class Waiting:
    """A complete request whose header has been checked and whose turn has not come."""

    __slots__ = ("arrived_s", "call", "header", "link", "link_id")

    def __init__(self, link: ServerLink, header: Header, call: Call, arrived_s: float) -> None:
        self.link = link
        self.link_id = link.id
        self.header = header
        self.call = call
        self.arrived_s = arrived_s

    def request(self, experts: int) -> Request:
        """Check the payload and make the request. FrameError when it is not well-formed."""
        link, call = self.link, self.call
        regions = link.regions[self.header.slot]
        words = regions.checked(call, experts)
        return Request(link.id, self.header, call, words, regions, link.wire, self.arrived_s)


class ServerLink:
    """Base of the transports. `on_ready`, `send` and `send_pong` may raise FrameError or OSError,
    upon which the server closes the link; none of them ever blocks."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        wire: Wire,
        regions: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    ) -> None:
        self.id = 0  # given by the server
        self.sock = sock
        self.peer = peer
        self.wire = wire
        self.regions = [Regions(request, reply) for request, reply in regions]
        self.busy = [False] * len(regions)  # received, and its reply not yet sent
        self.heard_s = time.monotonic()
        self.closed = False
        self.wants_write = False
        self.watched = False  # for writing, by the server's epoll
        self.incarnation = 0  # ours, that every header must carry
        self.layers = 0
        self.pong: Callable[[], bytearray] = bytearray
        self._request_limit = regions[0][0].nbytes
        self._reply_limit = regions[0][1].nbytes

    def begin(self, header: Header) -> Call | None:
        """Judge a header: a PING is answered (None), a DISPATCH takes its slot, anything else is
        a FrameError."""
        if header.incarnation != self.incarnation:
            raise FrameError(f"it is for incarnation {header.incarnation}, not {self.incarnation}")
        if header.kind == PING:
            self.send_pong(self.pong())
            return None
        if header.kind != DISPATCH:
            raise FrameError(f"kind {header.kind} is not for a group")
        if header.slot >= len(self.busy):
            raise FrameError(f"slot {header.slot} of {len(self.busy)}")
        if self.busy[header.slot]:
            raise FrameError(f"slot {header.slot} is in flight")
        if header.layer >= self.layers:
            raise FrameError(f"layer {header.layer} of {self.layers}")
        call = call_of(header, self.wire, self._request_limit, self._reply_limit)
        self.busy[header.slot] = True
        return call

    def on_ready(self, events: int) -> Waiting | None:
        """Read and write what can be without blocking; the request that this completed, if any."""
        raise NotImplementedError

    def send(self, header: bytearray, slot: int, payload_bytes: int) -> None:
        """Send a reply whose payload lies in the slot's reply region."""
        raise NotImplementedError

    def send_pong(self, header: bytearray) -> None:
        """Send a header that has no payload."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop the connection. The memory lives on while a request still holds views of it."""
        self.closed = True
        self.regions = []
        self.sock.close()
