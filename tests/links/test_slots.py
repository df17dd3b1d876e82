"""A reply must be the answer to what is in flight on this very link, or the link ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from raymoe.errors import PeerLost
from raymoe.links.handshake import Peer
from raymoe.links.link import SlotTerms
from raymoe.links.mapped import MappedLink
from raymoe.links.protocol import (
    DISPATCH,
    ERROR,
    HEADER_BYTES,
    NACK,
    PARTIAL,
    REPLY,
    ROWS,
    Call,
    Wire,
    make_header,
)
from raymoe.links.slots import granted, segment_bytes
from tests.links import rig

WIRE = Wire(hidden=rig.HIDDEN, dtype="float32")
TERMS = SlotTerms(slots=2, request_bytes=8192, reply_bytes=8192)
CALL = Call(1, ROWS, 2, 2, 4)
RIGHT = {"payload_bytes": 4 * WIRE.row_bytes, "incarnation": 7}


@pytest.fixture
def ends() -> Iterator[tuple[MappedLink, socket.socket]]:
    """A link of two slots, and its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(role="group", name="g", incarnation=7, identity=rig.identity(), offer={}, terms={})
    memory = np.zeros(segment_bytes(TERMS), np.uint8)
    link = MappedLink(ours, peer, WIRE, memory, TERMS)
    yield link, theirs
    link.close()
    theirs.close()


def send(sock: socket.socket, kind: int, **fields: int) -> None:
    raw = bytearray(HEADER_BYTES)
    make_header(kind, **fields).pack_into(raw)
    sock.send(raw)


def submit(link: MappedLink) -> dict[str, int]:
    slot = link.acquire()
    assert slot is not None
    seq = link.submit(slot, CALL)
    return RIGHT | {"slot": slot.index, "seq": seq}


def test_the_right_reply_is_taken(ends: tuple[MappedLink, socket.socket]) -> None:
    link, theirs = ends
    send(theirs, REPLY, **submit(link))
    (done,) = link.poll()
    assert done.call == CALL and done.out().shape == (4, rig.HIDDEN)
    assert link.in_flight() == 0


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        (REPLY, {"seq": 0}, "a reply to request 0, in flight is 2"),
        (REPLY, {"seq": 1}, "a reply to request 1, in flight is 2"),  # late, of the same slot
        (REPLY, {"incarnation": 6}, "incarnation 6 on a link to 7"),
        (REPLY, {"slot": 1}, "slot 1, which is not in flight"),
        (REPLY, {"slot": 60000}, "slot 60000, which is not in flight"),
        (REPLY, {"payload_bytes": 0}, "a reply of kind 2 with 0 bytes"),
        (REPLY, {"payload_bytes": 1 << 60}, "a reply of kind 2"),
        (NACK, {"experts": 3, "payload_bytes": 12}, "a reply of kind 3"),
        (NACK, {"experts": 0, "payload_bytes": 0}, "a reply of kind 3"),
        (ERROR, {"payload_bytes": 5000}, "a reply of kind 4"),
        (DISPATCH, {}, "a reply of kind 1"),
    ],
)
def test_any_other_reply_ends_the_link(
    ends: tuple[MappedLink, socket.socket], kind: int, changes: dict[str, int], why: str
) -> None:
    link, theirs = ends
    first = submit(link)
    send(theirs, REPLY, **first)
    link.release(link.poll()[0].slot)
    right = submit(link)
    assert right["slot"] == first["slot"] == 0  # the same slot again
    send(theirs, kind, **(right | changes))
    with pytest.raises(PeerLost, match=why):
        link.poll()
    with pytest.raises(PeerLost, match=why):
        link.poll()


def test_grants_are_bounded_whatever_is_asked() -> None:
    limit = SlotTerms(slots=4, request_bytes=1 << 20, reply_bytes=1 << 20)
    assert granted({}, limit) == limit
    assert granted({"slots": -5, "request_bytes": 0, "reply_bytes": "x"}, limit) == SlotTerms(
        slots=1, request_bytes=2048, reply_bytes=1 << 20
    )
    assert granted({"slots": 1 << 40, "request_bytes": 1 << 60}, limit) == limit


def test_a_call_knows_its_rows() -> None:
    assert Call(0, PARTIAL, 2, 1, 5).out_rows == 2
    assert Call(0, ROWS, 2, 1, 5).out_rows == 5
