"""A deployment that joins a Ray cluster of several nodes; one of them is lost under traffic."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from actors.local import free_port
from tests.e2e.conftest import DEMO, Deployment, run_raymoe
from tests.e2e.nodes import Nodes
from tests.e2e.traffic import Client, Wave, wait_for

pytestmark = pytest.mark.ray


def config(path: Path, address: str) -> str:
    """Groups on nodes `a` and `b`, everything else on the head; either holds every expert."""
    whole = 45_000_000
    settings = {
        "model": str(DEMO),
        "ray": {"address": address},
        "groups": [
            {"kind": "one", "count": 1, "memory_bytes": whole, "resources": {"a": 1}},
            {"kind": "two", "count": 1, "memory_bytes": whole, "resources": {"b": 1}},
        ],
        "routers": {"resources": {"head": 1}},
        "gateway": {"resources": {"head": 1}},
        "placement": {"restore_s": 0.5, "interval_s": 0.5, "unreachable_s": 5},
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_cluster_is_joined_and_left_and_a_node_of_it_lost(tmp_path: Path) -> None:
    with Nodes("a", "b") as nodes:
        file = config(tmp_path / "c.yaml", nodes.address)
        running = Deployment("--config", file, env=nodes.env)
        try:
            running.wait_ready()
            first, second = running.get("/status")["groups"]
            assert first["node"] != second["node"]
            client = Client(running)
            before = client.ask("In the beginning", 120)
            again = run_raymoe("serve", "--config", file, "--port", str(free_port()), env=nodes.env)
            assert again.returncode == 2 and "runs already" in again.stderr, again.stderr

            # a stopped process does not hear Ray, which asks it to end: it is killed on its node
            os.kill(second["pid"], signal.SIGSTOP)

            def replaced() -> bool:
                row = running.get("/status")["groups"][1]
                return bool(row["state"] == "ready" and row["incarnation"] > second["incarnation"])

            assert wait_for(replaced, 120)
            assert wait_for(lambda: not psutil.pid_exists(second["pid"]), 60)

            with Wave(client, ["In the beginning"], 120) as wave:
                time.sleep(0.3)
                nodes.kill("b")
            assert wave.texts() == [before]

            def restored() -> bool:
                first, second = running.get("/status")["groups"]
                return bool(first["replicas"] == 96 and second["state"] != "ready")

            assert wait_for(restored, 60), "every expert lives on the node that is left"
            assert client.ask("In the beginning", 120) == before
            assert running.stop() < 30
        finally:
            if running.process.poll() is None:
                running.process.kill()
        listed = run_raymoe("status", "--json", "--port", str(running.port))
        assert listed.returncode == 2, json.dumps(listed.stdout)
