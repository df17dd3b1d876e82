"""The load of benchmarks/live.py tells of streams that stand still."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import live
from benchmarks.live import Load

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNK = b'data: {"choices":[{"text":"a"}]}\n\n'


@contextmanager
def endpoint(ends: bool) -> Iterator[int]:
    """Answers each request with three chunks, and its end when it `ends`; until the block does."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                sock.recv(1 << 16)
                sock.sendall(HEAD + 3 * CHUNK + (b"data: [DONE]\n\n" if ends else b""))
                if ends:
                    sock.close()
                else:
                    kept.append(sock)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for sock in kept:
                sock.close()


def until(load: Load, chunks: int) -> None:
    end = time.monotonic() + 30
    while sum(len(stream.times) for stream in load.done) < chunks:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_streams_that_never_end_are_failures_and_their_pause_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "_LAST_S", 0.3)
    with endpoint(ends=False) as port:
        began = time.monotonic()
        with Load(port, 2, 3, ["code"]) as load:
            until(load, 6)
            stalled = time.monotonic()
        assert len(load.failures) == 2 and "has not ended" in load.failures[0]
        paused = time.monotonic() - stalled
        assert load.gaps(began, time.monotonic()).max() >= paused
        assert len(load.resumed(stalled, 1.0)) == 2
        assert min(load.resumed(stalled, 1.0)) >= paused


def test_streams_that_end_are_none() -> None:
    with endpoint(ends=True) as port, Load(port, 2, 3, ["code"]) as load:
        until(load, 12)
    assert load.failures == []
    assert all(stream.ended for stream in load.done)
    began = min(stream.asked for stream in load.done)
    assert len(load.gaps(began, time.monotonic())) == 2 * len(load.done)
