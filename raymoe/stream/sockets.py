"""Sockets of the stream: abstract unix on one node, TCP between nodes."""

from __future__ import annotations

import socket

_DEAD_AFTER_S = 10  # unacknowledged data or unanswered probes for this long: the peer is gone


def listen_unix(name: str) -> socket.socket:
    """An abstract socket: it has no file, so a killed process leaves nothing behind."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    return _ready(listener)


def listen_tcp(host: str, port: int) -> socket.socket:
    """host may be a name; port 0 picks a free one."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return _ready(listener)


def tune_tcp(sock: socket.socket) -> None:
    """Small frames leave at once; a vanished host is noticed. Does nothing to a unix socket."""
    if sock.family == socket.AF_UNIX:
        return
    for level, option, value in (
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _DEAD_AFTER_S // 2),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", _DEAD_AFTER_S // 2),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _DEAD_AFTER_S * 1000),
    ):
        if hasattr(socket, option):  # the last four are Linux's
            sock.setsockopt(level, getattr(socket, option), value)


def _ready(listener: socket.socket) -> socket.socket:
    listener.listen(64)
    listener.setblocking(False)
    return listener
