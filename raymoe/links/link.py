"""The seam between a dispatching client and an expert group: what every transport offers.

    client                                          group
    link = connect(endpoint, ...)                   server = LinkServer(...)
    slot = link.acquire()                           for request in server.poll(timeout_s):
    write slot.arrays(call)                             compute(request.x, ..., out=request.out)
    link.submit(slot, call)       ---------------->     server.reply(request, busy_ns=...)
    for done in link.poll(): ...  <----------------
    read done.out(); link.release(done.slot)

Slots are torch tensors over one mapping that is fixed for the link's life, so that a transport can
register it once (pinned memory, RDMA). Only host memory is built: in-process, shared memory and
TCP. GPU transports (CUDA IPC, NIXL) are NOT built; they fit this seam, with completions that carry
a stream event, and would refuse the numpy accessors.

A slot goes acquire -> submit -> completion -> release. A slot in flight cannot be given back: who
will not wait for its reply retires the whole link with close(), and with it the mapping, so that a
late reply can never be taken for a newer one. A link belongs to one thread at a time; only ping()
may come from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from raymoe.links.handshake import Peer
from raymoe.links.protocol import (
    Call,
    Header,
    PairArrays,
    RequestArrays,
    RequestViews,
    Wire,
    Words,
    as_tensor,
    reply_array,
    request_arrays,
    request_rows,
    request_views,
    rows_at,
)

EndpointKind = Literal["shm", "tcp", "inproc"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a group listens. `address` is "host:port" for tcp, the name of the abstract unix
    socket (without its NUL) for shm, a process-wide name for inproc."""

    kind: EndpointKind
    address: str
    node: str

    def to_dict(self) -> dict[str, str]:
        """JSON- and msgpack-safe."""
        return {"kind": self.kind, "address": self.address, "node": self.node}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Endpoint:
        """The inverse of `to_dict`; ValueError for an unknown kind."""
        kind = data["kind"]
        if kind not in ("shm", "tcp", "inproc"):
            raise ValueError(f"unknown kind of endpoint: {kind!r}")
        return Endpoint(kind=kind, address=str(data["address"]), node=str(data["node"]))


@dataclass(frozen=True, kw_only=True)
class SlotTerms:
    """How much a link may carry: `slots` requests in flight, bytes of each region."""

    slots: int = 4
    request_bytes: int = (4 << 20) + (256 << 10)
    reply_bytes: int = 4 << 20


class Slot:
    """One request region and one reply region of a link. Made by the link, never by hand."""

    __slots__ = (
        "index",
        "reply",
        "reply_address",
        "reply_memory",
        "request",
        "request_address",
        "request_memory",
        "seq",
        "wire",
    )

    def __init__(
        self, index: int, wire: Wire, request: NDArray[np.uint8], reply: NDArray[np.uint8]
    ) -> None:
        self.index = index
        self.wire = wire
        self.request_memory = request  # the same host memory as the tensors, uint8
        self.reply_memory = reply
        self.request: torch.Tensor = torch.from_numpy(request)  # uint8 [request_bytes]
        self.reply: torch.Tensor = torch.from_numpy(reply)  # uint8 [reply_bytes]
        self.request_address = self.request.data_ptr()
        self.reply_address = self.reply.data_ptr()
        self.seq = -1  # of the request in flight; -1 when none

    def fits(self, call: Call) -> bool:
        """Whether a request of this shape, and every reply to it, fits this slot."""
        return (
            self.wire.request_bytes(call) <= self.request_memory.nbytes
            and self.wire.reply_bytes(call) <= self.reply_memory.nbytes
        )

    def arrays(self, call: Call) -> RequestArrays:
        """numpy views to write the request through; `fits(call)` must hold."""
        return request_arrays(self.request_memory, call, self.wire)

    def views(self, call: Call) -> RequestViews:
        """As `arrays`, torch tensors."""
        return request_views(self.request, call, self.wire)


class Completion:
    """One answered request. Its views are valid until `release(slot)`."""

    __slots__ = ("call", "header", "slot")

    def __init__(self, slot: Slot, call: Call, header: Header) -> None:
        self.slot = slot
        self.call = call  # as submitted
        self.header = header  # of the reply: kind REPLY, NACK or ERROR, busy_ns, queued_*

    def out_array(self) -> NDArray[Any]:
        """The reply's rows [N or P, D] in the carrier dtype (bfloat16 as uint16)."""
        return reply_array(self.slot.reply_memory, self.call.out_rows, self.slot.wire)

    def out(self) -> torch.Tensor:
        """The reply's rows [N or P, D] in the wire dtype."""
        return as_tensor(self.out_array(), self.slot.wire)

    def missing(self) -> list[int]:
        """For a NACK: the experts of the layer that are not resident. Nothing was computed."""
        words = self.slot.reply_memory[: 4 * self.header.experts].view("<i4")
        return [int(expert) for expert in words]

    def text(self) -> str:
        """For an ERROR: what went wrong in the group."""
        raw = self.slot.reply_memory[: self.header.payload_bytes].tobytes()
        return raw.decode("utf-8", "replace")


class Link(Protocol):
    """The client's end of one connection to one group."""

    peer: Peer
    wire: Wire
    slots: tuple[Slot, ...]
    incarnation: int  # of the group behind this link
    last_heard_s: float  # time.monotonic() of the last message of any kind
    progress: int  # the group's counter of work done, from its last PONG

    @property
    def slot_bytes(self) -> int:
        """Bytes of a request region."""

    def acquire(self) -> Slot | None:
        """A free slot, or None when all are in flight."""

    def submit(self, slot: Slot, call: Call) -> int:
        """Send what was written to the slot; never blocks. Returns its sequence number.

        Raises FrameError when it does not fit, PeerLost when the peer is gone.
        """

    def poll(self) -> list[Completion]:
        """What has arrived, without blocking; perhaps not all of it: poll again while fileno() is
        readable. Raises PeerLost (after any completion that came before), which ends the link."""

    def release(self, slot: Slot) -> None:
        """Give back a slot whose completion has been read, or that was never submitted.
        LinkError for a slot in flight."""

    def in_flight(self) -> int:
        """Requests submitted and not yet completed."""

    def ping(self) -> None:
        """Ask for a PONG, seen in `last_heard_s`, `progress` after a later poll(). Any thread."""

    def fileno(self) -> int:
        """Readable (level-triggered) when poll() has something to do."""

    def close(self) -> None:
        """Retire the link at once, whatever is in flight. Its memory is never used again."""


class Request:
    """One complete, authenticated, checked request in a group's hands.

    The small arrays are private copies, valid until the reply; `x` and `out` lie in the link's slot
    (shared memory: the client's own). Views are made when asked for. reply() or refuse() exactly
    once.
    """

    __slots__ = (
        "_out", "_pairs", "_regions", "_x", "arrived_s", "call", "header", "link_id",
        "out_address", "wire", "words_address", "x_address",
    )  # fmt: skip

    def __init__(
        self,
        link_id: int,
        header: Header,
        call: Call,
        words: Words,
        regions: Regions,
        wire: Wire,
        arrived_s: float,
    ) -> None:
        self.link_id = link_id
        self.header = header
        self.call = call
        self.wire = wire
        self.arrived_s = arrived_s  # time.monotonic()
        self._regions = regions  # keeps the memory alive
        self._pairs: PairArrays | Words = words
        self._x: torch.Tensor | None = None
        self._out: torch.Tensor | None = None
        self.words_address = words.address  # expert_ids, counts, token_of_pair, weights
        self.x_address = regions.request_address + rows_at(call)
        self.out_address = regions.reply_address

    @property
    def x(self) -> torch.Tensor:
        """[N, D] wire dtype."""
        if self._x is None:
            rows = request_rows(self._regions.request, self.call, self.wire)
            self._x = as_tensor(rows, self.wire)
        return self._x

    @property
    def out(self) -> torch.Tensor:
        """[N or P, D] wire dtype, to be written."""
        if self._out is None:
            rows = reply_array(self._regions.reply, self.call.out_rows, self.wire)
            self._out = as_tensor(rows, self.wire)
        return self._out

    @property
    def pairs(self) -> PairArrays:
        """The small arrays, host."""
        if isinstance(self._pairs, Words):
            self._pairs = self._pairs.arrays(self.call)
        return self._pairs

    @property
    def expert_ids(self) -> NDArray[np.int32]:
        """[n], host."""
        return self.pairs.expert_ids

    @property
    def counts(self) -> NDArray[np.int32]:
        """[n] pairs of each expert, host; they sum to P."""
        return self.pairs.counts

    @property
    def token_of_pair(self) -> torch.Tensor:
        """int32 [P], rows of x; pairs sorted by expert."""
        return torch.from_numpy(self.pairs.token_of_pair)

    @property
    def weights(self) -> torch.Tensor | None:
        """float32 [P] in PARTIAL mode, None in ROWS mode."""
        weights = self.pairs.weights
        return None if weights is None else torch.from_numpy(weights)


class Regions:
    """The memory of one slot at the group's end."""

    __slots__ = ("reply", "reply_address", "request", "request_address", "words")

    def __init__(self, request: NDArray[np.uint8], reply: NDArray[np.uint8]) -> None:
        self.request, self.reply = request, reply
        self.request_address: int = request.ctypes.data
        self.reply_address: int = reply.ctypes.data
        self.words = Words()  # of the request in it

    def checked(self, call: Call, experts: int) -> Words:
        """The small arrays of the request in this slot; FrameError when they are not well-formed.

        The request before has been answered: its copy is not needed any more.
        """
        self.words = self.words.take(self.request, self.request_address, call, experts)
        return self.words


class LinkServer(Protocol):
    """A group's end of all its links."""

    def endpoints(self) -> list[Endpoint]:
        """Where clients connect."""

    def poll(self, timeout_s: float) -> list[Request]:
        """The next request, chosen fairly, with others of the same layer and mode that wait beside
        it and fit `merge_pairs` altogether; [] after `timeout_s`, wake() or stop()."""

    def reply(
        self,
        request: Request,
        *,
        missing: list[int] | None = None,
        error: str | None = None,
        busy_ns: int = 0,
    ) -> bool:
        """Answer: `out` is written; or the experts that are missing (NACK); or an error's text.
        False when the client is gone. Never blocks."""

    def wake(self) -> None:
        """Make a waiting poll() return. From any thread."""

    def stop(self) -> None:
        """Close everything. Idempotent, from any thread."""
