"""What HTTP costs: the gateway without a model behind it.

Three processes: a fake router that publishes one token a stream and step at a fixed rate, the
gateway (uvicorn; with --serve a Ray Serve replica behind HAProxy, as `raymoe serve` runs it), and
a client that reads the server-sent events of all streams. Measured at several rates: tokens per
second that reach the client, the CPU-milliseconds per token of the gateway and of HAProxy (user
and system, requests included), and how late tokens are. Every token must arrive as a chunk of its
own; a run that loses one fails.

    python -m benchmarks.http_path [--streams 32] [--rates 1000,4000,8000] [--seconds 3] [--serve]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any
from urllib.request import urlopen

import psutil

from benchmarks.report import finish, table
from raymoe.links.handshake import Identity
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream import ModelInfo, StreamEndpoint, StreamServer

IDENTITY = Identity(deployment="bench", fingerprint="none")
SECRET = b"only for this benchmark's processes"
VOCAB = 1 << 20  # any tokenizer's


def router_process(pipe: Connection, transport: str) -> None:
    """Serves requests with tokens at the rate it is told; keeps the steps' times."""
    running: dict[str, list[int]] = {}  # request id -> tokens left, next token
    lock = threading.Lock()

    def submitted(request: GenerationRequest) -> None:
        with lock:
            running[request.request_id] = [request.sampling.max_tokens, 65]

    def cancelled(request_ids: tuple[str, ...]) -> None:
        with lock:
            for request_id in request_ids:
                running.pop(request_id, None)

    server = StreamServer(
        router_id="fake",
        model=ModelInfo(
            name="bench", vocab=VOCAB, context_tokens=1 << 20, kv_capacity_tokens=1 << 20
        ),
        identity=IDENTITY,
        secret=SECRET,
        submitted=submitted,
        cancelled=cancelled,
        node="here" if transport == "unix" else "there",
    )
    server.start()
    pipe.send(server.endpoint.to_dict())
    while True:
        order = pipe.recv()
        streams, step_s = order
        while len(running) < streams:
            time.sleep(0.001)
        start = time.perf_counter()
        steps = 0
        while running:
            due = start + steps * step_s
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            with lock:
                events = []
                for request_id, state in tuple(running.items()):
                    state[0] -= 1
                    state[1] = 65 + (state[1] - 64) % 26
                    finish = "length" if state[0] == 0 else None
                    if finish:
                        del running[request_id]
                    events.append(
                        TokenEvent(request_id=request_id, token_ids=(state[1],), finish=finish)
                    )
            server.publish(events)
            steps += 1
        pipe.send(time.perf_counter() - start)


def application(endpoint: dict[str, Any], model: str | None) -> Any:
    """The real application, over the fake router."""
    from raymoe.gateway import AppConfig, GatewayTokenizer, RouterPool, create_app

    tokenizer = GatewayTokenizer.load(model) if model else byte_tokenizer()
    pool = RouterPool(
        lambda: [StreamEndpoint.from_dict(endpoint)],
        identity=IDENTITY,
        secret=SECRET,
        node="here",
    )
    app = create_app(pool, tokenizer, AppConfig(model_name="bench"))

    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()

    return app


def gateway_process(pipe: Connection, endpoint: dict[str, Any], model: str | None) -> None:
    """The application under uvicorn."""
    import uvicorn

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    pipe.send(sock.getsockname()[1])
    config = uvicorn.Config(application(endpoint, model), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[sock])


@contextmanager
def under_uvicorn(endpoint: dict[str, Any], model: str | None) -> Iterator[int]:
    """Its port."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    gateway = context.Process(target=gateway_process, args=(theirs, endpoint, model), daemon=True)
    gateway.start()
    try:
        yield ours.recv()
    finally:
        gateway.terminate()
        gateway.join()


@contextmanager
def under_serve(endpoint: dict[str, Any], model: str | None) -> Iterator[int]:
    """Its port, which is HAProxy's."""
    from ray import serve

    from actors.local import LocalRay, free_port
    from raymoe.config import RayConfig

    @serve.ingress()
    class Gateway:
        def __serve_build_asgi_app__(self) -> Any:
            return application(endpoint, model)

    ray_here = LocalRay(RayConfig())
    try:
        ray_here.start(2, 0, {})
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(serve.deployment(Gateway, max_ongoing_requests=1000).bind())
        yield port
    finally:
        ray_here.stop()


def processes(port: int) -> list[psutil.Process]:
    """The gateway and what passes its bytes on."""
    with urlopen(f"http://127.0.0.1:{port}/pid") as answer:
        found = [psutil.Process(json.loads(answer.read()))]
    family = psutil.Process().children(recursive=True)
    return found + [process for process in family if process.name() == "haproxy"]


def byte_tokenizer() -> Any:
    """256 tokens, one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from raymoe.gateway import GatewayTokenizer
    from raymoe.gateway.detokenize import byte_alphabet

    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return GatewayTokenizer(wrapped)


class EventCounter:
    """Counts a marker in the body of an HTTP response with chunked encoding.

    A proxy may cut chunks anywhere, also within an event.
    """

    def __init__(self, marker: bytes) -> None:
        self.count = 0
        self._marker = marker
        self._raw = b""
        self._tail = b""  # of the body, too short to hold a marker
        self._left = -1  # of the chunk; 0: its line end comes next; -1: still in the head

    def feed(self, data: bytes) -> int:
        """How many came with this data."""
        self._raw += data
        parts = [self._tail]
        while self._raw:
            if self._left > 0:
                part, self._raw = self._raw[: self._left], self._raw[self._left :]
                self._left -= len(part)
                parts.append(part)
                continue
            end = b"\r\n\r\n" if self._left < 0 else b"\r\n"
            line, found, rest = self._raw.partition(end)
            if not found:
                break
            self._raw = rest
            if self._left < 0:
                if b" 200 " not in line[:20]:
                    raise SystemExit(f"the gateway refused: {(line + end + rest)[:2000]!r}")
                self._left = 0
            elif line:  # empty: the end of the last chunk
                self._left = int(line, 16)
        body = b"".join(parts)
        found_now = body.count(self._marker)
        self.count += found_now
        self._tail = body[-(len(self._marker) - 1) :]
        return found_now


def read_streams(port: int, streams: int, tokens: int, route: str) -> dict[str, Any]:
    """Opens every stream, reads all to the end; counts chunks with text."""
    body: dict[str, Any] = {"max_tokens": tokens, "stream": True, "temperature": 0}
    if route == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello"}]
        marker = b'"delta":{"content":"'
    else:
        path = "/v1/completions"
        body["prompt"] = "Hello"
        marker = b'"text":"'
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    ).encode()
    selector = selectors.DefaultSelector()
    counters: dict[socket.socket, EventCounter] = {}
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(head + payload)
        selector.register(sock, selectors.EVENT_READ)
        counters[sock] = EventCounter(marker)
    first = last = 0.0
    reads = 0
    open_streams = streams
    while open_streams:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            data = sock.recv(1 << 16)
            if not data:
                selector.unregister(sock)
                sock.close()
                open_streams -= 1
                continue
            reads += 1
            if counters[sock].feed(data):
                last = time.perf_counter()
                first = first or last
    received = sum(counter.count for counter in counters.values())
    return {"received": received, "seconds": last - first, "reads": reads}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    router_pipe, router_end = context.Pipe()
    router = context.Process(target=router_process, args=(router_end, args.transport), daemon=True)
    router.start()
    gateway = under_serve if args.serve else under_uvicorn
    try:
        with gateway(router_pipe.recv(), args.tokenizer) as port:
            _wait_ready(port)
            watched = processes(port)
            # The first run warms up.
            return [_run(args, rate, port, router_pipe, watched) for rate in _warm(args.rates)][1:]
    finally:
        router.terminate()
        router.join()


def _warm(rates: list[float]) -> list[float]:
    return [rates[0], *rates]


def _run(
    args: argparse.Namespace,
    rate: float,
    port: int,
    router: Connection,
    watched: list[psutil.Process],
) -> dict[str, Any]:
    tokens = max(8, round(rate * args.seconds / args.streams))
    total = tokens * args.streams
    before = _cpu_s(watched)
    router.send((args.streams, args.streams / rate))
    seen = read_streams(port, args.streams, tokens, args.route)
    if seen["received"] != total:
        raise SystemExit(f"{seen['received']} of {total} tokens arrived as chunks")
    router_s = router.recv()
    own_s, others_s = (after - start for after, start in zip(_cpu_s(watched), before, strict=True))
    return {
        "rate": rate,
        "tokens": total,
        "tokens_per_s": round(total / seen["seconds"]),
        "cpu_ms_per_token": round(1000 * own_s / total, 4),
        "proxy_cpu_ms_per_token": round(1000 * others_s / total, 4),
        "gateway_cpu_share": round(own_s / seen["seconds"], 3),
        "reads_per_token": round(seen["reads"] / total, 3),
        "behind_s": round(seen["seconds"] - router_s, 3),
    }


def _cpu_s(watched: list[psutil.Process]) -> tuple[float, float]:
    """CPU-seconds so far, user and system: of the gateway, of the proxies."""
    times = [sum(process.cpu_times()[:2]) for process in watched]
    return times[0], sum(times[1:])


def _wait_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 200 " in sock.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit("the gateway did not become healthy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument(
        "--rates",
        type=lambda text: [float(rate) for rate in text.split(",")],
        default=[1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 24000.0],
        help="tokens a second over all streams",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    parser.add_argument("--route", choices=("completions", "chat"), default="completions")
    parser.add_argument("--transport", choices=("unix", "tcp"), default="unix")
    parser.add_argument("--serve", action="store_true", help="behind Ray Serve and HAProxy")
    parser.add_argument("--tokenizer", help="checkpoint directory; default: one token a byte")
    args = parser.parse_args()
    rows = measure(args)
    print(f"{args.streams} streams of {args.route}, router over {args.transport}, no model")
    print(
        table(
            ["offered tok/s", "tok/s", "CPU-ms/tok", "proxy", "CPU share", "reads/tok"],
            [
                [
                    round(row["rate"]),
                    row["tokens_per_s"],
                    row["cpu_ms_per_token"],
                    row["proxy_cpu_ms_per_token"],
                    row["gateway_cpu_share"],
                    row["reads_per_token"],
                ]
                for row in rows
            ],
        )
    )
    kept_up = [row["rate"] for row in rows if row["tokens_per_s"] > 0.95 * row["rate"]]
    results = {
        "rows": rows,
        "worst_cpu_ms_per_token": max(
            row["cpu_ms_per_token"] + row["proxy_cpu_ms_per_token"] for row in rows
        ),
        "highest_tokens_per_s": max(row["tokens_per_s"] for row in rows),
        "kept_up_to_tokens_per_s": max(kept_up, default=None),
        "load_average": psutil.getloadavg()[0],
    }
    finish("http_path", vars(args), results)


if __name__ == "__main__":
    main()
