"""Tables reach every client, reports reach the controller, whoever restarts meanwhile."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.table import Table
from raymoe.client.stats import ClientStats
from raymoe.control import ClientReport, ControlClient, ControlServer
from raymoe.control.messages import FrameReader, pack
from raymoe.dispatch import Ints
from raymoe.errors import ConfigError, FrameError
from raymoe.links.handshake import Identity, Initiator
from raymoe.links.link import Endpoint
from raymoe.links.streams import shake_socket
from raymoe.table import GroupEndpoint, RoutingTable

SECRET = b"a secret of the tests only"
IDENTITY = Identity(deployment="test", fingerprint="f", wire_dtype="float32", hidden=8)
LAYERS, EXPERTS = 2, 3


def routing(epoch: int, term: int = 1) -> RoutingTable:
    resident = np.zeros((LAYERS, EXPERTS, 2), np.bool_)
    resident[:, :, epoch % 2] = True
    endpoint = Endpoint(kind="tcp", address="127.0.0.1:1", node="n")
    groups = ("a", "b")
    return RoutingTable(
        table=Table(
            term=term,
            epoch=epoch,
            group_ids=groups,
            resident=resident,
            share=resident.astype(np.float64),
            speed=np.ones(2),
            alpha_s=np.zeros(2),
            gamma_s=np.zeros(2),
        ),
        endpoints={
            g: GroupEndpoint(id=g, node="n", incarnation=epoch, endpoints=(endpoint,))
            for g in groups
        },
    )


class FakeClient:
    """Keeps the newest table; counts one pair of expert (0, 1) at every take."""

    def __init__(self) -> None:
        self.stats = ClientStats(batches=3)
        self.tables: list[RoutingTable] = []
        self.taken = 0

    @property
    def epoch(self) -> tuple[int, int] | None:
        return self.tables[-1].order if self.tables else None

    def set_table(self, table: RoutingTable) -> bool:
        if self.tables and table.order <= self.tables[-1].order:
            return False
        if table.table.resident.shape[0] != LAYERS:
            raise ConfigError("another shape")
        self.tables.append(table)
        return True

    def connected(self) -> tuple[str, ...]:
        return ("a",)

    def take_counts(self) -> Ints:
        self.taken += 1
        counts = np.zeros((LAYERS, EXPERTS), np.int64)
        counts[0, 1] = 1
        return counts

    def take_timings(self) -> dict[str, list[tuple[int, int, float]]]:
        return {"a": [(4, 2, 0.5)]}


class Rig:
    def __init__(self) -> None:
        self.servers: list[ControlServer] = []
        self.clients: list[ControlClient] = []

    def server(self, port: int = 0, **options: float) -> ControlServer:
        self.servers.append(ControlServer(IDENTITY, SECRET, port=port, **options))  # type: ignore[arg-type]
        return self.servers[-1]

    def client(self, name: str, **options: object) -> FakeClient:
        fake = FakeClient()
        named: dict = {
            "identity": IDENTITY,
            "secret": SECRET,
            "resolve": lambda: self.servers[-1].address,
            "interval_s": 0.02,
        }
        client = ControlClient(name=name, client=fake, **{**named, **options})
        self.clients.append(client)
        client.start()
        return fake


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = set(threading.enumerate())
    rig = Rig()
    yield rig
    for client in rig.clients:
        client.close()
        client.close()
    for server in rig.servers:
        server.close()
        server.close()
    wait_until(lambda: not {t for t in threading.enumerate() if t.is_alive()} - before)


def wait_until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_tables_reach_early_and_late_clients_and_are_acknowledged(rig: Rig) -> None:
    server = rig.server()
    early = rig.client("early")
    assert server.publish(routing(1))
    wait_until(lambda: early.epoch == (1, 1))
    late = rig.client("late")
    wait_until(lambda: late.epoch == (1, 1))
    wait_until(lambda: server.acknowledged() == {"early": (1, 1), "late": (1, 1)})
    assert server.publish(routing(2))
    wait_until(lambda: server.behind((1, 2)) == ())
    assert [t.order for t in early.tables] == [(1, 1), (1, 2)]
    sent, got = routing(2), early.tables[-1]
    assert (got.table.resident == sent.table.resident).all()
    assert (got.table.share == sent.table.share).all()
    assert got.endpoints == sent.endpoints


def test_older_tables_are_refused_at_both_ends(rig: Rig) -> None:
    server = rig.server()
    client = rig.client("c")
    assert server.publish(routing(5, term=3))
    assert not server.publish(routing(9, term=2))
    assert not server.publish(routing(5, term=3))
    wait_until(lambda: client.epoch == (3, 5))
    # an older controller thaws and the client is sent to it
    thawed = rig.server()
    thawed.publish(routing(99, term=2))
    server.close()
    wait_until(lambda: thawed.acknowledged() == {"c": (3, 5)})
    assert [t.order for t in client.tables] == [(3, 5)]
    assert thawed.behind((2, 99)) == ()


def test_reports_add_up_until_taken_and_survive_a_restart_of_the_controller(rig: Rig) -> None:
    server = rig.server()
    server.publish(routing(1))
    client = rig.client("c")
    total = np.zeros((LAYERS, EXPERTS), np.int64)

    def collect(source: ControlServer) -> int:
        for report in source.take_reports():
            assert report.name == "c"
            assert report.stats["batches"] == 3
            assert report.connected == ("a",)
            assert set(report.timings["a"]) == {(4, 2, 0.5)}
            if report.counts is not None:
                total.__iadd__(report.counts)
        return int(total[0, 1])

    wait_until(lambda: collect(server) >= 3)
    server.close()
    collect(server)
    time.sleep(0.05)
    again = rig.server()
    again.publish(routing(2))
    wait_until(lambda: client.epoch == (1, 2))
    before = collect(again)
    wait_until(lambda: collect(again) >= before + 2)
    rig.clients[0].close()
    wait_until(lambda: not again.acknowledged())
    collect(again)
    # one report may have been on its way to the controller that ended
    assert client.taken - 2 <= int(total[0, 1]) <= client.taken
    assert total.sum() == total[0, 1]


def test_what_resolve_raises_is_shown_and_tried_again(rig: Rig) -> None:
    server = rig.server()
    server.publish(routing(1))
    answers: list[Callable[[], tuple[str, int]]] = []

    def resolve() -> tuple[str, int]:
        if len(answers) < 2:
            answers.append(resolve)
            raise KeyError("no controller yet")
        return server.address

    client = rig.client("c", resolve=resolve)
    wait_until(lambda: "no controller yet" in (rig.clients[0].last_error or ""))
    wait_until(lambda: client.epoch == (1, 1))
    assert rig.clients[0].last_error is None


def test_a_silent_controller_is_looked_up_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = rig.server()
    frozen.publish(routing(1))
    client = rig.client("c")
    wait_until(lambda: client.epoch == (1, 1))
    monkeypatch.setattr(frozen, "_heard", lambda *_: None)  # it answers nothing any more
    better = rig.server()
    better.publish(routing(2))
    wait_until(lambda: client.epoch == (1, 2), limit_s=8)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """So many open ones that the next have numbers which select() cannot take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"at most {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for fd in opened:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_with_many_descriptors_gets_its_table(many_descriptors: None, rig: Rig) -> None:
    server = rig.server()
    server.publish(routing(1))
    client = rig.client("c")
    wait_until(lambda: client.epoch == (1, 1))
    wait_until(lambda: server.acknowledged() == {"c": (1, 1)})


def test_a_silent_client_is_dropped(rig: Rig) -> None:
    server = rig.server(lease_s=0.2)
    sock = socket.create_connection(server.address)
    with sock:
        shake_socket(sock, Initiator(IDENTITY, "router", SECRET, name="quiet"))
        wait_until(lambda: "quiet" in server.acknowledged())
        wait_until(lambda: "quiet" not in server.acknowledged())


@pytest.mark.parametrize("what", ["secret", "role", "deployment"])
def test_strangers_are_refused(rig: Rig, what: str) -> None:
    server = rig.server()
    if what == "role":
        sock = socket.create_connection(server.address)
        with sock, pytest.raises(Exception, match="role"):
            shake_socket(sock, Initiator(IDENTITY, "gateway", SECRET))
        return
    other = Identity(deployment="other", fingerprint="f", wire_dtype="float32", hidden=8)
    options = {"secret": b"not the right secret"} if what == "secret" else {"identity": other}
    rig.client("c", **options)
    wait_until(lambda: "HandshakeRefused" in (rig.clients[0].last_error or ""))
    assert server.acknowledged() == {}


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        pack({"report": {"name": "x"}}),
        pack({"hello": 1}),
        b"\x03\x00\x00\x00abc",
        b"\x01\x00\x00\x00\x07",
    ],
)
def test_garbage_ends_its_connection_only(rig: Rig, frame: bytes) -> None:
    server = rig.server()
    good = rig.client("good")
    sock = socket.create_connection(server.address)
    with sock:
        shake_socket(sock, Initiator(IDENTITY, "router", SECRET, name="bad"))
        wait_until(lambda: "bad" in server.acknowledged())
        sock.sendall(frame)
        sock.settimeout(5)
        assert sock.recv(100) == b""
    server.publish(routing(1))
    wait_until(lambda: good.epoch == (1, 1))


def test_a_table_of_another_shape_is_refused_and_named(rig: Rig) -> None:
    server = rig.server()
    client = rig.client("c")
    wrong = routing(1)
    resident = np.zeros((LAYERS + 1, EXPERTS, 2), np.bool_)
    table = Table(**{**wrong.table.__dict__, "resident": resident, "share": resident.astype(float)})
    server.publish(RoutingTable(table=table, endpoints=wrong.endpoints))
    wait_until(lambda: "another shape" in (rig.clients[0].last_error or ""))
    server.publish(routing(2))
    wait_until(lambda: client.epoch == (1, 2))


def test_a_port_in_use_is_named(rig: Rig) -> None:
    server = rig.server()
    with pytest.raises(ConfigError, match=str(server.address[1])):
        ControlServer(IDENTITY, SECRET, port=server.address[1])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 50))
def test_frames_survive_any_cutting(sizes: list[int], chunk: int) -> None:
    sent = [{"n": b"x" * size} for size in sizes]
    stream = b"".join(map(pack, sent))
    reader = FrameReader()
    got = [m for i in range(0, len(stream), chunk) for m in reader.feed(stream[i : i + chunk])]
    assert got == sent


def test_reports_survive_the_wire() -> None:
    report = ClientReport(
        name="c",
        counts=np.arange(6).reshape(2, 3),
        timings={"a": [(1, 2, 0.25)]},
        stats={"batches": 1},
        order=(1, 2),
        connected=("a",),
    )
    again = ClientReport.from_dict(msgpack.unpackb(msgpack.packb(report.to_dict())))
    assert again.counts is not None and report.counts is not None
    assert (again.counts == report.counts).all()
    assert (again.name, again.timings, again.stats, again.order, again.connected) == (
        report.name,
        report.timings,
        report.stats,
        report.order,
        report.connected,
    )
    with pytest.raises(FrameError):
        ClientReport.from_dict({**report.to_dict(), "counts": b"123"})
