"""Links whose two ends share memory: headers travel in a SEQPACKET socket, payloads do not travel.

A header is one 64-byte packet; sending it is the wake-up, and end of file is the death of the peer.
Shared by raymoe/links/shm.py (another process) and raymoe/links/inproc.py (the same one).
"""

from __future__ import annotations

import contextlib
import socket
import time

import numpy as np
from numpy.typing import NDArray

from raymoe.errors import FrameError, PeerLost
from raymoe.links.handshake import Peer
from raymoe.links.link import Completion, Slot, SlotTerms
from raymoe.links.protocol import HEADER_BYTES, Call, Wire, unpack_header
from raymoe.links.serverlink import ServerLink, Waiting
from raymoe.links.slots import SlotBook, cut_regions


class HeaderReader:
    """One packet at a time; it must be a header exactly."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = bytearray(HEADER_BYTES + 1)  # one more, to notice a longer packet
        self._recv_into = sock.recv_into

    def read(self) -> bool:
        """Whether a header is in `raw` now; False when none has come.

        ConnectionResetError at the end of the stream, FrameError for a packet of another length.
        """
        try:
            got = self._recv_into(self.raw)
        except BlockingIOError:
            return False
        if got == HEADER_BYTES:
            return True
        if got == 0:
            raise ConnectionResetError("it closed the connection")
        raise FrameError("a packet of wrong length")


class MappedLink(SlotBook):
    """The client's end (a Link)."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        wire: Wire,
        memory: NDArray[np.uint8],
        terms: SlotTerms,
    ) -> None:
        super().__init__(peer, wire, cut_regions(memory, terms))
        sock.setblocking(False)
        self._sock = sock
        self._send = sock.send
        self._reader = HeaderReader(sock)

    def fileno(self) -> int:
        """The header socket."""
        return self._sock.fileno()

    def submit(self, slot: Slot, call: Call) -> int:
        """Send the header; the payload is where the peer reads it."""
        self._begin(slot, call)
        try:
            self._send(self._out)
        except OSError as error:  # also when full: slots and pings are few, so it does not read
            raise self._end(f"cannot send: {error}") from error
        return slot.seq

    def poll(self) -> list[Completion]:
        """At most one completion a call."""
        if self._lost is not None:
            raise self._lost
        try:
            if not self._reader.read():
                return []
            header, slot, _ = self._expect(self._reader.raw)
        except FrameError as error:
            raise self._end(f"bad frame: {error}") from error
        except OSError as error:
            raise self._end(str(error)) from error
        if slot is None:
            self._ponged(header)
            return []
        return [self._complete(header, slot)]

    def ping(self) -> None:
        """One packet, so it may come from any thread."""
        raw = self._ping_header()
        if raw is not None:
            with contextlib.suppress(OSError):  # poll() tells of the death
                self._send(raw)

    def close(self) -> None:
        """Retire the link."""
        self._end("closed here")

    def _end(self, why: str) -> PeerLost:
        lost = self._retire(why)
        self._sock.close()
        return lost


class MappedServerLink(ServerLink):
    """The group's end."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        wire: Wire,
        memory: NDArray[np.uint8],
        terms: SlotTerms,
    ) -> None:
        super().__init__(sock, peer, wire, cut_regions(memory, terms))
        self._reader = HeaderReader(sock)

    def on_ready(self, events: int) -> Waiting | None:
        """Read one header."""
        if not self._reader.read():
            return None
        self.heard_s = time.monotonic()
        header = unpack_header(self._reader.raw)
        call = self.begin(header)
        return None if call is None else Waiting(self, header, call, self.heard_s)

    def send(self, header: bytearray, slot: int, payload_bytes: int) -> None:
        """A peer with so many unread headers that this one does not fit is lost."""
        self.busy[slot] = False
        self.sock.send(header)

    def send_pong(self, header: bytearray) -> None:
        """May be left out: a peer that asks faster than it reads gets fewer answers."""
        with contextlib.suppress(BlockingIOError):
            self.sock.send(header)
