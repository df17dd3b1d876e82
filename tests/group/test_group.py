"""Groups without Ray: what they compute, refuse, copy and report."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placement.table import Table
from raymoe.checkpoint.record import ExpertRecord, load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.copying import Sender, fetch_record
from raymoe.errors import CheckpointError, ConfigError, ExpertsUnavailable, PeerLost
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.speed import GroupSpeed, fit_speed
from raymoe.table import RoutingTable
from tests.devices import DEVICES
from tests.group.small_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SECRET,
    TOP_K,
    identity,
    make_group,
    reference,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return write_checkpoint(Path(tmp_path_factory.mktemp("experts")))


@pytest.fixture
def make(spec: ModelSpec) -> Iterator[Callable[..., GroupRuntime]]:
    groups: list[GroupRuntime] = []

    def build(group_id: str, **options: object) -> GroupRuntime:
        groups.append(make_group(spec, group_id, **options))
        return groups[-1]

    yield build
    for group in groups:
        group.close()


def table_of(groups: list[GroupRuntime], epoch: int = 1) -> RoutingTable:
    resident = np.stack([group.shard.resident() for group in groups], axis=2)
    table = Table(
        term=1,
        epoch=epoch,
        group_ids=tuple(group.id for group in groups),
        resident=resident,
        share=resident / np.maximum(resident.sum(2, keepdims=True), 1),
        speed=np.full(len(groups), 1e6),
        alpha_s=np.zeros(len(groups)),
        gamma_s=np.zeros(len(groups)),
    )
    return RoutingTable(table=table, endpoints={group.id: group.endpoint() for group in groups})


def make_client(**config: object) -> ExpertClient:
    # no deadline strikes here, however busy the machine: a message computed twice counts twice
    options = {"stall_limit_s": 5.0, "deadline_floor_s": 10.0, "reconnect_s": (0.005, 0.05)}
    settings = ClientConfig(**{**options, **config})
    return ExpertClient(identity(), SECRET, "n", settings, name="router")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def draw(tokens: int, layer: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.randint(0, EXPERTS - layer, (tokens, TOP_K), generator=generator),
        torch.rand(tokens, TOP_K, generator=generator),
    )


def check(client: ExpertClient, spec: ModelSpec, tokens: int, layer: int, seed: int) -> None:
    batch = draw(tokens, layer, seed)
    out = client.combine(client.dispatch(layer, *batch))
    torch.testing.assert_close(out, reference(spec, layer, *batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["partial", "rows"])
def test_two_groups_compute_the_layers(
    spec: ModelSpec, make: Callable[..., GroupRuntime], mode: str, device: str
) -> None:
    a, b = make("a", device=device), make("b", device=device)
    for layer in range(LAYERS):
        for expert in range(EXPERTS - layer):
            (a if expert % 2 else b).add_from_checkpoint(layer, expert)
    b.add_from_checkpoint(0, 1)
    client = make_client(mode=mode)
    try:
        client.set_table(table_of([a, b]))
        assert a.served_since is None
        began = time.time()
        for seed, tokens in enumerate((1, 3, 50, 400)):  # 400: several messages
            check(client, spec, tokens, seed % LAYERS, seed)
        counts = client.take_counts()
        wait_until(lambda: (a.report().counts + b.report().counts == counts).all())
        assert counts.sum() == (1 + 3 + 50 + 400) * TOP_K
        assert a.report().busy_s > 0
        assert a.report().samples
        assert a.served_since is not None and began <= a.served_since <= time.time()
    finally:
        client.close()


@pytest.mark.parametrize("device", DEVICES)
def test_two_clients_share_a_group_and_their_messages_merge(
    spec: ModelSpec, make: Callable[..., GroupRuntime], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    group = make("a", slowdown=5.0, device=device)
    for expert in range(EXPERTS):
        group.add_from_checkpoint(0, expert)
    merged: list[int] = []
    together = GroupRuntime._serve_together

    def spy(self: GroupRuntime, requests: list) -> None:
        merged.append(len(requests))
        together(self, requests)

    monkeypatch.setattr(GroupRuntime, "_serve_together", spy)
    clients = [make_client(mode=mode) for mode in ("partial", "partial", "rows", "rows")]
    try:
        failures: list[BaseException] = []

        def work(client: ExpertClient, offset: int) -> None:
            try:
                client.set_table(table_of([group]))
                for seed in range(30):
                    check(client, spec, 4, 0, offset + seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(c, 100 * i)) for i, c in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert max(merged) > 1
        wait_until(lambda: group.report().counts.sum() == 4 * 30 * 4 * TOP_K)
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("device", DEVICES)
def test_missing_experts_are_refused_and_found_elsewhere(
    spec: ModelSpec, make: Callable[..., GroupRuntime], device: str
) -> None:
    a, b = make("a", device=device), make("b", device=device)
    for expert in range(EXPERTS):
        a.add_from_checkpoint(0, expert)
        b.add_from_checkpoint(0, expert)
    client = make_client()
    try:
        client.set_table(table_of([a, b]))
        a.drop(0, 2)
        for seed in range(4):
            check(client, spec, 20, 0, seed)
        assert client.stats.nacks >= 1
        wait_until(lambda: client.stats.nacks == a.report().nacks)
    finally:
        client.close()


def test_an_error_inside_compute_fails_the_message_not_the_group(
    spec: ModelSpec, make: Callable[..., GroupRuntime], caplog: pytest.LogCaptureFixture
) -> None:
    class Moody(ExpertShard):
        fail = True

        def compute(self, *args: object, **named: object) -> list[int]:
            if self.fail:
                raise RuntimeError("out of memory")
            return super().compute(*args, **named)  # type: ignore[arg-type]

    shard = Moody(spec, 1 << 20)
    group = make("a", shard=shard)
    for expert in range(EXPERTS):
        group.add_from_checkpoint(0, expert)
    client = make_client(stall_limit_s=0.1)
    try:
        client.set_table(table_of([group]))
        with caplog.at_level(logging.CRITICAL), pytest.raises(ExpertsUnavailable):
            check(client, spec, 2, 0, 0)
        assert "out of memory" in client.stats.last_error
        shard.fail = False
        check(client, spec, 2, 0, 0)
        wait_until(lambda: group.report().errors >= 1)
    finally:
        client.close()


def test_a_mistake_between_two_messages_does_not_end_the_group(
    spec: ModelSpec,
    make: Callable[..., GroupRuntime],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    group = make("a")
    for expert in range(EXPERTS):
        group.add_from_checkpoint(0, expert)
    failed = threading.Event()

    def broken(*_: object) -> None:
        failed.set()
        raise RuntimeError("not thought of")

    client = make_client()
    try:
        client.set_table(table_of([group]))
        with caplog.at_level(logging.CRITICAL), monkeypatch.context() as patch:
            patch.setattr(group, "_tally", broken)
            check(client, spec, 2, 0, 0)
            assert failed.wait(5)
        check(client, spec, 2, 0, 0)
    finally:
        client.close()


def test_slowdown_takes_so_many_times_as_long(make: Callable[..., GroupRuntime]) -> None:
    group = make("a", slowdown=4.0)
    work = group._begin()
    while time.thread_time_ns() - work.cpu_ns < 20_000_000:
        pass
    group._slow_down(work)  # in the middle: not twice for the same
    busy_ns = group._end(work)
    assert busy_ns >= 4 * 0.02e9 and time.perf_counter_ns() - work.began_ns >= busy_ns
    with pytest.raises(ConfigError, match="slowdown"):
        make("b", slowdown=0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_replica_is_copied_from_a_peer_while_both_serve(
    spec: ModelSpec, make: Callable[..., GroupRuntime], device: str
) -> None:
    a, b = make("a", device=device), make("b", device=device)
    for expert in range(EXPERTS):
        a.add_from_checkpoint(0, expert)
    client = make_client()
    try:
        client.set_table(table_of([a]))
        check(client, spec, 5, 0, 0)
        for expert in range(EXPERTS):
            b.add_from_peer(0, expert, a.endpoint())
            b.add_from_peer(0, expert, a.endpoint())  # repeated: nothing happens
        client.set_table(table_of([b], epoch=2))
        check(client, spec, 5, 0, 1)
        wait_until(lambda: b.report().counts.sum() == 5 * TOP_K)
        with pytest.raises(CheckpointError, match="not here"):
            b.add_from_peer(1, 0, a.endpoint())
    finally:
        client.close()


def test_a_copy_over_budget_changes_nothing(
    spec: ModelSpec, make: Callable[..., GroupRuntime]
) -> None:
    a, b = make("a"), make("b", budget_bytes=spec.expert_bytes[0])
    for expert in range(2):
        a.add_from_checkpoint(0, expert)
    b.add_from_peer(0, 0, a.endpoint())
    with pytest.raises(ConfigError, match="budget"):
        b.add_from_peer(0, 1, a.endpoint())
    assert b.report().resident_bytes == spec.expert_bytes[0]


class Broken:
    """Streams to a sender; each is cut after so many bytes, or has one byte changed."""

    def __init__(self, records: OneRecord, cuts: list[int | None], flip: bool = False) -> None:
        self.sender, self.cuts, self.flip = Sender(records), cuts, flip
        self.asked: list[bytes] = []

    def open(self) -> socket.socket:
        ours, proxy = socket.socketpair()
        theirs, far = socket.socketpair()
        cut = self.cuts.pop(0)
        threading.Thread(target=self.sender.serve, args=(far,), daemon=True).start()
        threading.Thread(target=self._pump, args=(proxy, theirs, cut), daemon=True).start()
        return ours

    def _pump(self, proxy: socket.socket, theirs: socket.socket, cut: int | None) -> None:
        request = proxy.recv(4096)
        self.asked.append(request)
        theirs.sendall(request)
        sent = 0
        with proxy, theirs:
            while data := theirs.recv(500):
                if cut is not None:
                    data = data[: cut - sent]
                if self.flip and sent:
                    data = bytes([data[0] ^ 1]) + data[1:]
                sent += len(data)
                try:
                    proxy.sendall(data)
                except OSError:
                    return
                if sent == cut:
                    return


class OneRecord:
    def __init__(self, record: ExpertRecord) -> None:
        self.held = record

    def record(self, layer: int, expert: int) -> ExpertRecord | None:
        return self.held if (layer, expert) == (0, 1) else None


def test_a_broken_copy_resumes_where_it_broke(spec: ModelSpec) -> None:
    record = load_expert(spec, 0, 1)
    broken = Broken(OneRecord(record), [700, 900, None])
    copy = fetch_record(broken.open, 0, 1, max_bytes=1 << 20)
    assert copy.checksum == record.checksum
    assert all(torch.equal(copy.tensors[k], record.tensors[k]) for k in record.tensors)
    offsets = [json.loads(ask[4:])["offset"] for ask in broken.asked]
    assert offsets[0] == 0 < offsets[1] < offsets[2] < record.nbytes


def test_a_copy_that_never_gets_through_is_given_up(spec: ModelSpec) -> None:
    broken = Broken(OneRecord(load_expert(spec, 0, 1)), [700, 300, 300])
    with pytest.raises(PeerLost):
        fetch_record(broken.open, 0, 1, max_bytes=1 << 20)


def test_a_damaged_copy_is_refused(spec: ModelSpec) -> None:
    broken = Broken(OneRecord(load_expert(spec, 0, 1)), [None], flip=True)
    with pytest.raises(CheckpointError, match="damaged"):
        fetch_record(broken.open, 0, 1, max_bytes=1 << 20)


def test_an_oversized_offer_is_refused_before_memory_is_taken(spec: ModelSpec) -> None:
    broken = Broken(OneRecord(load_expert(spec, 0, 1)), [None])
    with pytest.raises(CheckpointError, match="expected up to 100"):
        fetch_record(broken.open, 0, 1, max_bytes=100)


def test_a_copy_obeys_its_rate(spec: ModelSpec) -> None:
    record = load_expert(spec, 0, 1)
    broken = Broken(OneRecord(record), [None])
    started = time.monotonic()
    fetch_record(broken.open, 0, 1, max_bytes=1 << 20, limit_bytes_per_s=record.nbytes / 0.2)
    assert time.monotonic() - started > 0.15


class Wide:
    """A record of 6 MB, more than the buffers of a socket pair hold."""

    def __init__(self) -> None:
        self.held = ExpertRecord(tensors={"up": torch.arange(1_500_000, dtype=torch.float32)})

    def record(self, layer: int, expert: int) -> ExpertRecord | None:
        return self.held


def test_a_slow_receiver_is_waited_for_as_long_as_it_takes_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sender's time limit is for the next bytes, not for the whole of a large expert."""
    monkeypatch.setattr("raymoe.copying.SEND_TIMEOUT_S", 0.5)
    records = Wide()
    ours, far = socket.socketpair()
    threading.Thread(target=Sender(records).serve, args=(far,), daemon=True).start()
    copy = fetch_record(
        lambda: ours, 0, 1, max_bytes=1 << 23, limit_bytes_per_s=4e6, attempts=1
    )  # 1.5 s
    assert copy.checksum == records.held.checksum


def test_a_connection_that_breaks_is_resumed_while_it_brings_something() -> None:
    records = Wide()
    cuts: list[int | None] = [1_200_000, 1_200_000, 1_200_000, 1_200_000, None]
    copy = fetch_record(Broken(records, cuts).open, 0, 1, max_bytes=1 << 23)
    assert copy.checksum == records.held.checksum


def test_a_busy_sender_is_asked_again_and_gives_urgent_copies_at_once(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymoe.copying._TURN_S", 0.01)
    taken, release = threading.Event(), threading.Event()

    class Slow(OneRecord):
        def record(self, layer: int, expert: int) -> ExpertRecord | None:
            if not taken.is_set():  # the first one takes its time
                taken.set()
                release.wait(30)
            return super().record(layer, expert)

    sender = Sender(Slow(load_expert(spec, 0, 1)), most=1)

    def connect() -> socket.socket:
        ours, far = socket.socketpair()
        threading.Thread(target=sender.serve, args=(far,), daemon=True).start()
        return ours

    def fetch(**options: Any) -> ExpertRecord:
        return fetch_record(connect, 0, 1, max_bytes=1 << 20, **options)

    results: list[ExpertRecord] = []
    first = threading.Thread(target=lambda: results.append(fetch(limit_bytes_per_s=1e9)))
    first.start()
    assert taken.wait(30)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert len(results) == 0
        if len(waits) == 2:
            assert fetch().checksum == sender._records.held.checksum  # type: ignore[attr-defined]
            release.set()
            first.join(30)
            results.clear()

    fetch(limit_bytes_per_s=1e9, wait=wait)
    assert len(waits) >= 2

    monkeypatch.setattr("raymoe.copying.BUSY_LIMIT_S", 0.0)
    sender._turns.acquire()
    with pytest.raises(PeerLost, match="busy"):
        fetch(limit_bytes_per_s=1e9)


def test_a_copy_is_broken_off_by_its_wait(spec: ModelSpec) -> None:
    record = load_expert(spec, 0, 1)

    class Stopped(Exception):
        pass

    def end(seconds: float) -> None:
        raise Stopped

    broken = Broken(OneRecord(record), [None])
    with pytest.raises(Stopped):
        fetch_record(broken.open, 0, 1, max_bytes=1 << 20, limit_bytes_per_s=1e3, wait=end)


class Interruptible(ExpertShard):
    """Calls `between` once in the middle of a message, as the compiled kernel does."""

    def compute(self, *arguments: Any) -> list[int]:
        *arguments, between = arguments
        missing = super().compute(*arguments)
        if between is not None:
            between()
        return missing


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_small_messages_pass_a_large_one_by(
    spec: ModelSpec, make: Callable[..., GroupRuntime], slowdown: float
) -> None:
    shard = Interruptible(spec, sum(spec.expert_bytes) * spec.experts)
    group = make("a", shard=shard, slowdown=slowdown)
    for expert in range(EXPERTS):
        group.add_from_checkpoint(0, expert)
    begun, small_done = threading.Event(), threading.Event()
    serve_small = group._serve_small

    def in_the_middle(work: Any) -> None:
        begun.set()
        while not small_done.wait(0.002):
            serve_small(work)
        time.sleep(0.1)

    group._serve_small = in_the_middle  # type: ignore[method-assign]
    one, other = make_client(), make_client()
    try:
        one.set_table(table_of([group]))
        other.set_table(table_of([group]))
        large = threading.Thread(target=check, args=(one, spec, 200, 0, 1))
        large.start()
        assert begun.wait(30)
        check(other, spec, 3, 0, 2)
        assert large.is_alive()  # it is answered after the small one
        small_done.set()
        large.join(30)
        wait_until(lambda: group.report().messages == 2)
        report = group.report()
        assert report.pairs == 203 * TOP_K and report.nacks == report.errors == 0
        small, whole = report.samples  # of each its own time
        assert small[0] == 3 * TOP_K and whole[0] == 200 * TOP_K
        assert report.busy_s == pytest.approx(small[2] + whole[2])
    finally:
        small_done.set()
        one.close()
        other.close()


def test_close_ends_every_thread(spec: ModelSpec) -> None:
    before = set(threading.enumerate())
    group = make_group(spec, "closing")
    group.add_from_checkpoint(0, 0)
    client = make_client()
    client.set_table(table_of([group]))
    client.close()
    started = time.monotonic()
    group.close()
    group.close()
    assert time.monotonic() - started < 2
    left = {thread for thread in threading.enumerate() if thread.is_alive()} - before
    assert not left


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_group_is_replaced_by_its_next_incarnation(
    spec: ModelSpec, make: Callable[..., GroupRuntime], device: str
) -> None:
    a = make("a", device=device)
    for expert in range(EXPERTS):
        a.add_from_checkpoint(0, expert)
    client = make_client()
    try:
        client.set_table(table_of([a]))
        check(client, spec, 3, 0, 0)
        a.close()
        pending = client.dispatch(0, *(batch := draw(6, 0, 1)))
        again = make("a", incarnation=2, device=device)
        for expert in range(EXPERTS):
            again.add_from_checkpoint(0, expert)
        client.set_table(table_of([again], epoch=2))
        torch.testing.assert_close(
            client.combine(pending), reference(spec, 0, *batch), rtol=1e-4, atol=1e-5
        )
    finally:
        client.close()


@pytest.mark.parametrize("device", DEVICES)
def test_measured_speed_is_positive_and_slowdown_shows(
    spec: ModelSpec, make: Callable[..., GroupRuntime], device: str
) -> None:
    group = make("a", device=device)
    speed = group.measure_speed(seconds=0.05)
    assert speed.pairs_per_s > 0
    assert speed.alpha_s >= 0 and speed.gamma_s >= 0
    assert not group.report().resident.any()  # nothing was left behind


def test_time_that_others_had_the_core_is_not_measured(
    spec: ModelSpec, make: Callable[..., GroupRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ExpertShard.compute

    def off_the_core(*arguments: Any) -> list[int]:
        time.sleep(0.02)
        return compute(*arguments)

    monkeypatch.setattr(ExpertShard, "compute", off_the_core)
    assert make("a").measure_speed(seconds=0).seconds(8, 2) < 0.01


def test_fit_finds_the_terms_it_was_made_of() -> None:
    true = GroupSpeed(alpha_s=1e-3, pairs_per_s=2e5, gamma_s=4e-4)
    rng = np.random.default_rng(0)
    shapes = [(int(n), int(a)) for n, a in rng.integers([8, 1], [500, 8], (60, 2))]
    samples = [(n, a, true.seconds(n, a) * rng.normal(1, 0.01)) for n, a in shapes]
    fitted = fit_speed(samples)
    assert fitted is not None
    assert fitted.pairs_per_s == pytest.approx(2e5, rel=0.1)
    assert fitted.gamma_s == pytest.approx(4e-4, rel=0.1)
    assert fitted.alpha_s == pytest.approx(1e-3, rel=0.15)
    assert fit_speed(samples[:2]) is None
    noise_only = fit_speed([(n, 1, n / 1e6) for n in (1, 2, 4, 8)])
    assert noise_only is not None
    assert noise_only.alpha_s == pytest.approx(0, abs=1e-9)
    assert noise_only.gamma_s == pytest.approx(0, abs=1e-9)
