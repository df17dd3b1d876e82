"""Pools of k8s/overlays/mixed under Ray's autoscaler: nodes come for groups that wait for them, are
replaced when they are lost, and go when their groups have gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cloud import Cloud
from tests.e2e.conftest import DEMO, Deployment
from tests.e2e.traffic import Client, Wave
from tests.k8s.overlays import build, cluster_of
from tests.k8s.rules_serve import serve_config

pytestmark = pytest.mark.ray

SECRET = "a secret for the tests of the autoscaler"
AT_LEAST = ["h100", "serving"]  # minReplicas of the overlay
PROMPTS = [f"In the beginning {i} " for i in range(4)]


def settings(docs: list[dict[str, Any]], address: str, pools: tuple[str, ...]) -> dict[str, Any]:
    """The overlay's own settings, with one group a pool, for the demo model on a CPU."""
    (application,) = serve_config(docs)["applications"]
    found: dict[str, Any] = application["args"]
    groups = [kind for kind in found["groups"] if kind["kind"] in pools]
    for kind in groups:  # either can hold every expert; GPUs are counted by Ray, not used
        kind.update(count=1, device="cpu", memory_bytes=45_000_000)
    del found["secret_file"]  # from RAYMOE_SECRET here
    return {
        **found,
        "model": str(DEMO),
        "groups": groups,
        "routers": {"label_selector": found["routers"]["label_selector"]},
        "data_plane": {"host": "node"},
        "placement": {"restore_s": 0.5, "interval_s": 0.5, "load_timeout_s": 240},
        "ray": {"address": address},
    }


def wait_for(state: Callable[[], bool], what: str, limit_s: float = 120) -> float:
    """Seconds until `state` holds."""
    began = time.monotonic()
    while not state():
        assert time.monotonic() - began < limit_s, what
        time.sleep(0.5)
    return time.monotonic() - began


def test_nodes_come_for_groups_are_replaced_and_go_with_them(tmp_path: Path) -> None:
    docs = build("mixed")
    with Cloud(cluster_of(docs), SECRET) as cloud:
        cloud.await_pools(AT_LEAST, 90)
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings(docs, cloud.address, ("h100", "l4"))))
        running = Deployment("--config", str(file), env=cloud.env)
        try:
            started = time.monotonic()
            running.wait_ready()
            times = {"demand to serving": time.monotonic() - started}
            assert cloud.pools() == ["h100", "l4", "serving"]

            def group(kind: str) -> dict[str, Any]:
                (row,) = [g for g in running.get("/status")["groups"] if g["kind"] == kind]
                found: dict[str, Any] = row
                return found

            for kind in ("h100", "l4"):
                assert cloud.nodes()[group(kind)["node"]] == kind
            client = Client(running)
            before = [client.ask(prompt, 60) for prompt in PROMPTS]

            lost = group("l4")["node"]
            with Wave(client, PROMPTS, 60) as wave:
                time.sleep(0.5)
                cloud.kill(lost)
            assert wave.texts() == before
            times["node lost to group on another"] = wait_for(
                lambda: group("l4")["state"] == "ready" and group("l4")["node"] != lost,
                "the group is started on a new node of its pool",
            )
            assert cloud.nodes()[group("l4")["node"]] == "l4"
            assert [client.ask(prompt, 60) for prompt in PROMPTS] == before
            running.stop()
        finally:
            if running.process.poll() is None:
                running.process.kill()
        times["groups gone to node gone"] = cloud.await_pools(AT_LEAST, 90)
    print("seconds:", {name: round(seconds, 1) for name, seconds in times.items()})
