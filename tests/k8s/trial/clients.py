"""The Service as kube-proxy has it, and clients that go through it."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections import Counter
from types import TracebackType

from tests.k8s.trial.pod import Pod

_RESET = struct.pack("ii", 1, 0)


class Service:
    """A new connection goes to a ready serving pod of `pods`, or is refused; open ones stay."""

    def __init__(self, pods: list[Pod]) -> None:
        self.pods = pods
        self.refused = 0
        self._turn = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._lead, args=(client,), daemon=True).start()

    def _lead(self, client: socket.socket) -> None:
        places = [p for p in self.pods if p.serves and p.ready and not p.terminating]
        self._turn += 1
        try:
            if not places:
                raise ConnectionRefusedError
            at = places[self._turn % len(places)]
            server = socket.create_connection((at.ip, 8000), timeout=5)
        except OSError:
            self.refused += 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        server.settimeout(None)
        threading.Thread(target=_pump, args=(server, client), daemon=True).start()
        _pump(client, server)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Load:
    """Streams of several lengths, one after the other in four threads, until the block ends."""

    TOKENS = (8, 8, 64, 400)

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self.ended: Counter[int] = Counter()
        self.longest_s = 0.0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in self.TOKENS]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(240)

    def told(self) -> str:
        """What came of it, in a line."""
        streams = ", ".join(f"{count} of {n} tokens" for n, count in sorted(self.ended.items()))
        return f"streams: {streams}; longest {self.longest_s:.1f} s; failed: {len(self.failures)}"

    def _ask(self, tokens: int) -> None:
        body = {"model": "demo", "prompt": "In the beginning", "max_tokens": tokens}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._stream(body)
                self.ended[tokens] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)
            except Exception as e:
                self.failures.append(f"{tokens} tokens, {time.monotonic() - began:.1f} s: {e!r}")
            time.sleep(0.1)

    def _stream(self, body: dict[str, object]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=240)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answered = connection.getresponse()
        text = answered.read().decode()
        assert answered.status == 200, (answered.status, text[:200])
        chunks = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert chunks[-1] == "[DONE]", chunks[-1]
        assert json.loads(chunks[-2])["usage"]["completion_tokens"] == body["max_tokens"]
