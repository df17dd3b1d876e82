"""What runs in the processes that the tests kill."""

from __future__ import annotations

import os
import signal
import socket
import time
from multiprocessing.connection import Connection

from raymoe.links.connect import connect
from raymoe.links.link import Endpoint, Request
from raymoe.links.protocol import HEADER_BYTES
from raymoe.links.server import Server
from tests.links import rig


def client_that_dies(endpoint: Endpoint, when: str) -> None:
    """Die in the middle of a request, or with a request in the group's hands."""
    link = connect(endpoint, rig.identity(), rig.SECRET, name="dying", node=rig.NODE)
    sent = rig.message(300)
    if when == "request":
        slot = link.acquire()
        assert slot is not None
        slot.views(sent.call).x.fill_(3.0)  # half written
        if endpoint.kind == "tcp":  # header and half of the payload are on the wire
            size = link._begin(slot, sent.call)  # type: ignore[attr-defined]
            data = bytes(link._out) + slot.request_memory[: size // 2].tobytes()  # type: ignore[attr-defined]
            link._sock.sendall(data)  # type: ignore[attr-defined]
    else:
        for _ in range(4):
            sent.write(link)
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def server_that_dies(pipe: Connection, when: str) -> None:
    """Serve one round trip, then die: with a request, or with half a reply sent."""
    server = Server(
        rig.identity(),
        rig.SECRET,
        layers=rig.LAYERS,
        experts=rig.EXPERTS,
        name="dying",
        incarnation=7,
        node=rig.NODE,
        config=rig.config(inproc=False),
    )
    pipe.send(server.endpoints())
    served = 0
    while True:
        for request in server.poll(10):
            if served:
                if when == "reply":
                    half_a_reply(server, request)
                os.kill(os.getpid(), signal.SIGKILL)
            rig.compute(request)
            server.reply(request)
            served += 1


def half_a_reply(server: Server, request: Request) -> None:
    """Over TCP the header and half of the rows; in shared memory the rows are half written."""
    request.out[: request.call.out_rows // 2].fill_(1.0)
    link = server._links[request.link_id]
    if link.sock.family == socket.AF_INET:
        sent = bytearray()
        send, link.sock = link.sock.sendall, _Keep(sent)  # type: ignore[assignment]
        link._outbox._sock = link.sock  # type: ignore[attr-defined]
        server.reply(request)
        send(bytes(sent[: HEADER_BYTES + request.out.nbytes // 2]))


class _Keep:
    """A socket that keeps what is sent."""

    def __init__(self, into: bytearray) -> None:
        self._into = into

    def sendmsg(self, parts: tuple[bytes, ...]) -> int:
        for part in parts:
            self._into += part
        return sum(len(part) for part in parts)
