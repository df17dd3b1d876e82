"""Expert groups in processes of their own, and the control end that tells engines of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from placement.table import Table
from raymoe.checkpoint.reader import read_spec
from raymoe.config import DeploymentConfig
from raymoe.control import ControlServer
from raymoe.identity import identity_of
from raymoe.table import GroupEndpoint, RoutingTable
from tests.vllm.group_process import NODE, SECRET, Held, serve


class Fleet:
    """Groups over one checkpoint. `publish` makes what is held the table of the next epoch."""

    def __init__(self, model: Path, held: dict[str, Callable[[int, int], bool]]) -> None:
        """`held`: of each group, whether it holds (layer, expert)."""
        self.spec = read_spec(model)
        self.secret_file: Path | None = None
        identity = identity_of(DeploymentConfig(model=str(model)), self.spec)
        self.control = ControlServer(identity, SECRET.encode())
        self.every = [
            (layer, expert)
            for layer, count in enumerate(self.spec.experts_of_layer)
            for expert in range(count)
        ]
        self.held = {g: {pair for pair in self.every if holds(*pair)} for g, holds in held.items()}
        self.epoch = 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.vllm.group_process"])
        self.processes: dict[str, Any] = {}
        self._pipes: dict[str, Connection] = {}
        for group_id, pairs in self.held.items():
            self._pipes[group_id], far = context.Pipe()
            process = context.Process(
                target=serve, args=(self.spec.to_json(), group_id, pairs, far), daemon=True
            )
            process.start()
            far.close()
            self.processes[group_id] = process
        self.endpoints: dict[str, GroupEndpoint] = {g: self._answer(g) for g in self._pipes}
        self.publish()

    def _answer(self, group_id: str) -> GroupEndpoint:
        assert self._pipes[group_id].poll(120), f"group {group_id} does not answer"
        endpoint = self._pipes[group_id].recv()
        assert isinstance(endpoint, GroupEndpoint)
        return endpoint

    def add(self, group_id: str, pairs: Held) -> None:
        """Have a group load more; it is not in the table before `publish`."""
        self._pipes[group_id].send(pairs)
        self._answer(group_id)
        self.held[group_id] |= set(pairs)

    def publish(self, **held: Held) -> None:
        """The next epoch: everything that is held, or for the groups named only that."""
        ids = tuple(sorted(self.held))
        resident = np.zeros((self.spec.layers, self.spec.experts, len(ids)), np.bool_)
        for g, group_id in enumerate(ids):
            for layer, expert in held.get(group_id, self.held[group_id]):
                resident[layer, expert, g] = True
        self.epoch += 1
        table = Table(
            term=1,
            epoch=self.epoch,
            group_ids=ids,
            resident=resident,
            share=resident / np.maximum(resident.sum(2, keepdims=True), 1),
            speed=np.full(len(ids), 1e6),
            alpha_s=np.zeros(len(ids)),
            gamma_s=np.zeros(len(ids)),
        )
        assert self.control.publish(RoutingTable(table=table, endpoints=self.endpoints))

    def wait_until_used(self) -> None:
        """Until every engine uses the latest table."""
        end = time.monotonic() + 60
        while not self.control.acknowledged() or self.control.behind((1, self.epoch)):
            assert time.monotonic() < end, self.control.acknowledged()
            time.sleep(0.01)

    def kill(self, group_id: str) -> None:
        """SIGKILL."""
        os.kill(self.processes[group_id].pid, signal.SIGKILL)
        self.processes[group_id].join()

    def settings(self, secret_file: Path, **more: Any) -> dict[str, Any]:
        """For `additional_config["raymoe"]`."""
        host, port = self.control.address
        secret_file.write_text(SECRET)
        return {
            "controller": f"{host}:{port}",
            "node": NODE,
            "secret_file": str(secret_file),
            **more,
        }

    def close(self) -> None:
        self.control.close()
        for process in self.processes.values():
            process.kill()
            process.join()
