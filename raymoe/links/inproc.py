"""Links within one process: for tests, and for a router that holds a group itself.

The same ends as shared memory, with one half of a socket pair handed to the server.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

_adopters: dict[str, Callable[[socket.socket], None]] = {}
_lock = threading.Lock()


def publish(name: str, adopt: Callable[[socket.socket], None]) -> None:
    """Let this process connect to a server by name."""
    with _lock:
        _adopters[name] = adopt


def withdraw(name: str) -> None:
    """The server of that name has stopped."""
    with _lock:
        _adopters.pop(name, None)


def open_pair(name: str) -> socket.socket:
    """A SEQPACKET socket whose other half the server of that name has; ConnectionRefusedError."""
    with _lock:
        adopt = _adopters.get(name)
    if adopt is None:
        raise ConnectionRefusedError(f"nothing in this process is called {name!r}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopt(theirs)
    return ours
