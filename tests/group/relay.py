"""A network between a client and a group that can be cut: a TCP relay which, while cut, takes what
is sent and says nothing. No connection is closed, as when a switch drops every packet. Or it gives
the client noise in place of what the group says, as a group with broken memory might."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading


class Relay:
    """Forwards connections to `target` (host:port) until closed."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut, self.noise = threading.Event(), threading.Event()
        self.connections = 0  # made so far
        self._closed = threading.Event()
        self._random = random.Random(7)
        self._far: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listener)
            while not self._closed.is_set():
                ready, _, _ = select.select([self._listener, *other], [], [], 0.02)
                if self.cut.is_set():
                    self._closed.wait(0.01)  # what has come stays where it is
                    continue
                for sock in ready:
                    if sock is self._listener:
                        near, _ = sock.accept()
                        far = socket.create_connection(self._target)
                        other |= {stack.enter_context(near): far, stack.enter_context(far): near}
                        self._far.add(far)
                        self.connections += 1
                    elif sock in other:
                        self._forward(sock, other)

    def _forward(self, sock: socket.socket, other: dict[socket.socket, socket.socket]) -> None:
        try:
            data = sock.recv(1 << 16)
            if data:
                if self.noise.is_set() and sock in self._far:
                    data = self._random.randbytes(len(data))
                other[sock].sendall(data)
                return
        except OSError:
            pass
        peer = other.pop(sock)
        other.pop(peer, None)
        for end in (sock, peer):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
