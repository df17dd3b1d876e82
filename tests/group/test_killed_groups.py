"""Groups in processes of their own, over shared memory: killed and stopped under traffic."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
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
from raymoe.links.link import SlotTerms
from raymoe.links.server import ServerConfig
from raymoe.table import GroupEndpoint, RoutingTable
from tests.devices import DEVICES
from tests.group.small_model import (
    EXPERTS,
    HIDDEN,
    SECRET,
    TOP_K,
    identity,
    reference,
    write_checkpoint,
)


def serve(spec_json: str, group_id: str, device: str, pipe: Connection) -> None:
    """A process with one group that holds everything."""
    torch.set_num_threads(1)
    spec = ModelSpec.from_json(spec_json)
    config = ServerConfig(
        tcp_host=None, terms=SlotTerms(request_bytes=32 << 10, reply_bytes=32 << 10)
    )
    shard = ExpertShard(spec, 1 << 20, device)
    group = GroupRuntime(spec, group_id, 1, shard, identity(), SECRET, node="n", config=config)
    for layer, experts in enumerate(spec.experts_of_layer):
        for expert in range(experts):
            group.add_from_checkpoint(layer, expert)
    pipe.send(group.endpoint())
    pipe.recv()
    group.close()


@pytest.fixture
def fleet(
    tmp_path: Path, device: str
) -> Iterator[tuple[ModelSpec, dict[str, Any], dict[str, GroupEndpoint]]]:
    spec = write_checkpoint(tmp_path)
    if device == "cpu":
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.group.test_killed_groups"])  # torch is imported once
    else:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes, endpoints, pipes = {}, {}, {}
    for group_id in ("a", "b", "c"):
        pipes[group_id], far = context.Pipe()
        process = context.Process(
            target=serve, args=(spec.to_json(), group_id, device, far), daemon=True
        )
        process.start()
        far.close()
        processes[group_id] = process
    for group_id, pipe in pipes.items():
        assert pipe.poll(120)
        endpoints[group_id] = pipe.recv()
    yield spec, processes, endpoints
    for process in processes.values():
        process.kill()
        process.join()


@pytest.mark.parametrize("device", DEVICES)
def test_sums_stay_right_while_groups_are_killed_and_stopped(
    device: str,
    fleet: tuple[ModelSpec, dict[str, Any], dict[str, GroupEndpoint]],
) -> None:
    spec, processes, endpoints = fleet
    ids = tuple(endpoints)
    resident = np.zeros((spec.layers, spec.experts, len(ids)), np.bool_)
    for layer, experts in enumerate(spec.experts_of_layer):
        resident[layer, :experts] = True
    table = Table(
        term=1,
        epoch=1,
        group_ids=ids,
        resident=resident,
        share=resident / len(ids),
        speed=np.full(len(ids), 1e5),
        alpha_s=np.zeros(len(ids)),
        gamma_s=np.zeros(len(ids)),
    )
    config = ClientConfig(stall_limit_s=20.0, first_deadline_s=0.5)
    client = ExpertClient(identity(), SECRET, "n", config, name="router")
    generator = torch.Generator().manual_seed(1)
    slowest_s = 0.0
    signals = {20: ("a", signal.SIGKILL), 40: ("b", signal.SIGSTOP), 1040: ("b", signal.SIGCONT)}
    try:
        client.set_table(RoutingTable(table=table, endpoints=endpoints))
        wait_until(lambda: client.connected() == ids)
        before = {pid: segments(pid) for pid in (os.getpid(), processes["b"].pid)}
        assert min(before.values()) > 0
        for step in range(1060):
            layer = step % spec.layers
            x = torch.randn(30, HIDDEN, generator=generator)
            experts = torch.randint(0, EXPERTS - layer, (30, TOP_K), generator=generator)
            gates = torch.rand(30, TOP_K, generator=generator)
            began = time.monotonic()
            pending = client.dispatch(layer, x, experts, gates)
            if step in signals:
                group_id, number = signals[step]
                os.kill(processes[group_id].pid, number)
            out = client.combine(pending)
            slowest_s = max(slowest_s, time.monotonic() - began)
            if step % 8 == 0 or step in signals:
                expected = reference(spec, layer, x, experts, gates)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert client.stats.links_lost >= 2
        wait_until(lambda: client.connected() == ("b", "c"))
        assert slowest_s < 15
        # Shared memory of the links that were given up is gone at both ends.
        for pid, count in before.items():
            wait_until(lambda pid=pid, count=count: segments(pid) <= count)
    finally:
        client.close()


def segments(pid: int) -> int:
    """Pieces of shared memory that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "/memfd:" in line})


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
