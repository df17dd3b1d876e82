"""Pools of k8s/overlays/mixed under Ray's autoscaler: nodes come for groups that wait for them, are
replaced when they drain or die, and go when their groups have gone. Streams notice nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cloud import Cloud, node_of
from tests.e2e.conftest import DEMO, Deployment, run_raymoe
from tests.e2e.streams import Streams
from tests.e2e.traffic import Client
from tests.k8s.overlays import build, cluster_of
from tests.k8s.rules_serve import serve_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # nodes start and end six times

SECRET = "a secret for the tests of the autoscaler"
AT_LEAST = ["h100", "serving"]  # minReplicas of the overlay
PROMPTS = [f"In the beginning {i} " for i in range(4)]


def settings(docs: list[dict[str, Any]], address: str, pools: tuple[str, ...]) -> dict[str, Any]:
    """The overlay's own settings, with one group a pool, for the demo model on a CPU."""
    (application,) = serve_config(docs)["applications"]
    found: dict[str, Any] = application["args"]
    groups = [kind for kind in found["groups"] if kind["kind"] in pools]
    for kind in groups:  # any of them can hold every expert; GPUs are counted by Ray, not used
        kind.update(count=1, device="cpu", memory_bytes=45_000_000)
    return {
        "model": str(DEMO),
        "groups": groups,
        "routers": {"label_selector": found["routers"]["label_selector"]},
        "gateway": {"label_selector": found["gateway"]["label_selector"]},
        "data_plane": {"host": "node"},
        "placement": {"restore_s": 0.5, "interval_s": 0.5, "load_timeout_s": 240},
        "ray": {"address": address},
    }


class Elastic:
    """A deployment on nodes that come and go, and how long each change took."""

    def __init__(self, cloud: Cloud, running: Deployment) -> None:
        self._cloud, self._running = cloud, running
        self.seconds: dict[str, float] = {}

    def groups(self, kind: str) -> list[dict[str, Any]]:
        """Its groups that hold experts, on nodes that are alive."""
        nodes, rows = self._cloud.nodes(), self._running.get("/status")["groups"]
        of_kind = [g for g in rows if g["kind"] == kind and g["node"] in nodes]
        assert all(nodes[g["node"]] == kind for g in of_kind), "a group in another kind's pool"
        return [g for g in of_kind if g["state"] == "ready" and g["replicas"] > 0]

    def pool_of_the_controller(self) -> str:
        """On a node of experts it would keep that node from being given back."""
        pid = self._running.get("/status")["controller"]["pid"]
        return self._cloud.nodes()[node_of(pid)]

    def scale(self, kind: str, count: int) -> None:
        port = str(self._running.port)
        done = run_raymoe("scale", "--groups", str(count), "--kind", kind, "--port", port)
        assert done.returncode == 0, done.stderr

    def timed(self, name: str, holds: Callable[[], bool], limit_s: float = 150) -> None:
        """Waits until `holds`, and notes how long that took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < limit_s, (
                name,
                self._cloud.nodes(),
                self._running.get("/status")["groups"],
            )
            time.sleep(0.5)
        self.seconds[name] = round(time.monotonic() - began, 1)


def test_nodes_come_are_replaced_and_go_with_the_groups(tmp_path: Path) -> None:
    docs = build("mixed")
    with Cloud(cluster_of(docs), SECRET) as cloud:
        cloud.await_pools(AT_LEAST, 90)
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings(docs, cloud.address, ("h100", "l4"))))
        running = Deployment("--config", str(file), env=cloud.env)
        try:
            elastic = Elastic(cloud, running)
            began = time.monotonic()
            running.wait_ready()
            elastic.seconds["start: a node for the waiting group, everything serves"] = round(
                time.monotonic() - began, 1
            )
            assert cloud.pools() == ["h100", "l4", "serving"]
            assert len(elastic.groups("h100")) == len(elastic.groups("l4")) == 1
            assert elastic.pool_of_the_controller() == "serving"
            with Streams(Client(running), PROMPTS, 40, threads=2):
                _changes(cloud, elastic)
            running.stop()
        finally:
            if running.process.poll() is None:
                running.process.kill()
        cloud.await_pools(AT_LEAST, 90)
    print("seconds:", elastic.seconds)


def test_a_load_that_rises_brings_a_node_and_one_that_falls_gives_it_back(tmp_path: Path) -> None:
    """Scaling by load; groups of the demo model are sure to reach and leave such thresholds."""
    docs = build("mixed")
    with Cloud(cluster_of(docs), SECRET) as cloud:
        cloud.await_pools(AT_LEAST, 90)
        wanted = settings(docs, cloud.address, ("h100", "l4"))
        for kind in wanted["groups"]:
            kind.update(slowdown=6, min_count=1, max_count=2 if kind["kind"] == "l4" else 1)
        wanted["placement"]["autoscale"] = {
            "enabled": True,
            "target": 0.05,
            "high": 0.06,
            "low": 0.03,
            "up_after_s": 2,
            "down_after_s": 8,
            "cool_down_s": 4,
        }
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(wanted))
        running = Deployment("--config", str(file), env=cloud.env)
        try:
            running.wait_ready()
            elastic = Elastic(cloud, running)
            with Streams(Client(running), PROMPTS, 40, threads=8):
                elastic.timed(
                    "rise: from the load to a second group on a node of its own",
                    lambda: (
                        len(elastic.groups("l4")) == 2
                        and cloud.pools() == ["h100", "l4", "l4", "serving"]
                    ),
                )
            elastic.timed(
                "fall: from the load's end to the node given back",
                lambda: (
                    len(elastic.groups("l4")) == 1 and cloud.pools() == ["h100", "l4", "serving"]
                ),
            )
            running.stop()
        finally:
            if running.process.poll() is None:
                running.process.kill()
        cloud.await_pools(AT_LEAST, 90)
    print("seconds:", elastic.seconds)


def _changes(cloud: Cloud, elastic: Elastic) -> None:
    """Out, a node drained, a node killed, in: each under streams that go on."""
    elastic.scale("l4", 2)
    elastic.timed("scale-out: a second group serves", lambda: len(elastic.groups("l4")) == 2)
    assert cloud.pools() == ["h100", "l4", "l4", "serving"]

    leaving = elastic.groups("l4")[0]["node"]
    cloud.drain(leaving)
    elastic.timed(
        "drain: the node is gone, another serves",
        lambda: leaving not in cloud.nodes() and len(elastic.groups("l4")) == 2,
    )

    lost = elastic.groups("l4")[0]["node"]
    cloud.kill(lost)
    elastic.timed(
        "node killed: its group serves on another",
        lambda: lost not in cloud.nodes() and len(elastic.groups("l4")) == 2,
    )

    elastic.scale("l4", 1)
    elastic.timed(
        "scale-in: the node is gone",
        lambda: cloud.pools() == ["h100", "l4", "serving"] and len(elastic.groups("l4")) == 1,
    )
