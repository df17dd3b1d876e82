"""The client's book of slots: which are free, which are in flight, and whose reply this is."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymoe.errors import FrameError, LinkError, PeerLost
from raymoe.links.handshake import Peer
from raymoe.links.link import Completion, Slot, SlotTerms
from raymoe.links.protocol import (
    _HEADER,
    DISPATCH,
    ERROR,
    HEADER_BYTES,
    MAGIC,
    MAX_TEXT_BYTES,
    NACK,
    PING,
    PONG,
    REPLY,
    Call,
    Header,
    Wire,
    make_header,
    unpack_header,
)

MAX_SLOTS = 64
MAX_UNANSWERED_PINGS = 8
_PAGE = 4096


def region_bytes(terms: SlotTerms) -> tuple[int, int]:
    """Bytes of one request and one reply region, rounded up to pages."""
    return (-(-terms.request_bytes // _PAGE) * _PAGE, -(-terms.reply_bytes // _PAGE) * _PAGE)


def segment_bytes(terms: SlotTerms) -> int:
    """Bytes of a whole segment of slots."""
    return terms.slots * sum(region_bytes(terms))


def cut_regions(
    memory: NDArray[np.uint8], terms: SlotTerms
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """(request, reply) regions of every slot of a segment; both sides cut alike."""
    request, reply = region_bytes(terms)
    regions = []
    for index in range(terms.slots):
        at = index * (request + reply)
        regions.append(
            (
                memory[at : at + terms.request_bytes],
                memory[at + request : at + request + terms.reply_bytes],
            )
        )
    return regions


def granted(offer: dict[str, Any], limit: SlotTerms) -> SlotTerms:
    """What a server grants of what a client asks for: at most its own limit, at least one slot of
    the smallest useful size."""

    def choose(key: str, least: int, most: int) -> int:
        asked = offer.get(key, most)
        return max(least, min(asked if isinstance(asked, int) else most, most))

    return SlotTerms(
        slots=choose("slots", 1, min(limit.slots, MAX_SLOTS)),
        request_bytes=choose("request_bytes", MAX_TEXT_BYTES, limit.request_bytes),
        reply_bytes=choose("reply_bytes", MAX_TEXT_BYTES, limit.reply_bytes),
    )


def terms_of(peer: Peer) -> SlotTerms:
    """The terms of a welcome. FrameError when they are not terms."""
    try:
        terms = SlotTerms(**{key: int(value) for key, value in peer.terms.items()})
    except (TypeError, ValueError):
        raise FrameError(f"the terms of {peer.name} make no sense: {peer.terms}") from None
    if not 1 <= terms.slots <= MAX_SLOTS or min(terms.request_bytes, terms.reply_bytes) < 1:
        raise FrameError(f"the terms of {peer.name} make no sense: {peer.terms}")
    return terms


class SlotBook:
    """What the client's end of every transport shares. The transport does the sending, and calls
    `_begin` before and `_complete` after."""

    def __init__(
        self, peer: Peer, wire: Wire, regions: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    ) -> None:
        self.peer = peer
        self.wire = wire
        self.incarnation = peer.incarnation
        self.slots = tuple(Slot(i, wire, a, b) for i, (a, b) in enumerate(regions))
        self.last_heard_s = time.monotonic()
        self.progress = 0
        self._request_limit = self.slots[0].request_memory.nbytes
        self._reply_limit = self.slots[0].reply_memory.nbytes
        self._calls: list[Call | None] = [None] * len(self.slots)
        self._free = list(reversed(self.slots))  # the last used is the warmest in cache
        self._seq = 0
        self._out = bytearray(HEADER_BYTES)
        self._pings = 0  # not answered yet
        self._lost: PeerLost | None = None

    @property
    def slot_bytes(self) -> int:
        """Bytes of a request region."""
        return self._request_limit

    def acquire(self) -> Slot | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        """Give a slot back; LinkError when it is in flight or another link's."""
        if slot.seq >= 0:
            raise LinkError("a slot in flight cannot be released: close the link to abandon it")
        if self._lost is None:
            if slot.index >= len(self.slots) or self.slots[slot.index] is not slot:
                raise LinkError("this slot belongs to another link")
            if slot in self._free:
                raise LinkError("this slot has been released already")
            self._free.append(slot)

    def in_flight(self) -> int:
        """Requests submitted and not completed."""
        return sum(call is not None for call in self._calls)

    def _begin(self, slot: Slot, call: Call) -> int:
        """Put a request into the book and its header into `_out`; its payload's bytes."""
        if self._lost is not None:
            raise self._lost
        wire = self.wire
        size = wire.request_bytes(call)
        if size > self._request_limit or wire.reply_bytes(call) > self._reply_limit:
            raise FrameError(
                f"{call} takes {size} bytes and {wire.reply_bytes(call)} for the reply; "
                f"slots hold {self._request_limit} and {self._reply_limit}"
            )
        if slot.seq >= 0:
            raise LinkError("this slot is in flight")
        index = slot.index
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        slot.seq = seq
        self._calls[index] = call
        layer, mode, tokens, experts, pairs, epoch = call
        _HEADER.pack_into(
            self._out, 0, MAGIC, DISPATCH, mode, index, seq, layer, 0,
            tokens, experts, pairs, size, epoch, self.incarnation, 0, 0,
        )  # fmt: skip
        return size

    def _expect(self, raw: bytearray) -> tuple[Header, Slot | None, int]:
        """The header of an arriving message, its slot (None for a PONG) and its payload's bytes.

        FrameError for anything but the answer to a request in flight on this very link.
        """
        header = unpack_header(raw)
        kind = header.kind
        if header.incarnation != self.incarnation:
            raise FrameError(f"incarnation {header.incarnation} on a link to {self.incarnation}")
        if kind == PONG:
            return header, None, 0
        if header.slot >= len(self._calls) or (call := self._calls[header.slot]) is None:
            raise FrameError(f"a reply for slot {header.slot}, which is not in flight")
        slot = self.slots[header.slot]
        if header.seq != slot.seq:
            raise FrameError(f"a reply to request {header.seq}, in flight is {slot.seq}")
        size = header.payload_bytes
        if kind == REPLY:
            right = size == call.out_rows * self.wire.row_bytes
        elif kind == NACK:
            right = 1 <= header.experts <= call.experts and size == 4 * header.experts
        else:
            right = kind == ERROR and size <= MAX_TEXT_BYTES
        if not right:
            raise FrameError(f"a reply of kind {kind} with {size} bytes to {call}")
        return header, slot, size

    def _complete(self, header: Header, slot: Slot) -> Completion:
        call = self._calls[slot.index]
        assert call is not None
        self._calls[slot.index] = None
        slot.seq = -1
        self.last_heard_s = time.monotonic()
        return Completion(slot, call, header)

    def _ponged(self, header: Header) -> None:
        self.last_heard_s = time.monotonic()
        self.progress = header.payload_bytes
        self._pings = 0

    def _ping_header(self) -> bytearray | None:
        """A PING to send, or None while too many are unanswered."""
        if self._lost is not None or self._pings >= MAX_UNANSWERED_PINGS:
            return None
        self._pings += 1
        raw = bytearray(HEADER_BYTES)
        make_header(PING, incarnation=self.incarnation).pack_into(raw)
        return raw

    def _retire(self, why: str) -> PeerLost:
        """Forget every slot; their memory lives on while somebody still holds a view of it."""
        if self._lost is None:
            self._lost = PeerLost(self.peer.name or self.peer.role, why)
            self.slots = ()
            self._free = []
            self._calls = []
        return self._lost
