"""What HTTP costs: the gateway without a model behind it.

Three processes: a fake router that publishes one token a stream and step at a fixed rate, the
gateway (uvicorn), and a client that reads the server-sent events of all streams. Measured at
several rates: tokens per second that reach the client, the gateway's CPU-milliseconds per token
(user and system, requests included), and how late tokens are. Every token must arrive as a chunk
of its own; a run that loses one fails.

    python -m benchmarks.http_path [--streams 32] [--rates 1000,4000,6000] [--seconds 4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import selectors
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

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
        if order is None:
            break
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
    server.close()


def gateway_process(pipe: Connection, endpoint: dict[str, Any], model: str | None) -> None:
    """The real application under uvicorn."""
    import uvicorn

    from raymoe.gateway import AppConfig, GatewayTokenizer, RouterPool, create_app

    tokenizer = GatewayTokenizer.load(model) if model else byte_tokenizer()
    pool = RouterPool(
        lambda: [StreamEndpoint.from_dict(endpoint)],
        identity=IDENTITY,
        secret=SECRET,
        node="here",
    )
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    app = create_app(pool, tokenizer, AppConfig(model_name="bench"))
    pipe.send(sock.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[sock])


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
    counts: dict[socket.socket, int] = {}
    tails: dict[socket.socket, bytes] = {}
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(head + payload)
        selector.register(sock, selectors.EVENT_READ)
        counts[sock], tails[sock] = 0, b""
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
            # A marker may be cut by the end of a read: keep a tail too short to hold one.
            text = tails[sock] + data
            found = text.count(marker)
            if found:
                last = time.perf_counter()
                first = first or last
                counts[sock] += found
            tails[sock] = text[-(len(marker) - 1) :]
    return {"received": sum(counts.values()), "seconds": last - first, "reads": reads}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    router_pipe, router_end = context.Pipe()
    gateway_pipe, gateway_end = context.Pipe()
    router = context.Process(target=router_process, args=(router_end, args.transport), daemon=True)
    router.start()
    endpoint = router_pipe.recv()
    gateway = context.Process(
        target=gateway_process, args=(gateway_end, endpoint, args.tokenizer), daemon=True
    )
    gateway.start()
    port = gateway_pipe.recv()
    _wait_ready(port)
    process = psutil.Process(gateway.pid)
    rows = []
    try:
        for rate in [args.rates[0], *args.rates]:  # the first run warms up
            tokens = max(8, round(rate * args.seconds / args.streams))
            before = process.cpu_times()
            router_pipe.send((args.streams, args.streams / rate))
            seen = read_streams(port, args.streams, tokens, args.route)
            total = tokens * args.streams
            if seen["received"] != total:
                raise SystemExit(f"{seen['received']} of {total} tokens arrived as chunks")
            router_s = router_pipe.recv()
            after = process.cpu_times()
            cpu_s = after.user + after.system - before.user - before.system
            rows.append(
                {
                    "rate": rate,
                    "tokens": total,
                    "tokens_per_s": round(total / seen["seconds"]),
                    "cpu_ms_per_token": round(1000 * cpu_s / total, 4),
                    "gateway_cpu_share": round(cpu_s / seen["seconds"], 3),
                    "tokens_per_cpu_s": round(total / cpu_s) if cpu_s else None,
                    "writes_per_token": round(seen["reads"] / total, 3),
                    "behind_s": round(seen["seconds"] - router_s, 3),
                }
            )
    finally:
        router_pipe.send(None)
        gateway.terminate()
        gateway.join()
        router.join(5)
    return rows[1:]


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
    parser.add_argument("--tokenizer", help="checkpoint directory; default: one token a byte")
    args = parser.parse_args()
    rows = measure(args)
    print(f"{args.streams} streams of {args.route}, router over {args.transport}, no model")
    print(
        table(
            ["offered tok/s", "tok/s", "CPU-ms/tok", "CPU share", "reads/tok"],
            [
                [
                    round(row["rate"]),
                    row["tokens_per_s"],
                    row["cpu_ms_per_token"],
                    row["gateway_cpu_share"],
                    row["writes_per_token"],
                ]
                for row in rows
            ],
        )
    )
    kept_up = [row["rate"] for row in rows if row["tokens_per_s"] > 0.95 * row["rate"]]
    results = {
        "rows": rows,
        "worst_cpu_ms_per_token": max(row["cpu_ms_per_token"] for row in rows),
        "highest_tokens_per_s": max(row["tokens_per_s"] for row in rows),
        "kept_up_to_tokens_per_s": max(kept_up, default=None),
        "load_average": psutil.getloadavg()[0],
    }
    finish("http_path", vars(args), results)


if __name__ == "__main__":
    main()
