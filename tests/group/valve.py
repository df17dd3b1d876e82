"""A network between a client and a group that can be stopped at any byte, each way by itself: a TCP
relay that lets only so many bytes through, and does not even read the others."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from dataclasses import dataclass

_SMALL = 16 << 10  # buffers on the group's side: what is not let through stays with who writes it


@dataclass
class Gate:
    """One direction of the first connection."""

    passed: int = 0
    limit: int | None = None

    def hold(self, more: int) -> None:
        """So many bytes go on, and then none."""
        self.limit = self.passed + more

    @property
    def room(self) -> int:
        return 1 << 16 if self.limit is None else self.limit - self.passed

    @property
    def shut(self) -> bool:
        return self.room == 0


class Valve:
    """Forwards connections to `target` (host:port) until closed."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.up, self.down = Gate(), Gate()  # to the group, and from it
        self.connections = 0  # made so far
        self._first_far: socket.socket | None = None
        self._kept = b""  # drained, not yet forwarded
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def drain(self) -> int:
        """How many more bytes the group has handed to its kernel than were let through."""
        assert self.down.shut and self._first_far is not None
        with contextlib.suppress(BlockingIOError):
            while data := self._first_far.recv(1 << 16, socket.MSG_DONTWAIT):
                self._kept += data
        return len(self._kept)

    def release(self) -> None:
        """Everything goes on."""
        self.up.limit = self.down.limit = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        pairs: dict[socket.socket, tuple[socket.socket, Gate]] = {}  # source -> target
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listener)
            while not self._closed.is_set():
                open_now = [sock for sock, (_, gate) in pairs.items() if not gate.shut]
                ready, _, _ = select.select([self._listener, *open_now], [], [], 0.01)
                for sock in ready:
                    if sock is self._listener:
                        near, far = self._accept()
                        stack.callback(near.close)
                        stack.callback(far.close)
                        gates = (self.up, self.down) if self.connections == 1 else (Gate(), Gate())
                        pairs |= {near: (far, gates[0]), far: (near, gates[1])}
                    elif sock in pairs:
                        self._forward(sock, pairs)

    def _accept(self) -> tuple[socket.socket, socket.socket]:
        near, _ = self._listener.accept()
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL)
        far.connect(self._target)
        self.connections += 1
        self._first_far = self._first_far or far
        return near, far

    def _forward(
        self, sock: socket.socket, pairs: dict[socket.socket, tuple[socket.socket, Gate]]
    ) -> None:
        target, gate = pairs[sock]
        try:
            if sock is self._first_far and self._kept:
                target.sendall(self._kept)
                self._kept = b""
            data = sock.recv(gate.room)
            if data:
                target.sendall(data)
                gate.passed += len(data)
                return
        except OSError:
            pass
        for end in (sock, target):
            pairs.pop(end, None)
            end.close()
