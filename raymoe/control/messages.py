"""What travels on a control connection: msgpack maps, each with its length before it.

controller -> client    {"table": RoutingTable.to_dict()}, {"heard": true}
client -> controller    {"report": ClientReport.to_dict()}
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from raymoe.dispatch import Ints
from raymoe.errors import FrameError

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")

Timings = Mapping[str, list[tuple[int, int, float]]]


def pack(message: Mapping[str, Any]) -> bytes:
    """A message with its length before it."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a control message of {len(body)} bytes is over {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Bytes in, whole messages out. No sockets."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now. FrameError for anything else than our messages."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"a control message of {size} bytes is over {MAX_FRAME_BYTES}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            messages.append(_unpack(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages


def _unpack(body: bytes) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(body)
    except ValueError as error:
        raise FrameError(f"a control message is not msgpack: {error}") from None
    if not isinstance(message, dict):
        raise FrameError("a control message is not a map")
    return message


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientReport:
    """What one client has done since its last report, and what it uses.

    counts     int64 [L, E] pairs dispatched to each expert; None when there were none
    timings    of each group: (pairs, active experts, busy seconds) of its latest messages
    stats      running totals of the client (`raymoe.client.ClientStats`)
    order      (term, epoch) of the table in use, which acknowledges it; None before the first
    connected  ids of the groups it has a live link to
    """

    name: str
    counts: Ints | None = None
    timings: Timings = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[int, int] | None = None
    connected: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """msgpack-safe; counts as bytes."""
        counts = self.counts
        return {
            "name": self.name,
            "shape": None if counts is None else list(counts.shape),
            "counts": None if counts is None else np.ascontiguousarray(counts, "<i8").tobytes(),
            "timings": {group: [list(t) for t in taken] for group, taken in self.timings.items()},
            "stats": dict(self.stats),
            "order": None if self.order is None else list(self.order),
            "connected": list(self.connected),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClientReport:
        """What `to_dict` wrote. Raises FrameError when it is not."""
        try:
            counts = None
            if data["shape"] is not None:
                layers, experts = (int(n) for n in data["shape"])
                flat = np.frombuffer(data["counts"], "<i8").astype(np.int64)
                counts = flat.reshape(layers, experts)
                if (counts < 0).any():
                    raise ValueError("negative counts")
            order = data["order"]
            return cls(
                name=str(data["name"]),
                counts=counts,
                timings={
                    str(group): [(int(p), int(n), float(s)) for p, n, s in taken]
                    for group, taken in data["timings"].items()
                },
                stats={str(name): value for name, value in data["stats"].items()},
                order=None if order is None else (int(order[0]), int(order[1])),
                connected=tuple(str(group) for group in data["connected"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise FrameError(f"not a client's report: {error!r}") from None

    def followed_by(self, later: ClientReport, most_timings: int) -> ClientReport:
        """Both as one: counts added, timings appended, the rest as in `later`."""
        counts = later.counts if later.counts is not None else self.counts
        if counts is not self.counts and self.counts is not None:
            assert counts is not None and counts.shape == self.counts.shape
            counts = counts + self.counts
        timings = {
            group: [*self.timings.get(group, ()), *later.timings.get(group, ())][-most_timings:]
            for group in sorted({*self.timings, *later.timings})
        }
        return ClientReport(
            name=later.name,
            counts=counts,
            timings=timings,
            stats=later.stats,
            order=later.order,
            connected=later.connected,
        )
