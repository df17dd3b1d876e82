"""Strangers, liars and babblers: a server refuses them and serves the others on."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from raymoe.errors import FrameError, HandshakeRefused
from raymoe.links import shm
from raymoe.links.connect import connect_stream
from raymoe.links.handshake import Initiator, Peer
from raymoe.links.link import Endpoint
from raymoe.links.protocol import (
    DISPATCH,
    HEADER_BYTES,
    PARTIAL,
    PING,
    REPLY,
    ROWS,
    Header,
    make_header,
    unpack_header,
)
from raymoe.links.streams import frame, shake_socket
from tests.links import rig
from tests.links.rig import HIDDEN, SECRET, Group, link_to, message, round_trip

KINDS = ("shm", "tcp")


@pytest.fixture
def group() -> Iterator[Group]:
    with rig.group() as running:
        yield running


def dial(endpoint: Endpoint) -> socket.socket:
    """A bare connection, nothing said."""
    if endpoint.kind == "tcp":
        host, _, port = endpoint.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect("\0" + endpoint.address)
    return sock


def insider(endpoint: Endpoint) -> socket.socket:
    """A connection that has proved itself and now speaks as it likes."""
    sock = dial(endpoint)
    side = rig.initiator()
    if endpoint.kind == "tcp":
        shake_socket(sock, side)
        return sock
    sock.send(side.start())
    while not side.done:
        answer = side.feed(sock.recv(8192))
        if answer is not None:
            sock.send(answer)
    return sock


def closed(sock: socket.socket, timeout_s: float = 5.0) -> bool:
    """Whether the other end closes within that time."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def header(**changes: int) -> bytes:
    """A request for one token and one pair, changed."""
    fields = {
        "mode": PARTIAL, "layer": 1, "tokens": 1, "experts": 1, "pairs": 1,
        "payload_bytes": 64 + 4 * HIDDEN, "incarnation": 7,
    } | changes  # fmt: skip
    raw = bytearray(HEADER_BYTES)
    make_header(fields.pop("kind", DISPATCH), **fields).pack_into(raw)
    return bytes(raw)


def wrong_magic() -> bytes:
    return b"HTTP" + header()[4:]


BAD_HEADERS: dict[str, Callable[[], bytes]] = {
    "magic": wrong_magic,
    "zeros": lambda: bytes(64),
    "ones": lambda: b"\xff" * 64,
    "a reply": lambda: header(kind=REPLY),
    "unknown kind": lambda: header(kind=200),
    "unknown mode": lambda: header(mode=9),
    "layer": lambda: header(layer=rig.LAYERS),
    "slot": lambda: header(slot=64),
    "incarnation": lambda: header(incarnation=6),
    "no tokens": lambda: header(tokens=0),
    "fewer pairs than tokens": lambda: header(tokens=2),
    "fewer pairs than experts": lambda: header(experts=2),
    "payload too long": lambda: header(payload_bytes=1 << 60),
    "payload too short": lambda: header(payload_bytes=16),
    "more than a slot": lambda: header(
        tokens=1 << 20, pairs=1 << 20, payload_bytes=(8 << 20) + 64 + (64 << 20)
    ),
    "a reply over the slot": lambda: header(
        mode=ROWS, pairs=15000, payload_bytes=4 * 15002 + 56 + 4 * HIDDEN
    ),
    "all counts at their largest": lambda: header(
        tokens=0xFFFFFFFF, pairs=0xFFFFFFFF, experts=0xFFFFFFFF, payload_bytes=(1 << 64) - 1
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_headers_end_that_link_only(kind: str, group: Group) -> None:
    other = link_to(group, kind)
    for name, make in BAD_HEADERS.items():
        sock = insider(group.endpoint(kind))
        sock.send(make())
        assert closed(sock), name
        sock.close()
    round_trip(other)
    rig.eventually(lambda: len(group.answered) == 1)
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_packets_of_any_other_length_end_that_link_only(kind: str, group: Group) -> None:
    other = link_to(group, kind)
    for size in (1, 63, 65, 4000):
        sock = insider(group.endpoint(kind))
        sock.send(b"\xa5" * size)
        with contextlib.suppress(OSError):  # closed already
            sock.shutdown(socket.SHUT_WR)
        assert closed(sock)
        sock.close()
    round_trip(other)
    other.close()


@pytest.mark.parametrize("kind", rig.KINDS)
@pytest.mark.parametrize(
    ("array", "value"),
    [
        ("expert_ids", rig.EXPERTS),
        ("expert_ids", -1),
        ("token_of_pair", 200),
        ("token_of_pair", -1),
        ("counts", 1000),
        ("counts", -1),
    ],
)
@pytest.mark.parametrize("tokens", [5, 200])  # few words are checked by Python, many by numpy
def test_impossible_payloads_end_that_link_only(
    kind: str, array: str, value: int, tokens: int, group: Group
) -> None:
    other, liar = link_to(group, kind), link_to(group, kind)
    sent = message(tokens)
    slot = liar.acquire()
    assert slot is not None
    arrays = slot.arrays(sent.call)
    arrays.expert_ids[:], arrays.counts[:] = sent.expert_ids, sent.counts
    arrays.token_of_pair[:] = sent.token_of_pair
    getattr(arrays, array)[0] = value
    liar.submit(slot, sent.call)
    rig.lost(liar)
    round_trip(other)
    rig.eventually(lambda: len(group.answered) == 1)
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_in_flight_cannot_be_taken_again(kind: str, group: Group) -> None:
    group.gate.clear()
    link = link_to(group, kind)
    message(2).write(link)
    assert group.holding.wait(5)
    link._sock.send(bytes(link._out))  # type: ignore[attr-defined]
    rig.lost(link)
    group.gate.set()


def test_a_half_sent_frame_holds_nobody_up(group: Group) -> None:
    sock = insider(group.endpoint("tcp"))
    sock.send(header()[:40])
    other = link_to(group, "tcp")
    round_trip(other)
    sock.send(header()[40:] + bytes(10))
    round_trip(other)
    sock.close()
    rig.eventually(lambda: len(group.server.peers()) == 1)
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_are_few_and_do_not_stay(kind: str) -> None:
    with rig.group(handshake_s=0.4) as group:
        strangers = [dial(group.endpoint(kind)) for _ in range(40)]
        rig.eventually(lambda: group.server.strangers() == 16)
        link = link_to(group, kind)  # ours gets in among them
        round_trip(link)
        assert group.server.strangers() <= 16
        assert all(closed(sock) for sock in strangers)
        rig.eventually(lambda: not group.server.strangers())
        round_trip(link)
        for sock in strangers:
            sock.close()
        link.close()


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_that_babble_are_refused(kind: str, group: Group) -> None:
    for babble in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4, b"\xff" * 5000, frame(b"[" * 4096)):
        sock = dial(group.endpoint(kind))
        sock.send(babble)
        assert closed(sock)
        sock.close()
    link = link_to(group, kind)
    round_trip(link)
    link.close()


def test_a_recorded_handshake_is_refused(group: Group) -> None:
    endpoint = group.endpoint("shm")
    side = rig.initiator()
    with dial(endpoint) as sock:
        hello = side.start()
        sock.send(hello)
        proof = side.feed(sock.recv(8192))
        assert proof is not None
        sock.send(proof)
        assert b"welcome" in sock.recv(8192)
    with dial(endpoint) as sock:
        sock.send(hello)
        assert b"challenge" in sock.recv(8192)
        sock.send(proof)
        assert b"wrong secret" in sock.recv(8192)
        assert closed(sock)


@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_refused_by_name(kind: str, group: Group) -> None:
    side = Initiator(rig.identity(), "gateway", SECRET)
    with dial(group.endpoint(kind)) as sock:
        message = side.start()
        sock.send(frame(message) if kind == "tcp" else message)
        assert b"role 'gateway' is not accepted here, only router" in sock.recv(8192)


def test_groups_are_handed_to_the_bulk_callback() -> None:
    taken: list[tuple[socket.socket, Peer]] = []
    with rig.group(bulk=lambda sock, peer: taken.append((sock, peer))) as group:
        sock, peer = connect_stream(
            group.server.endpoints(), rig.identity(), SECRET, name="group-1"
        )
        rig.eventually(lambda: taken)
        theirs, them = taken[0]
        assert (peer.name, them.role, them.name) == ("group-0", "group", "group-1")
        sock.sendall(b"bytes of an expert")
        assert theirs.recv(100) == b"bytes of an expert"  # blocking, and nobody else reads it
        assert group.server.peers() == []
        sock.close()
        theirs.close()
    with rig.group() as group, pytest.raises(HandshakeRefused, match="role 'group'"):
        connect_stream(group.server.endpoints(), rig.identity(), SECRET)


def test_a_bulk_callback_that_fails_ends_its_connection_only() -> None:
    def fail(sock: socket.socket, peer: Peer) -> None:
        raise RuntimeError("no room")

    with rig.group(bulk=fail) as group:
        sock, _ = connect_stream(group.server.endpoints(), rig.identity(), SECRET)
        assert closed(sock)
        sock.close()
        link = link_to(group, "tcp")
        round_trip(link)
        link.close()


def test_a_flood_of_pings_that_nobody_reads_ends_that_link_at_most(group: Group) -> None:
    other = link_to(group, "tcp")
    for kind in KINDS:
        sock = insider(group.endpoint(kind))
        sock.setblocking(False)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            try:
                sock.send(header(kind=PING))
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:
                break
        round_trip(other)
        sock.close()
    other.close()


def test_a_segment_must_be_sealed_and_of_the_size_agreed() -> None:
    fd, memory = shm.make_segment("raymoe-test", 8192)
    assert memory.nbytes == 8192
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)  # would be SIGBUS for the other
    with pytest.raises(FrameError, match="8192 bytes, agreed were 4096"):
        shm.map_segment(fd, 4096)
    os.close(fd)
    fd = os.memfd_create("raymoe-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(FrameError, match="not sealed"):
        shm.map_segment(fd, 4096)
    os.close(fd)


def test_headers_round_trip() -> None:
    raw = bytearray(HEADER_BYTES)
    sent = Header(b"RMOE", 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    sent.pack_into(raw)
    assert unpack_header(raw) == sent


def test_a_taken_port_is_an_error_that_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="in use"), rig.group(tcp_port=port):
            pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_out_of_descriptors_is_a_pause_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket) -> tuple[socket.socket, object]:
        raise OSError(24, "Too many open files")

    with rig.group() as group:
        link = link_to(group, "tcp")
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", refuse)
            waiting = dial(group.endpoint("tcp"))
            rig.eventually(lambda: group.server._entrance._deaf_until_s > 0)
        round_trip(link)  # meanwhile the others are served
        shake_socket(waiting, rig.initiator())  # and in the end this one too
        waiting.close()
        link.close()
