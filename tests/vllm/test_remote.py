"""RemoteExperts without vLLM: slices of tensor-parallel ranks, names of layers, bad tables."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import ConfigError
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.remote import NOTHING, RemoteExperts
from raymoe.vllm_plugin.settings import PluginSettings
from tests.vllm.groups import Fleet
from tests.zoo import tiny_checkpoint


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = Path(tmp_path_factory.mktemp("checkpoint"))
    model = tiny_checkpoint("mixtral", folder)
    fleet = Fleet(model, {"a": lambda _, expert: expert < 5, "b": lambda _, expert: expert >= 5})
    yield fleet
    fleet.close()


def test_the_ranks_slices_add_up(fleet: Fleet, tmp_path: Path) -> None:
    settings = PluginSettings(**fleet.settings(tmp_path / "secret"))
    ranks = [RemoteExperts(fleet.spec, settings, rank=rank, ranks=3) for rank in range(3)]
    alone = RemoteExperts(fleet.spec, settings)
    try:
        wait_for_clients(fleet, 4)  # no two of one name
        draw = torch.Generator().manual_seed(1)
        for tokens in (7, 3, 1):
            x = torch.randn(tokens, fleet.spec.hidden, generator=draw)
            ids = torch.randint(0, 8, (tokens, 2), generator=draw).int()
            weights = torch.rand(tokens, 2, generator=draw)
            tickets = [rank.dispatch(1, x, ids, weights) for rank in ranks]  # all are out at once
            parts = [r.combine(t, x) for r, t in zip(ranks, tickets, strict=True)]
            whole = alone.combine(alone.dispatch(1, x, ids, weights), x)
            torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
            rows = [int(part.any(1).sum()) for part in parts]
            assert rows == {7: [3, 3, 1], 3: [1, 1, 1], 1: [1, 0, 0]}[tokens]
        assert tickets[1] == tickets[2] == NOTHING
    finally:
        for remote in (*ranks, alone):
            remote.close()
            remote.close()  # again does no harm


def wait_for_clients(fleet: Fleet, count: int) -> None:
    end = time.monotonic() + 60
    while len(fleet.control.acknowledged()) < count:
        assert time.monotonic() < end, fleet.control.acknowledged()
        time.sleep(0.01)
    fleet.wait_until_used()


def test_layers_go_by_the_number_of_their_block(fleet: Fleet, tmp_path: Path) -> None:
    settings = PluginSettings(**fleet.settings(tmp_path / "secret"))
    remote = RemoteExperts(fleet.spec, settings)
    try:
        assert [remote.layer_of(f"model.layers.{n}.block_sparse_moe.experts") for n in (0, 2)] == [
            0,
            2,
        ]
        with pytest.raises(ConfigError, match=r"layers\.3\.x is no MoE layer"):
            remote.layer_of("model.layers.3.x")
        with pytest.raises(ConfigError, match="no block number"):
            remote.layer_of("experts")
    finally:
        remote.close()


def run_worker(spec_json: str, settings: dict[str, Any]) -> None:
    """The process of a worker: ends only with its router."""
    RemoteExperts(ModelSpec.from_json(spec_json), PluginSettings(**settings))
    time.sleep(300)


def test_a_worker_ends_with_its_router(fleet: Fleet, tmp_path: Path) -> None:
    router = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    worker = None
    try:
        board = tmp_path / "board"
        board.mkdir()
        Board.create(board)
        (board / "router").write_text(str(router.pid))
        settings = fleet.settings(tmp_path / "secret", board=str(board), name="worker")
        worker = multiprocessing.get_context("spawn").Process(
            target=run_worker, args=(fleet.spec.to_json(), settings)
        )
        worker.start()
        end = time.monotonic() + 120
        while "worker" not in fleet.control.acknowledged():
            assert time.monotonic() < end and worker.is_alive()
            time.sleep(0.02)
        router.kill()
        worker.join(60)
        assert worker.exitcode == -signal.SIGTERM
    finally:
        router.kill()
        router.wait()
        if worker is not None:
            worker.kill()
            worker.join()
