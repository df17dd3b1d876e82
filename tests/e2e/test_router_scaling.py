"""Routers come with the load and go when it falls: Ray Serve's autoscaling; streams go on."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.e2e.conftest import DEMO, Deployment
from tests.e2e.streams import Streams
from tests.e2e.traffic import Client, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROMPTS = [f"In the beginning {i} " for i in range(4)]
SETTINGS = {
    "model": str(DEMO),
    "groups": 2,
    "routers": {
        "drain_s": 0,  # what is open is given away
        "autoscaling": {
            "max_replicas": 2,
            "target_ongoing_requests": 4,
            "look_back_period_s": 3,
            "upscale_delay_s": 1,
            "downscale_delay_s": 3,
        },
    },
}


def routers(running: Deployment) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.get("/status")["routers"]
    return found


def resubmitted(running: Deployment) -> int:
    """Requests that went on at another router, so far."""
    with urllib.request.urlopen(running.url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r"^raymoe_gateway_resubmitted_total (\d+)", text, re.M)
    return int(found.group(1)) if found else 0


def test_a_second_router_comes_with_the_load_and_goes_when_it_falls(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    running = Deployment("--config", str(file))
    seconds: dict[str, float] = {}

    def timed(name: str, what: Any) -> None:
        began = time.monotonic()
        assert wait_for(what, 150), (name, routers(running))
        seconds[name] = round(time.monotonic() - began, 1)

    try:
        running.wait_ready()
        first = routers(running)[0]["pid"]
        assert len(routers(running)) == 1
        client = Client(running)

        def both_work() -> bool:
            found = routers(running)
            return len(found) == 2 and all(r["profile"]["steps"] > 0 for r in found)

        def one_is_left() -> bool:
            return len(routers(running)) == 1

        load = Streams(client, PROMPTS, 60, threads=8)
        with Streams(client, PROMPTS, 150, threads=2):
            with load:
                timed("out: from the load to the second router's first step", both_work)
            second = next(r["pid"] for r in routers(running) if r["pid"] != first)
            timed("in: from the load's end to one router", one_is_left)
        assert routers(running)[0]["pid"] == first, "Serve ends the newer one"
        assert routers(running)[0]["state"] == "ready"
        assert wait_for(lambda: not psutil.pid_exists(second), 60)
        print("seconds:", seconds, "given away:", resubmitted(running))
        running.stop()
    finally:
        if running.process.poll() is None:
            running.process.kill()
