"""The router's end against clients that behave and clients that do not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from raymoe.errors import (
    HandshakeRefused,
    Overloaded,
    PeerLost,
    RequestError,
    RouterUnavailable,
)
from raymoe.links.handshake import Identity, Initiator
from raymoe.links.streams import frame, shake_socket
from raymoe.requests import GenerationRequest, SamplingParams, TokenEvent
from raymoe.stream import ModelInfo, StreamClient, StreamConfig, StreamServer
from raymoe.stream.frames import encode
from raymoe.stream.messages import Submit

SECRET = b"0123456789abcdef0123456789abcdef"
IDENTITY = Identity(deployment="d", fingerprint="f")
MODEL = ModelInfo(name="m", vocab=10, context_tokens=8, kv_capacity_tokens=8)


class Engine:
    """Notes what the server tells it."""

    def __init__(self) -> None:
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.refuse: Exception | None = None

    def submit(self, request: GenerationRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(request)

    def cancel(self, request_ids: tuple[str, ...]) -> None:
        self.cancelled += request_ids


@contextmanager
def serving(config: StreamConfig | None = None) -> Iterator[tuple[StreamServer, Engine]]:
    engine = Engine()
    server = StreamServer(
        router_id="r0",
        model=MODEL,
        identity=IDENTITY,
        secret=SECRET,
        submitted=engine.submit,
        cancelled=engine.cancel,
        load=lambda: (len(engine.submitted), 5),
        node="n0",
        config=config or StreamConfig(heartbeat_s=0.05),
    )
    server.start()
    try:
        yield server, engine
    finally:
        server.close()


class Gateway:
    """A client and what it heard."""

    def __init__(self) -> None:
        self.frames: list[tuple[TokenEvent, ...]] = []
        self.lost: list[str] = []
        self.client: StreamClient | None = None

    async def connect(self, server: StreamServer, node: str = "n0", **options: object) -> Gateway:
        self.client = await StreamClient.connect(
            server.endpoint,
            node=node,
            on_events=self._heard,
            on_lost=self.lost.append,
            **{"identity": IDENTITY, "secret": SECRET, **options},  # type: ignore[arg-type]
        )
        return self

    def _heard(self, events: tuple[TokenEvent, ...]) -> None:
        if events:
            self.frames.append(events)

    @property
    def events(self) -> list[TokenEvent]:
        return [event for frame in self.frames for event in frame]


def request(request_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_ids=(1, 2), sampling=SamplingParams(seed=1)
    )


async def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


def wait_for(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize(("node", "unix", "tcp"), [("n0", True, None), ("n1", True, "127.0.0.1")])
def test_requests_in_and_one_frame_a_step_out(node: str, unix: bool, tcp: str | None) -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server, node)
        client = gateway.client
        assert client is not None
        assert client.hello.model == MODEL
        assert client.hello.router_id == "r0"
        assert client.hello.load.waiting == 5
        for name in "abc":
            client.submit(request(name))
        await until(lambda: len(engine.submitted) == 3)
        assert engine.submitted[0] == request("a")
        step = [TokenEvent(request_id=name, token_ids=(7,)) for name in "abc"]
        server.publish(step)
        server.publish([TokenEvent(request_id="a", token_ids=(8,), finish="stop")])
        server.publish([TokenEvent(request_id="a", token_ids=(9,))])  # ended: goes nowhere
        server.publish([TokenEvent(request_id="zz", token_ids=(9,))])
        server.publish([TokenEvent(request_id="b", token_ids=(9,))])
        await until(lambda: len(gateway.events) == 5)
        assert [len(frame) for frame in gateway.frames] == [3, 1, 1]
        assert gateway.frames[0] == tuple(step)
        client.cancel(("b", "a", "zz"))
        await until(lambda: engine.cancelled == ["b"])
        assert server.open_requests == 1
        client.close()
        await until(lambda: engine.cancelled == ["b", "c"])
        assert gateway.lost == []

    config = StreamConfig(unix=unix, tcp_host=tcp, heartbeat_s=0.05)
    with serving(config) as (server, engine):
        asyncio.run(talk(server, engine))


def test_each_gateway_gets_its_own_tokens_and_hears_of_the_others() -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        one, two = await Gateway().connect(server), await Gateway().connect(server)
        assert one.client is not None
        assert two.client is not None
        one.client.submit(request("a"))
        one.client.submit(request("b"))
        two.client.submit(request("c"))
        await until(lambda: server.open_requests == 3)
        server.publish([TokenEvent(request_id=name, token_ids=(1,)) for name in "abc"])
        await until(lambda: one.frames and two.frames)
        assert [event.request_id for event in one.events] == ["a", "b"]
        assert [event.request_id for event in two.events] == ["c"]
        assert one.client.load.others == 1
        assert two.client.load.others == 2
        two.client.cancel(("a",))  # not its own
        two.client.close()
        await until(lambda: engine.cancelled == ["c"])
        await until(lambda: one.client is not None and one.client.load.others == 0)

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def test_an_engine_that_refuses_ends_the_request_with_its_sentence() -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None
        errors = (
            Overloaded("too many"),
            RuntimeError("a bug"),
            RequestError("too long", "prompt"),
            RouterUnavailable("stopping"),
        )
        for count, error in enumerate(errors, 1):
            engine.refuse = error
            gateway.client.submit(request(str(error)))
            await until(lambda count=count: len(gateway.events) == count)  # type: ignore[misc]
        assert [(event.finish, event.error, event.error_kind) for event in gateway.events] == [
            ("error", "too many", "overloaded"),
            ("error", "a bug", None),
            ("error", "too long", "bad_request"),
            ("error", "stopping", "unavailable"),
        ]
        assert server.open_requests == 0

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def test_a_gateway_that_does_not_read_is_dropped_and_the_engine_never_waits() -> None:
    config = StreamConfig(max_pending_bytes=1 << 16, heartbeat_s=0.05)
    with serving(config) as (server, engine), _raw(server) as sock:
        sock.sendall(encode(Submit(request=request("slow"))))
        wait_for(lambda: server.open_requests == 1)
        events = [TokenEvent(request_id="slow", token_ids=tuple(range(2000)))]
        for _ in range(2000):  # megabytes: the kernel's buffers are smaller
            server.publish(events)
        wait_for(lambda: engine.cancelled == ["slow"])
        wait_for(lambda: server.gateways == 0)


def test_a_slow_reader_within_the_limit_gets_everything() -> None:
    with serving(StreamConfig(max_pending_bytes=64 << 20)) as (server, engine):

        async def talk() -> None:
            gateway = await Gateway().connect(server)
            assert gateway.client is not None
            gateway.client.submit(request("a"))
            await until(lambda: engine.submitted)
            sent = [
                TokenEvent(request_id="a", token_ids=tuple(range(i, i + 900))) for i in range(999)
            ]
            for event in sent:  # this loop does not read meanwhile
                server.publish([event])
            await until(lambda: len(gateway.frames) == len(sent))
            assert gateway.events == sent

        asyncio.run(talk())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"secret": b"another secret of 32 bytes......"}, "secret"),
        ({"identity": replace(IDENTITY, fingerprint="other")}, "fingerprint differs"),
        ({"identity": replace(IDENTITY, deployment="other")}, "deployment differs"),
    ],
)
def test_a_stranger_is_refused_by_name(change: dict[str, object], why: str) -> None:
    async def talk(server: StreamServer) -> None:
        with pytest.raises(HandshakeRefused, match=why):
            await Gateway().connect(server, **change)

    with serving() as (server, _):
        asyncio.run(talk(server))


def test_only_gateways_are_let_in() -> None:
    with (
        serving() as (server, _),
        _raw(server, shake=False) as sock,
        pytest.raises(HandshakeRefused, match="role 'group' is not accepted"),
    ):
        shake_socket(sock, Initiator(IDENTITY, "group", SECRET))


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"\x04\0\0\0null"])
def test_garbage_instead_of_a_handshake_closes_the_connection(data: bytes) -> None:
    with serving() as (server, engine), _raw(server, shake=False) as sock:
        sock.sendall(data)
        sock.settimeout(5)
        while sock.recv(4096):
            pass  # a refusal, then the end
        assert engine.submitted == []


@pytest.mark.parametrize("mac", ["\u00e9" * 64, "\ud800", None, []], ids=repr)
def test_a_strangers_strange_proof_ends_only_its_own_connection(mac: object) -> None:
    async def talk(server: StreamServer) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None

    with serving() as (server, _):
        with _raw(server, shake=False) as sock:
            sock.settimeout(5)
            sock.sendall(frame(Initiator(IDENTITY, "gateway", SECRET).start()))
            assert b"challenge" in sock.recv(4096)
            sock.sendall(frame(json.dumps({"proof": {"offer": {}, "mac": mac}}).encode()))
            said = b""
            while data := sock.recv(4096):
                said += data
            assert b"wrong secret" in said
        asyncio.run(talk(server))


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\0\0\0\xc1",
        b"\xff\xff\xff\xff",
        encode(Submit(request=request("twice"))) * 2,
    ],
)
def test_garbage_after_the_handshake_drops_the_gateway_and_its_requests(data: bytes) -> None:
    with serving() as (server, engine), _raw(server) as sock:
        sock.sendall(encode(Submit(request=request("a"))) + data)
        wait_for(lambda: "a" in engine.cancelled)
        wait_for(lambda: server.gateways == 0)


def test_a_mistake_that_a_gateway_finds_ends_only_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(body: bytes) -> None:
        raise TypeError("not thought of")

    async def talk(server: StreamServer) -> None:
        await Gateway().connect(server)

    with serving() as (server, _), _raw(server) as sock:
        with monkeypatch.context() as patch:
            patch.setattr("raymoe.stream.server.decode", broken)
            sock.sendall(encode(Submit(request=request("a"))))
            wait_for(lambda: server.gateways == 0)
        asyncio.run(talk(server))


def test_who_says_nothing_is_closed_and_strangers_are_capped() -> None:
    config = StreamConfig(handshake_timeout_s=0.3, max_unauthenticated=2, heartbeat_s=0.05)
    with serving(config) as (server, _):
        silent = [_dial(server) for _ in range(2)]
        time.sleep(0.05)
        third = _dial(server)
        for sock in (third, *silent):
            sock.settimeout(5)
            assert sock.recv(1) == b""
            sock.close()


def test_a_router_that_falls_silent_is_lost() -> None:
    async def talk(server: StreamServer) -> None:
        gateway = await Gateway().connect(server, silence_s=0.2)
        await until(lambda: gateway.lost)
        assert "silent" in gateway.lost[0]
        assert gateway.client is not None
        with pytest.raises(PeerLost):
            gateway.client.submit(request("a"))

    with serving(StreamConfig(heartbeat_s=60)) as (server, _):
        asyncio.run(talk(server))


def test_heartbeats_keep_an_idle_connection() -> None:
    async def talk(server: StreamServer) -> None:
        gateway = await Gateway().connect(server, silence_s=0.8)
        await asyncio.sleep(1.2)
        assert gateway.lost == []

    with serving() as (server, _):
        asyncio.run(talk(server))


def test_a_router_that_stops_is_lost_at_once_and_cancels() -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None
        gateway.client.submit(request("a"))
        await until(lambda: engine.submitted)
        await asyncio.to_thread(server.close)
        await until(lambda: gateway.lost)
        assert engine.cancelled == ["a"]
        with pytest.raises(PeerLost, match="r0"):
            await Gateway().connect(server)

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def test_a_draining_router_says_so() -> None:
    async def talk(server: StreamServer) -> None:
        gateway = await Gateway().connect(server)
        server.set_accepting(False)
        await until(lambda: gateway.client is not None and not gateway.client.load.accepting)

    with serving() as (server, _):
        asyncio.run(talk(server))


def test_a_leaving_router_gives_its_requests_away_those_that_still_come_too() -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None
        gateway.client.submit(request("a"))
        await until(lambda: server.open_requests == 1)
        server.publish([TokenEvent(request_id="a", token_ids=(7,))])
        server.give_away()
        await until(lambda: len(gateway.events) == 2)
        server.publish([TokenEvent(request_id="a", token_ids=(8,))])  # a step that was under way
        gateway.client.submit(request("b"))
        await until(lambda: len(gateway.events) == 3)
        assert [(e.request_id, e.token_ids, e.finish) for e in gateway.events] == [
            ("a", (7,), None),
            ("a", (), "cancelled"),
            ("b", (), "cancelled"),
        ]
        assert not gateway.client.load.accepting and gateway.lost == []
        assert engine.cancelled == ["a", "b"] and server.open_requests == 0

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def test_publish_from_many_threads_keeps_frames_whole() -> None:
    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None
        for name in "abcd":
            gateway.client.submit(request(name))
        await until(lambda: len(engine.submitted) == 4)

        def run(name: str) -> None:
            for i in range(300):
                server.publish([TokenEvent(request_id=name, token_ids=(i,) * 50)])

        threads = [threading.Thread(target=run, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        await until(lambda: len(gateway.events) == 1200)
        for name in "abcd":
            own = [event.token_ids[0] for event in gateway.events if event.request_id == name]
            assert own == list(range(300))

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def _dial(server: StreamServer) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect("\0" + str(server.endpoint.unix))
    return sock


@contextmanager
def _raw(server: StreamServer, shake: bool = True) -> Iterator[socket.socket]:
    """A connection without a client behind it, past the handshake or not."""
    with _dial(server) as sock:
        if shake:
            shake_socket(sock, Initiator(IDENTITY, "gateway", SECRET))
        yield sock


def test_a_step_too_large_for_a_frame_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log probabilities of long prompts; what fits no frame at all ends with an error."""
    monkeypatch.setattr("raymoe.stream.frames.MAX_FRAME_BYTES", 3000)

    async def talk(server: StreamServer, engine: Engine) -> None:
        gateway = await Gateway().connect(server)
        assert gateway.client is not None
        for name in "abc":
            gateway.client.submit(request(name))
        await until(lambda: len(engine.submitted) == 3)
        small = [TokenEvent(request_id=name, token_ids=(1000,) * 600) for name in "ab"]
        server.publish([*small, TokenEvent(request_id="c", token_ids=(1000,) * 2000)])
        await until(lambda: len(gateway.events) == 3)
        assert gateway.events[:2] == small
        assert gateway.events[2].finish == "error"
        assert "at most 3000" in str(gateway.events[2].error)
        assert engine.cancelled == ["c"]  # nobody would hear of its other tokens
        assert server.open_requests == 2

    with serving() as (server, engine):
        asyncio.run(talk(server, engine))


def test_one_frame_above_the_limit_of_unread_bytes_passes() -> None:
    config = StreamConfig(max_pending_bytes=1000, heartbeat_s=0.05)
    with serving(config) as (server, engine):

        async def talk() -> None:
            gateway = await Gateway().connect(server)
            assert gateway.client is not None
            gateway.client.submit(request("a"))
            await until(lambda: engine.submitted)
            large = TokenEvent(request_id="a", token_ids=tuple(range(500_000)))
            server.publish([large])
            await until(lambda: gateway.events)
            assert gateway.events == [large]

        asyncio.run(talk())


def test_a_gateway_that_stands_still_is_dropped_long_before_its_buffer_is_full() -> None:
    config = StreamConfig(stall_s=0.3, heartbeat_s=0.05)
    with serving(config) as (server, engine), _raw(server) as sock:
        sock.sendall(encode(Submit(request=request("still"))))
        wait_for(lambda: server.open_requests == 1)
        server.publish([TokenEvent(request_id="still", token_ids=tuple(range(400_000)))])
        wait_for(lambda: engine.cancelled == ["still"])
