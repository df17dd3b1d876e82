"""A group is stopped with a request half read and a reply half written, and goes on much later."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placement.table import Table
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.links import tcp
from raymoe.links.link import Endpoint, SlotTerms
from raymoe.links.server import ServerConfig
from raymoe.table import GroupEndpoint, RoutingTable
from tests.group.small_model import LAYERS, SECRET, identity, reference, write_checkpoint
from tests.group.test_group import check, draw
from tests.group.test_killed_groups import wait_until
from tests.group.valve import Valve

TERMS = SlotTerms(request_bytes=1 << 20, reply_bytes=1 << 20)
LARGE, SMALL = 4096, 6  # tokens: a reply of 256 KiB, and one of some hundred bytes
STEPS = 1000


def serve(spec_json: str, group_id: str, pipe: Connection) -> None:
    """A process with one group that holds everything, reached by TCP with small buffers: most of a
    large reply waits in the process."""
    torch.set_num_threads(1)
    tcp.BUFFER_BYTES = 16 << 10
    spec = ModelSpec.from_json(spec_json)
    config = ServerConfig(shm=False, terms=TERMS)
    shard = ExpertShard(spec, 1 << 20)
    group = GroupRuntime(spec, group_id, 1, shard, identity(), SECRET, node=group_id, config=config)
    for layer, experts in enumerate(spec.experts_of_layer):
        for expert in range(experts):
            group.add_from_checkpoint(layer, expert)
    pipe.send(group.endpoint())
    pipe.recv()
    group.close()


class Fleet:
    """Groups `far`, behind a valve, and `near`, each in a process of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.group.test_stopped_midway"])
        self.processes: dict[str, Any] = {}
        self._pipes: dict[str, Connection] = {}
        for name in ("far", "near"):
            self._pipes[name], other_end = context.Pipe()
            process = context.Process(
                target=serve, args=(spec.to_json(), name, other_end), daemon=True
            )
            process.start()
            other_end.close()
            self.processes[name] = process
        endpoints: dict[str, GroupEndpoint] = {}
        for name, pipe in self._pipes.items():
            assert pipe.poll(120)
            endpoints[name] = pipe.recv()
        (address,) = (e.address for e in endpoints["far"].endpoints)
        self.valve = Valve(address)
        behind = Endpoint(kind="tcp", address=self.valve.address, node="elsewhere")
        endpoints["far"] = replace(endpoints["far"], endpoints=(behind,))
        resident = np.zeros((spec.layers, spec.experts, 2), np.bool_)
        for layer, experts in enumerate(spec.experts_of_layer):
            resident[layer, :experts] = True
        speed = np.array([1e7, 1e4])  # so nearly everything goes to `far`
        table = Table(
            term=1,
            epoch=1,
            group_ids=("far", "near"),
            resident=resident,
            share=resident * speed / speed.sum(),
            speed=speed,
            alpha_s=np.zeros(2),
            gamma_s=np.zeros(2),
        )
        self.routing = RoutingTable(table=table, endpoints=endpoints)

    def close(self) -> None:
        self.valve.close()
        for process in self.processes.values():
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return write_checkpoint(Path(tmp_path_factory.mktemp("experts")))


@pytest.fixture
def fleet(spec: ModelSpec) -> Iterator[Fleet]:
    made = Fleet(spec)
    yield made
    made.close()


def descriptors(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_stopped_in_the_middle_of_a_request_and_of_a_reply(spec: ModelSpec, fleet: Fleet) -> None:
    valve, pid = fleet.valve, fleet.processes["far"].pid
    config = ClientConfig(
        message_tokens=LARGE, first_deadline_s=10.0, deadline_floor_s=3.0, stall_limit_s=60.0
    )
    client = ExpertClient(identity(), SECRET, "here", config, name="router")
    try:
        client.set_table(fleet.routing)
        wait_until(lambda: client.connected() == ("far", "near"))
        check(client, spec, LARGE, 0, seed=0)
        up, down = valve.up.passed, valve.down.passed
        check(client, spec, LARGE, 0, seed=1)
        up, down = valve.up.passed - up, valve.down.passed - down
        assert min(up, down) > 250_000, "both are larger than what kernels hold here"
        ours, its, threads = descriptors("self"), descriptors(pid), threading.active_count()

        valve.down.hold(down // 2)
        first = draw(LARGE, 0, seed=2)
        replying = client.dispatch(0, *first)
        wait_until(lambda: valve.down.shut)
        valve.up.hold(up // 2)
        second = draw(LARGE, 1, seed=3)
        asking = client.dispatch(1, *second)
        wait_until(lambda: valve.up.shut)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: stopped(pid))
        assert down // 2 + valve.drain() < down, "the process still has a part of its reply"

        for layer, batch, pending in ((0, first, replying), (1, second, asking)):
            out = client.combine(pending)
            torch.testing.assert_close(out, reference(spec, layer, *batch), rtol=1e-4, atol=1e-5)
        assert client.stats.deadlines >= 1, "its link was given up, with both"
        answered = client.stats.answers["far"]
        for step in range(STEPS):
            check(client, spec, SMALL, step % LAYERS, seed=100 + step)
        assert client.stats.answers["far"] == answered
        assert "far" not in client.connected()

        os.kill(pid, signal.SIGCONT)
        valve.release()
        for step in range(50):  # while the rest of the old reply comes
            check(client, spec, SMALL, step % LAYERS, seed=2000 + step)
        wait_until(lambda: client.connected() == ("far", "near"))
        assert valve.connections >= 2, "a new link, never the old one"
        for step in range(50):
            check(client, spec, LARGE if step % 25 == 0 else SMALL, step % LAYERS, seed=3000 + step)
        assert client.stats.answers["far"] > answered
        # the old link's socket, slots and half a request are gone at both ends
        wait_until(lambda: descriptors(pid) <= its)
        wait_until(lambda: descriptors("self") <= ours)
        wait_until(lambda: threading.active_count() <= threads)
    finally:
        os.kill(pid, signal.SIGCONT)
        client.close()
