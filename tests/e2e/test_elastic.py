"""Experts follow the load and the speeds; groups come and go; streams notice nothing."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
from typing import Any

import pytest

from tests.e2e.conftest import Deployment, run_raymoe
from tests.e2e.inside import call_controller
from tests.e2e.streams import Streams
from tests.e2e.traffic import Client, wait_for

# far more than they take: a slow machine waits for what happens, and is not judged by a clock
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

BIBLE = [f"{n} And it came to pass in those days, that" for n in range(4)]
CODE = [f"def function_{n}(self, argv=None):\n    return" for n in range(4)]


def groups(deployment: Deployment) -> dict[str, dict[str, Any]]:
    return {g["id"]: g for g in deployment.get("/status")["groups"]}


def raymoe(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    done = run_raymoe(*arguments, "--json", "--port", str(deployment.port))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def part_of(deployment: Deployment, group_id: str) -> float:
    """What part of the load goes to a group, by the shares in the table."""
    here = total = 0.0
    for layer in deployment.get("/placement")["layers"]:
        for expert in layer["experts"]:
            total += expert["load"]
            for replica in expert["replicas"]:
                if replica["group"] == group_id:
                    here += expert["load"] * replica["share"]
    return here / total if total else 0.0


def test_hot_experts_are_replicated_and_the_history_says_why(deployment: Deployment) -> None:
    def replicated() -> bool:
        layers = deployment.get("/placement")["layers"]
        return any(len(e["replicas"]) > 1 for layer in layers for e in layer["experts"])

    def explained() -> bool:
        plans = deployment.get("/placement/history")["plans"]
        return any(p["reasons"] and p["promised"] is not None for p in plans)

    def judged() -> bool:
        plans = deployment.get("/placement/history")["plans"]
        return any(p["realised"] is not None for p in plans)

    def placed() -> set[tuple[int, int, str]]:
        layers = deployment.get("/placement")["layers"]
        return {
            (layer["layer"], expert["expert"], replica["group"])
            for layer in layers
            for expert in layer["experts"]
            for replica in expert["replicas"]
        }

    with Streams(Client(deployment), CODE, 60):
        assert wait_for(replicated, 120)
        assert wait_for(explained, 60)
        assert wait_for(judged, 90)
        then = placed()
    with Streams(Client(deployment), BIBLE, 60):  # other experts are wanted now
        assert wait_for(lambda: bool(then - placed()), 180), "cold copies are dropped"
        assert {(layer, expert) for layer, expert, _ in placed()} == {
            (layer, expert) for layer, expert, _ in then
        }, "and none of them was the last"
    done = run_raymoe("history", "--port", str(deployment.port))
    assert done.returncode == 0 and "plan" in done.stdout, done.stderr


def test_a_slowed_group_loses_load(deployment: Deployment) -> None:
    slow = "g1"
    with Streams(Client(deployment), BIBLE, 60):
        assert wait_for(lambda: groups(deployment)[slow]["speed"] > 0.5, 90)
        before = part_of(deployment, slow)
        call_controller(deployment, "set_slowdown", slow, 6.0)
        try:
            assert wait_for(lambda: groups(deployment)[slow]["speed"] < 0.5, 90), "it shows"
            assert wait_for(lambda: part_of(deployment, slow) < 0.7 * before, 120)
        finally:
            call_controller(deployment, "set_slowdown", slow, 1.0)
        assert wait_for(lambda: groups(deployment)[slow]["speed"] > 0.5, 120), "and recovers"


def test_scale_and_drain_under_streams(deployment: Deployment) -> None:
    """3 -> 5 groups, one drained and brought back, 5 -> 3, and one killed in between."""

    def serving(count: int) -> bool:
        rows = groups(deployment).values()
        return len(rows) == count and all(g["state"] == "ready" and g["replicas"] > 0 for g in rows)

    assert wait_for(lambda: serving(3), 60)
    refused = run_raymoe("drain", "g1", "--port", str(deployment.port))
    assert refused.returncode == 2 and "bytes" in refused.stderr, "two cannot hold all experts"
    with Streams(Client(deployment), BIBLE + CODE, 80):
        told = raymoe(deployment, "scale", "--groups", "5")
        assert [m["id"] for m in told["members"]] == ["g0", "g1", "g2", "g3", "g4"]
        assert wait_for(lambda: serving(5), 120)
        raymoe(deployment, "drain", "g1")
        assert wait_for(lambda: groups(deployment)["g1"]["state"] == "drained", 120)
        assert groups(deployment)["g1"]["replicas"] == 0
        os.kill(groups(deployment)["g3"]["pid"], signal.SIGKILL)
        raymoe(deployment, "drain", "g1", "--undo")
        assert wait_for(lambda: serving(5), 120)
        raymoe(deployment, "scale", "--groups", "3")
        assert wait_for(lambda: serving(3), 180)
    assert deployment.get("/status")["ready"]


def test_a_controller_killed_in_the_middle_of_a_plan(deployment: Deployment) -> None:
    """What was asked for is done by the next controller; nothing that ran is ended."""
    with Streams(Client(deployment), BIBLE, 60):
        before = deployment.get("/status")
        raymoe(deployment, "scale", "--groups", "4")
        os.kill(before["controller"]["pid"], signal.SIGKILL)

        def grown() -> bool:
            try:
                rows = groups(deployment)
            except urllib.error.HTTPError:  # 503 while there is no controller
                return False
            return len(rows) == 4 and all(g["state"] == "ready" for g in rows.values())

        assert wait_for(grown, 120)
        after = deployment.get("/status")
        assert after["term"] > before["term"] and after["epoch"] > before["epoch"]
        same = {g["id"]: g["pid"] for g in before["groups"]}
        assert {i: g["pid"] for i, g in groups(deployment).items() if i in same} == same
        raymoe(deployment, "scale", "--groups", "3")
        assert wait_for(lambda: len(groups(deployment)) == 3, 180)
