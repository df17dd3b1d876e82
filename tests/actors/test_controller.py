"""The controller's shell on a scripted cluster: what it answers, tells Ray's agents, and logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors import controller as module
from actors.controller import PlacementController
from actors.ray_metrics import RayMetrics
from raymoe.client.stats import ClientStats
from raymoe.config import load_config
from raymoe.engine.stats import EngineStats
from tests.actors.fake_cluster import FakeCalls, FakeCluster, FakeMemory
from tests.group.small_model import write_checkpoint

LIMIT_S = 60.0


class Answering(FakeCalls):
    """Groups answer whenever the controller waits."""

    def __init__(self, cluster: FakeCluster) -> None:
        super().__init__()
        self._cluster = cluster

    def wait(self, timeout_s: float) -> None:
        for process in list(self._cluster.processes.values()):
            process.answer()
        time.sleep(0.002)
        super().wait(timeout_s)


class Forgetful(FakeMemory):
    def forget(self) -> None:
        return None


class Gauge:
    """As ray.util.metrics' Gauge and Counter."""

    told: dict[str, float]

    def __init__(self, name: str, told: dict[str, float]) -> None:
        self._name, self._told = name, told

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._told[self._name] = value

    inc = set


@pytest.fixture
def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[PlacementController, dict[str, float], Path]]:
    """A controller whose three groups have all experts; what Ray's agents were told; its logs."""
    (tmp_path / "model").mkdir()
    spec = write_checkpoint(tmp_path / "model")
    logs = tmp_path / "logs"
    size = max(spec.expert_bytes)
    config = load_config(
        None,
        {
            "model": spec.path,
            "groups": [{"count": 3, "memory_bytes": 8 * size}],
            "placement": {"reserve_experts": 0, "interval_s": 0.05},
            "logging": {"format": "json", "folder": str(logs)},
        },
    )
    cluster = FakeCluster(spec)
    cluster.calls = Answering(cluster)
    told: dict[str, float] = {}
    monkeypatch.setenv("RAYMOE_SECRET", "s" * 32)
    monkeypatch.setattr(module, "Memory", lambda name, head: Forgetful(cluster))
    monkeypatch.setattr(module, "RayCluster", lambda head: cluster)
    metrics = RayMetrics("d", lambda kind, name, text, keys: Gauge(name, told))
    monkeypatch.setattr(module, "RayMetrics", lambda name: metrics)
    made = PlacementController(config.model_dump(mode="json"), spec.to_json())
    until(lambda: made.status()["ready"])
    yield made, told, logs
    made.stop()


def until(true: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_controller_answers(
    running: tuple[PlacementController, dict[str, float], Path],
) -> None:
    controller, told, logs = running
    answer = controller.dry_run({"horizon_s": 30.0, "margin": None, "without": ["g1"]})
    assert answer["owed"] > 0 and answer["horizon_s"] == 30 and json.dumps(answer)
    assert "no group 'g9'" in controller.dry_run({"without": ["g9"]})["error"]
    assert controller.dry_run({})["helps"] is False, "no traffic was seen"
    beat = controller.exchange("a", {}, None)
    assert beat.keys() == {"entries", "live", "settled"}, "nobody looks"
    assert {"status", "shown"} <= controller.exchange("a", {}, False).keys()
    until(lambda: controller.view(0, 0.0, [0], False)["layer_count"] == 2)
    until(lambda: told.get("raymoe_group_up") == 1 and told.get("raymoe_ready") == 1)
    assert told["raymoe_controller_up"] == 1

    def lines() -> list[dict[str, Any]]:
        (file,) = logs.glob("controller-*.log")
        return [json.loads(line) for line in file.read_text().splitlines()]

    controller.drain("g1")
    until(lambda: any(line.get("event") == "group" for line in lines()))
    assert all(line["process"] == "controller" and line["term"] == 1 for line in lines())
    assert lines()[-1]["epoch"] >= 1


def test_a_router_is_listed_from_its_first_beat_to_its_last(
    running: tuple[PlacementController, dict[str, float], Path],
) -> None:
    controller, _, _ = running
    totals = {**asdict(EngineStats()), **asdict(ClientStats())}
    profile = {**totals, "kv_used_blocks": 0, "kv_blocks": 1}
    beat = {"id": "r0", "pid": 1, "node": "n", "endpoint": {}, "profile": profile}
    controller.router_beat({**beat, "state": "ready"})
    controller.router_beat({**beat, "id": "r1", "state": "ready"})
    controller.router_beat({**beat, "state": "draining"})
    assert {r["id"]: r["state"] for r in controller.routers()} == {"r0": "draining", "r1": "ready"}
    controller.router_beat({"id": "r0", "state": "gone"})
    assert [r["id"] for r in controller.routers()] == ["r1"]
