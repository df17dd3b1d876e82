"""Ray's head (its GCS) is killed under traffic and started anew from what it kept on disk."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import DEMO, Deployment, run_raymoe
from tests.e2e.nodes import Nodes
from tests.e2e.traffic import Client, Wave, wait_for

pytestmark = pytest.mark.ray


def config(path: Path, address: str) -> str:
    """Two groups, either of which can hold every expert."""
    settings = {
        "model": str(DEMO),
        "ray": {"address": address},
        "groups": [{"count": 2, "memory_bytes": 45_000_000}],
        "placement": {"restore_s": 0.5, "interval_s": 0.5, "live": False},
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def served_without_a_group(running: Deployment) -> bool:
    """Every expert is served although a group is away."""
    status = running.get("/status")
    return bool(status["ready"]) and any(g["state"] != "ready" for g in status["groups"])


def test_the_head_is_lost_and_comes_back(tmp_path: Path) -> None:
    with Nodes() as nodes:
        running = Deployment("--config", config(tmp_path / "c.yaml", nodes.address), env=nodes.env)
        try:
            running.wait_ready()
            client = Client(running)
            before = client.ask("In the beginning", 120)
            first, second = running.get("/status")["groups"]

            nodes.head_down()
            assert client.ask("In the beginning", 120) == before
            with Wave(client, ["In the beginning"], 120) as wave:
                time.sleep(0.2)
                os.kill(second["pid"], signal.SIGKILL)
                restored = wait_for(lambda: served_without_a_group(running), 8)
                nodes.head_up()  # after 15 s `raymoe serve` would take Ray for lost
            assert restored, "nobody served the lost group's experts while the head was away"
            assert wave.texts() == [before]

            def back() -> bool:
                return all(g["state"] == "ready" for g in running.get("/status")["groups"])

            assert wait_for(back, 90), running.get("/status")
            scaled = run_raymoe("scale", "--groups", "3", "--port", str(running.port))
            assert scaled.returncode == 0, scaled.stderr
            assert wait_for(lambda: len(running.get("/status")["groups"]) == 3 and back(), 90)
            assert running.get("/status")["groups"][0]["pid"] == first["pid"]
            assert client.ask("In the beginning", 120) == before
            assert running.stop() < 30
        finally:
            if running.process.poll() is None:
                running.process.kill()
