"""Experts of a group that is gone are served by the others, and go home when it is back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import DEMO, Deployment
from tests.e2e.traffic import Client

pytestmark = pytest.mark.ray


def test_experts_are_borrowed_while_a_group_is_away(tmp_path: Path) -> None:
    settings = {
        "model": str(DEMO),
        "groups": [{"count": 2, "memory_bytes": 45_000_000}],  # each could hold every expert
        "placement": {"restore_s": 0, "interval_s": 0.2, "live": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    running = Deployment("--config", str(tmp_path / "c.yaml"))
    try:
        running.wait_ready()
        client = Client(running)

        def ask() -> str:
            return client.ask("In the beginning", 60)

        before = ask()
        first, second = running.get("/status")["groups"]
        home = (first["replicas"], second["replicas"])  # by measured speed, not always even
        assert sum(home) == 96 and min(home) > 0
        os.kill(first["pid"], signal.SIGKILL)
        assert ask() == before
        most, deadline = 0, time.monotonic() + 60
        while time.monotonic() < deadline:
            first, second = running.get("/status")["groups"]
            most = max(most, second["replicas"])
            if most == 96 and (first["replicas"], second["replicas"]) == home:
                break
            time.sleep(0.1)
        assert most == 96, "the other group took all experts"
        assert (first["replicas"], second["replicas"]) == home, "and gave them back"
        assert ask() == before
        running.stop()
    finally:
        if running.process.poll() is None:
            running.process.kill()
