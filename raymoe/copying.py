"""One expert's record from a group that holds it to one that shall: over a bulk connection.

    receiver                                     sender
    layer, expert, offset,
    urgent (JSON)                  ---->
                                   <----         the record's header (JSON), {"refused": why}, or
                                                 {"busy": true}: ask again
                                   <----         payload bytes from `offset` on
    the next request, or close

Every JSON message travels with its length before it. The header carries the payload's size and
checksum; the receiver keeps nothing that does not match. A sender gives a few records at a time,
and more only to those for whom requests wait (`urgent`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from raymoe.checkpoint.record import ExpertRecord
from raymoe.errors import CheckpointError, LinkError, PeerLost
from raymoe.links.streams import LENGTH, checked_length, frame
from raymoe.pacing import Pacer

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
IDLE_TIMEOUT_S = 10.0  # a receiver waits no longer for the next byte
SEND_TIMEOUT_S = 60.0  # a sender for one that takes its time: socket buffers hold megabytes
_TURN_S = 2.0  # a request waits so long for its turn before it is told that the sender is busy
BUSY_LIMIT_S = 60.0  # a receiver asks a busy sender for so long

OpenStream = Callable[[], socket.socket]
Wait = Callable[[float], object]  # for so many seconds; may raise to break a copy off


class Records(Protocol):
    """Where a sender finds records: an ExpertShard."""

    def record(self, layer: int, expert: int) -> ExpertRecord | None: ...


class Sender:
    """Gives records to other groups, `most` at once to those that nobody waits for."""

    def __init__(self, records: Records, most: int = 4, pacer: Pacer | None = None) -> None:
        """`pacer`: its threads share cores with those that compute for requests."""
        self._records, self._pacer = records, pacer
        self._turns = threading.BoundedSemaphore(most)

    def serve(self, sock: socket.socket) -> None:
        """Answer requests on an authenticated socket until the other end closes it, or is gone."""
        with sock:
            sock.settimeout(SEND_TIMEOUT_S)
            try:
                while self._answer(sock, _read_message(sock)):
                    pass
            except (OSError, LinkError) as error:
                log.info("a copy to another group ended: %s", error)

    def _answer(self, sock: socket.socket, asked: bytes) -> bool:
        """Send one record, or why not. False ends the connection."""
        try:
            request = json.loads(asked)
            layer, expert, offset = (int(request[k]) for k in ("layer", "expert", "offset"))
            urgent = request.get("urgent") is True
        except (ValueError, KeyError, TypeError) as error:
            _tell(sock, {"refused": f"bad request: {error!r}"})
            return False
        if urgent:
            return self._give(sock, layer, expert, offset, None)
        if not self._turns.acquire(timeout=_TURN_S):
            _tell(sock, {"busy": True})
            return True
        try:
            return self._give(sock, layer, expert, offset, self._pacer)
        finally:
            self._turns.release()

    def _give(
        self, sock: socket.socket, layer: int, expert: int, offset: int, pacer: Pacer | None
    ) -> bool:
        with pacer.measured() if pacer is not None else contextlib.nullcontext() as spent:
            try:
                record = self._records.record(layer, expert)
            except IndexError as error:
                _tell(sock, {"refused": f"bad request: {error!r}"})
                return False
            if record is None:
                _tell(sock, {"refused": f"expert {expert} of MoE layer {layer} is not here"})
                return True
            header, pieces = record.to_parts()
        if spent is not None:
            time.sleep(min(spent.rest_s, IDLE_TIMEOUT_S / 2))
        sock.sendall(frame(header))
        for piece in pieces:
            skipped = min(max(offset, 0), len(piece))
            offset -= skipped
            rest = piece[skipped:]
            while rest:  # not sendall: its time limit is for all of it
                rest = rest[sock.send(rest[:CHUNK_BYTES]) :]
        return True


def fetch_record(
    open_stream: OpenStream,
    layer: int,
    expert: int,
    *,
    limit_bytes_per_s: float | None = None,
    max_bytes: int,
    attempts: int = 3,
    wait: Wait = time.sleep,
) -> ExpertRecord:
    """Copy one expert's record; a connection that breaks is resumed where it broke.

    Without a limit it is urgent. `wait` is what a copy rests with; what it raises ends the copy.

    Raises PeerLost when it broke `attempts` times with less than 1 MiB come in between, or the
    sender stays busy; CheckpointError when the sender refused, sent more than `max_bytes` or what
    arrived fails its checksum.
    """
    header = b""
    payload = _room(0)
    received = failed = 0
    while True:
        before = received
        try:
            with open_stream() as sock:
                sock.settimeout(IDLE_TIMEOUT_S)
                request: dict[str, object] = {
                    "layer": layer,
                    "expert": expert,
                    "offset": received,
                    "urgent": limit_bytes_per_s is None,
                }
                answer = _ask(sock, request, wait)
                if answer != header:  # the first time, or another record than before
                    if received:
                        raise CheckpointError(
                            f"expert {expert} of MoE layer {layer} changed during its copy"
                        )
                    header, payload = answer, _room(_payload_bytes(answer, max_bytes))
                received = _receive(sock, payload, received, limit_bytes_per_s, wait)
            if received == len(payload):
                return ExpertRecord.from_parts(header, payload)
        except (OSError, LinkError) as error:
            last = error
        else:
            last = ConnectionResetError("closed in the middle of a copy")
        log.info("copy of expert %d/%d broke at byte %d: %s", layer, expert, received, last)
        failed = 1 if received - before >= CHUNK_BYTES else failed + 1
        if failed == attempts or isinstance(last, _Busy):
            raise PeerLost("the group it is copied from", str(last)) from last


class _Busy(OSError):
    """The sender has had no turn for this copy for long."""


def _ask(sock: socket.socket, request: dict[str, object], wait: Wait) -> bytes:
    """The answer to a request, once it is not "busy"."""
    until = time.monotonic() + BUSY_LIMIT_S
    while True:
        _tell(sock, request)
        answer = _read_message(sock)
        if b'"busy"' not in answer[:16]:
            return answer
        if time.monotonic() > until:
            raise _Busy(f"it was busy with other copies for {BUSY_LIMIT_S:.0f} s")
        wait(0.1)


def _tell(sock: socket.socket, message: dict[str, object]) -> None:
    sock.sendall(frame(json.dumps(message).encode()))


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
    sock: socket.socket,
    payload: memoryview,
    received: int,
    limit_bytes_per_s: float | None,
    wait: Wait,
) -> int:
    """Fill `payload` from byte `received` on; how far it got, also when the peer closes."""
    started, begun, chunk = time.monotonic(), received, CHUNK_BYTES
    if limit_bytes_per_s is not None:
        chunk = max(1 << 14, min(CHUNK_BYTES, int(limit_bytes_per_s / 8)))
    while received < len(payload):
        try:
            got = sock.recv_into(payload[received : received + chunk])
        except OSError:
            return received
        if not got:
            return received
        received += got
        if limit_bytes_per_s is not None:
            ahead_s = (received - begun) / limit_bytes_per_s - (time.monotonic() - started)
            if ahead_s > 0:
                wait(ahead_s)
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
