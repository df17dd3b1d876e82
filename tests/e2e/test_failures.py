"""What is killed or frozen under traffic: requests wait for it, none fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from tests.e2e.conftest import Deployment
from tests.e2e.traffic import Client, Judge, Wave, judge, wait_for

pytestmark = pytest.mark.ray


def test_a_wrong_token_would_be_found(deployment: Deployment) -> None:
    """What the other tests of this folder rest on: that a difference is no excuse."""
    client = Client(deployment).with_tokens()
    sampling = {"temperature": 0.9, "top_k": 20, "seed": 1}
    told = client.answer("In the beginning", 24)
    drawn = client.answer("In the beginning", 24, **sampling)
    court = Judge(client)
    assert court.near_ties("In the beginning", told) <= 1
    assert court.near_ties("In the beginning", drawn, **sampling) <= 1
    with pytest.raises(AssertionError, match="no near tie"):
        court.near_ties("In the beginning", drawn)
    with pytest.raises(AssertionError, match="no near tie"):
        court.near_ties("In the beginning", told, **sampling)
    other = client.answer("In the end", 24)
    with pytest.raises(AssertionError, match="no near tie"):
        court.near_ties("In the beginning", other)


def test_killed_group_comes_back_and_no_request_fails(deployment: Deployment) -> None:
    client = Client(deployment).with_tokens()
    prompts = [f"{n} And it came to pass" for n in range(6)]
    before = [client.answer(prompt, 120) for prompt in prompts]
    with Wave(client, prompts, 120) as wave:
        time.sleep(0.3)
        victim = deployment.get("/status")["groups"][1]
        os.kill(victim["pid"], signal.SIGKILL)
    judge(client, prompts, before, wave.answers())

    def restored() -> bool:
        group = deployment.get("/status")["groups"][1]
        return bool(group["state"] == "ready" and group["pid"] not in (0, victim["pid"]))

    assert wait_for(restored, 60)
    group = deployment.get("/status")["groups"][1]
    assert group["replicas"] > 0
    assert group["incarnation"] == victim["incarnation"] + 1


def test_killed_router_loses_no_token(deployment: Deployment) -> None:
    """Sampled streams go on at the other router as if nothing had happened."""
    sampling = {"temperature": 0.9, "top_k": 20}
    client = Client(deployment, **sampling).with_tokens()
    prompts = [f"{n} Verily" for n in range(4)]
    before = [client.answer(prompt, 150, seed=n) for n, prompt in enumerate(prompts)]
    assert wait_for(lambda: len(deployment.get("/status")["routers"]) == 2, 30)
    victim = deployment.get("/status")["routers"][0]["pid"]
    with Wave(client, prompts, 150) as wave:
        time.sleep(0.4)
        os.kill(victim, signal.SIGKILL)
    judge(client, prompts, before, wave.answers(), **sampling)

    def replaced() -> bool:
        routers = deployment.get("/status")["routers"]
        return len(routers) == 2 and all(r["pid"] != victim for r in routers)

    assert wait_for(replaced, 90)


def test_stopped_group_is_waited_for_or_left_behind(deployment: Deployment) -> None:
    """A group frozen for some seconds delays requests; none fails, no token changes."""
    client = Client(deployment)
    before = client.ask("The sea", 60)
    frozen = deployment.get("/status")["groups"][0]["pid"]
    os.kill(frozen, signal.SIGSTOP)
    thaw = threading.Timer(4, os.kill, (frozen, signal.SIGCONT))
    thaw.start()
    try:
        assert client.ask("The sea", 60) == before
    finally:
        thaw.cancel()
        os.kill(frozen, signal.SIGCONT)
    assert client.ask("The sea", 60) == before


def test_controller_and_a_group_killed_together(deployment: Deployment) -> None:
    """What the surviving groups hold stays; the lost experts come back; the epoch only grows."""
    before = deployment.get("/status")
    kept = {g["id"]: g["pid"] for g in before["groups"][1:]}
    os.kill(before["controller"]["pid"], signal.SIGKILL)
    os.kill(before["groups"][0]["pid"], signal.SIGKILL)
    assert Client(deployment).ask("The sea", 40)

    def restored() -> bool:
        status = deployment.get("/status")
        return bool(status["ready"] and all(g["state"] == "ready" for g in status["groups"]))

    assert wait_for(restored, 60)
    after = deployment.get("/status")
    assert {g["id"]: g["pid"] for g in after["groups"][1:]} == kept, "a healthy group was ended"
    assert after["term"] == before["term"] + 1
    assert after["epoch"] > before["epoch"]
    assert sum(g["replicas"] for g in after["groups"]) >= 6 * 16


def test_group_frozen_for_good_is_replaced(deployment: Deployment) -> None:
    frozen = deployment.get("/status")["groups"][2]
    os.kill(frozen["pid"], signal.SIGSTOP)
    assert Client(deployment).ask("The sea", 40)

    def replaced() -> bool:
        now = deployment.get("/status")["groups"][2]
        return bool(now["pid"] != frozen["pid"] and now["deaths"] == frozen["deaths"] + 1)

    assert wait_for(replaced, 60)
    assert not psutil.pid_exists(frozen["pid"])
