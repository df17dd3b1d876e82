"""The threads that give a group's records to other groups, one a connection."""

from __future__ import annotations

import socket
import threading

from raymoe.copying import Sender
from raymoe.links.handshake import Peer

MAX_COPIERS = 64  # connections of groups that copy from this one


class Copiers:
    """What a `Server` calls with a bulk connection."""

    def __init__(self, sender: Sender, name: str) -> None:
        self._sender, self._name = sender, name
        self._free = threading.BoundedSemaphore(MAX_COPIERS)
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def begin(self, sock: socket.socket, peer: Peer) -> None:
        """In the server's loop thread: hand the socket to a thread of its own, or close it."""
        if self._closed or not self._free.acquire(blocking=False):
            sock.close()
            return
        self._sockets.add(sock)
        threading.Thread(
            target=self._serve, args=(sock,), name=f"raymoe-copy-{self._name}", daemon=True
        ).start()

    def close(self) -> None:
        """End every connection; no more begin."""
        self._closed = True
        for sock in list(self._sockets):
            _shut(sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._sender.serve(sock)
        finally:
            self._sockets.discard(sock)
            self._free.release()


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
