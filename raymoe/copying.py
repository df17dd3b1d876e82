"""One expert's record from a group that holds it to one that shall: over a bulk connection.

    receiver                                     sender
    layer, expert, offset (JSON)   ---->
                                   <----         the record's header (JSON), or {"refused": why}
                                   <----         payload bytes from `offset` on
    the next request, or close

Every JSON message travels with its length before it. The header carries the payload's size and
checksum; the receiver keeps nothing that does not match.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from raymoe.checkpoint.record import ExpertRecord
from raymoe.errors import CheckpointError, LinkError, PeerLost
from raymoe.links.streams import LENGTH, checked_length, frame

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
IDLE_TIMEOUT_S = 10.0  # neither end waits longer for the next byte

OpenStream = Callable[[], socket.socket]


class Records(Protocol):
    """Where a sender finds records: an ExpertShard."""

    def record(self, layer: int, expert: int) -> ExpertRecord | None: ...


def serve_copies(sock: socket.socket, records: Records) -> None:
    """Answer requests on an authenticated socket until the other end closes it, or is gone."""
    with sock:
        sock.settimeout(IDLE_TIMEOUT_S)
        try:
            while _answer(sock, _read_message(sock), records):
                pass
        except (OSError, LinkError) as error:
            log.info("a copy to another group ended: %s", error)


def _answer(sock: socket.socket, asked: bytes, records: Records) -> bool:
    """Send one record, or why not. False ends the connection."""
    try:
        request = json.loads(asked)
        layer, expert, offset = (int(request[k]) for k in ("layer", "expert", "offset"))
        record = records.record(layer, expert)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        sock.sendall(frame(json.dumps({"refused": f"bad request: {error!r}"}).encode()))
        return False
    if record is None:
        why = f"expert {expert} of MoE layer {layer} is not here"
        sock.sendall(frame(json.dumps({"refused": why}).encode()))
        return True
    header, pieces = record.to_parts()
    sock.sendall(frame(header))
    for piece in pieces:
        skipped = min(max(offset, 0), len(piece))
        offset -= skipped
        sock.sendall(piece[skipped:])
    return True


def fetch_record(
    open_stream: OpenStream,
    layer: int,
    expert: int,
    *,
    limit_bytes_per_s: float | None = None,
    max_bytes: int,
    attempts: int = 3,
) -> ExpertRecord:
    """Copy one expert's record; a connection that breaks is resumed where it broke.

    Raises PeerLost when it broke `attempts` times, CheckpointError when the sender refused, sent
    more than `max_bytes` or what arrived fails its checksum.
    """
    header = b""
    payload = _room(0)
    received = 0
    for attempt in range(attempts):
        try:
            with open_stream() as sock:
                sock.settimeout(IDLE_TIMEOUT_S)
                request = {"layer": layer, "expert": expert, "offset": received}
                sock.sendall(frame(json.dumps(request).encode()))
                answer = _read_message(sock)
                if answer != header:  # the first time, or another record than before
                    if received:
                        raise CheckpointError(
                            f"expert {expert} of MoE layer {layer} changed during its copy"
                        )
                    header, payload = answer, _room(_payload_bytes(answer, max_bytes))
                received = _receive(sock, payload, received, limit_bytes_per_s)
            if received == len(payload):
                return ExpertRecord.from_parts(header, payload)
        except (OSError, LinkError) as error:
            last = error
        else:
            last = ConnectionResetError("closed in the middle of a copy")
        log.info("copy of expert %d/%d broke at byte %d: %s", layer, expert, received, last)
        if attempt + 1 == attempts:
            raise PeerLost("the group it is copied from", str(last)) from last
    raise AssertionError("unreachable")


def _room(size: int) -> memoryview:
    """Memory to receive into. A bytearray would be filled with zeros first."""
    return np.empty(size, np.uint8).data


def _payload_bytes(answer: bytes, max_bytes: int) -> int:
    try:
        refused = json.loads(answer).get("refused")
    except (ValueError, AttributeError):
        raise CheckpointError("the sender of an expert does not speak our protocol") from None
    if refused is not None:
        raise CheckpointError(f"the copy was refused: {str(refused)[:200]}")
    size = ExpertRecord.payload_bytes(answer)
    if not 0 <= size <= max_bytes:
        raise CheckpointError(f"a record of {size} bytes was offered, expected up to {max_bytes}")
    return size


def _receive(
    sock: socket.socket, payload: memoryview, received: int, limit_bytes_per_s: float | None
) -> int:
    """Fill `payload` from byte `received` on; how far it got, also when the peer closes."""
    started, begun = time.monotonic(), received
    while received < len(payload):
        try:
            got = sock.recv_into(payload[received : received + CHUNK_BYTES])
        except OSError:
            return received
        if not got:
            return received
        received += got
        if limit_bytes_per_s is not None:
            ahead_s = (received - begun) / limit_bytes_per_s - (time.monotonic() - started)
            if ahead_s > 0:
                time.sleep(min(ahead_s, IDLE_TIMEOUT_S / 2))
    return received


def _read_message(sock: socket.socket) -> bytes:
    return _read(sock, checked_length(_read(sock, LENGTH.size)))


def _read(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            got = sock.recv(count - len(data))
        except OSError as error:
            raise PeerLost("a bulk connection", str(error)) from error
        if not got:
            raise PeerLost("a bulk connection", "closed by the peer")
        data += got
    return bytes(data)
