"""Framed TCP between nodes: a 64-byte header, then the payload, into memory that is there already.

Each end has its own slots; a payload is read straight into its slot, and never before the header
has been checked. Liveness is TCP's: keepalive when idle, TCP_USER_TIMEOUT for unacknowledged data.
"""

from __future__ import annotations

import select
import socket
import threading
import time

import numpy as np

from raymoe.errors import FrameError, PeerLost
from raymoe.links.framing import Inbox, Outbox
from raymoe.links.handshake import Initiator, Peer
from raymoe.links.link import Completion, Endpoint, Slot, SlotTerms
from raymoe.links.protocol import Call, Header, Wire, unpack_header
from raymoe.links.serverlink import ServerLink, Waiting
from raymoe.links.slots import SlotBook, cut_regions, segment_bytes, terms_of
from raymoe.links.streams import shake_socket

USER_TIMEOUT_MS = 5000
BUFFER_BYTES = 4 << 20  # the kernel's limit may be lower
READ_AT_ONCE_BYTES = 1 << 20  # of one link, before the others get a turn
MAX_UNSENT = 64  # messages: pongs of a peer that asks and does not read


def tune(sock: socket.socket) -> None:
    """What every data connection gets: no delay, and a death that is noticed within seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # a whole message fits, so that one system call sends it: 10 of them for 512 x 2048 there and
    # back, where small buffers took a wake-up of the peer for every part
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose."""
    sock = socket.create_server((host, port), backlog=64)
    sock.setblocking(False)
    return sock


def open_stream(
    endpoint: Endpoint, side: Initiator, timeout_s: float = 5.0
) -> tuple[socket.socket, Peer]:
    """A blocking, authenticated TCP connection. HandshakeRefused, or OSError when nobody listens.

    With role "group" the server hands its end to its bulk callback.
    """
    host, _, port = endpoint.address.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
    try:
        tune(sock)
        peer = shake_socket(sock, side, timeout_s)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock, peer


class TcpLink(SlotBook):
    """The client's end (a Link). `fileno()` is an epoll of its own, so that a half-sent request
    makes the link ready for poll() too."""

    def __init__(self, sock: socket.socket, peer: Peer, wire: Wire, terms: SlotTerms) -> None:
        memory = np.empty(segment_bytes(terms), dtype=np.uint8)  # pages come when touched
        super().__init__(peer, wire, cut_regions(memory, terms))
        sock.setblocking(False)
        self._sock = sock
        self._outbox = Outbox(sock)
        self._inbox = Inbox(sock)
        self._sending = threading.Lock()  # submit() and poll() against ping()
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)
        self._requests = [slot.request_memory.data for slot in self.slots]
        self._replies = [slot.reply_memory.data for slot in self.slots]
        self._arriving: tuple[Header, Slot] | None = None

    def fileno(self) -> int:
        """The epoll of this link; -1 when closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def submit(self, slot: Slot, call: Call) -> int:
        """Send header and payload; what does not fit now goes out in poll()."""
        size = self._begin(slot, call)
        try:
            with self._sending:
                self._send(self._out, self._requests[slot.index][:size])
        except OSError as error:
            raise self._end(f"cannot send: {error}") from error
        return slot.seq

    def _send(self, header: bytearray, payload: memoryview | None) -> None:
        waiting = len(self._outbox) > 0
        if not self._outbox.send(header, payload) and not waiting:
            self._epoll.modify(self._sock, select.EPOLLIN | select.EPOLLOUT)

    def poll(self) -> list[Completion]:
        """Send on, read on; the completion of at most one request a call."""
        if self._lost is not None:
            raise self._lost
        try:
            if len(self._outbox):
                with self._sending:
                    self._outbox.flush()
                    if not len(self._outbox):
                        self._epoll.modify(self._sock, select.EPOLLIN)
            return self._receive()
        except FrameError as error:
            raise self._end(f"bad frame: {error}") from error
        except OSError as error:
            raise self._end(str(error)) from error

    def _receive(self) -> list[Completion]:
        inbox = self._inbox
        if not inbox.in_payload:
            if not inbox.read_header():
                return []
            header, slot, size = self._expect(inbox.raw)
            if slot is None:
                inbox.reset()
                self._ponged(header)
                return []
            self._arriving = header, slot
            inbox.expect(self._replies[slot.index][:size])
        if not inbox.read_payload(1 << 62):
            self.last_heard_s = time.monotonic()
            return []
        assert self._arriving is not None
        return [self._complete(*self._arriving)]

    def ping(self) -> None:
        """From any thread."""
        raw = self._ping_header()
        if raw is not None:
            try:
                with self._sending:
                    self._send(raw, None)
            except (OSError, ValueError):
                return  # closed meanwhile; poll() tells

    def close(self) -> None:
        """Retire the link."""
        self._end("closed here")

    def _end(self, why: str) -> PeerLost:
        lost = self._retire(why)
        with self._sending:
            self._sock.close()
            self._epoll.close()
        return lost


class TcpServerLink(ServerLink):
    """The group's end."""

    def __init__(self, sock: socket.socket, peer: Peer, wire: Wire, terms: SlotTerms) -> None:
        memory = np.empty(segment_bytes(terms), dtype=np.uint8)
        super().__init__(sock, peer, wire, cut_regions(memory, terms))
        self._outbox = Outbox(sock)
        self._inbox = Inbox(sock)
        self._arriving: tuple[Header, Call] | None = None

    def on_ready(self, events: int) -> Waiting | None:
        """Send on, read on."""
        if self.wants_write:
            for slot in self._outbox.flush():
                self.busy[slot] = False
            self.wants_write = len(self._outbox) > 0
        if not events & ~select.EPOLLOUT:
            return None
        self.heard_s = time.monotonic()
        inbox = self._inbox
        if not inbox.in_payload:
            if not inbox.read_header():
                return None
            header = unpack_header(inbox.raw)
            call = self.begin(header)
            if call is None:
                inbox.reset()
                return None
            self._arriving = header, call
            inbox.expect(self.regions[header.slot].request.data[: header.payload_bytes])
        if not inbox.read_payload(READ_AT_ONCE_BYTES):
            return None
        assert self._arriving is not None
        return Waiting(self, *self._arriving, self.heard_s)

    def send(self, header: bytearray, slot: int, payload_bytes: int) -> None:
        """The slot is busy until its reply is out."""
        payload = self.regions[slot].reply.data[:payload_bytes]
        if self._outbox.send(header, payload, slot):
            self.busy[slot] = False
        else:
            self.wants_write = True

    def send_pong(self, header: bytearray) -> None:
        """FrameError for a peer that asks and does not read."""
        if len(self._outbox) > MAX_UNSENT:
            raise FrameError(f"{MAX_UNSENT} messages unread")
        if not self._outbox.send(header, None):
            self.wants_write = True


def connect_tcp(endpoint: Endpoint, side: Initiator, wire: Wire, timeout_s: float = 5.0) -> TcpLink:
    """Connect to a group anywhere. HandshakeRefused, or OSError when nobody listens there."""
    sock, peer = open_stream(endpoint, side, timeout_s)
    try:
        return TcpLink(sock, peer, wire, terms_of(peer))
    except BaseException:
        sock.close()
        raise
