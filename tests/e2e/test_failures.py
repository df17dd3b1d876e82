"""A group that is killed under traffic: requests wait for its experts, none fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.conftest import Deployment

pytestmark = pytest.mark.ray


def wait_for(what: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False


def test_killed_group_comes_back_and_no_request_fails(deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)

    def ask(n: int) -> str:
        answer = client.completions.create(
            model="demo",
            prompt=f"{n} And it came to pass",
            max_tokens=120,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return str(answer.choices[0].text)

    before = [ask(n) for n in range(6)]
    results: dict[int, str | Exception] = {}

    def run(n: int) -> None:
        try:
            results[n] = ask(n)
        except Exception as e:
            results[n] = e

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    victim = deployment.get("/status")["groups"][1]
    os.kill(victim["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    failed = [r for r in results.values() if isinstance(r, Exception)]
    assert not failed and len(results) == 6
    same = sum(results[n] == before[n] for n in range(6))
    assert same >= 5, "more than a near-tie differs"

    def restored() -> bool:
        group = deployment.get("/status")["groups"][1]
        return bool(group["state"] == "ready" and group["pid"] not in (0, victim["pid"]))

    assert wait_for(restored, 60)
    group = deployment.get("/status")["groups"][1]
    assert group["replicas"] == victim["replicas"]
    assert group["incarnation"] == victim["incarnation"] + 1


def test_killed_router_loses_no_token(deployment: Deployment) -> None:
    """Sampled streams go on at the other router as if nothing had happened."""
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)

    def ask(n: int) -> str:
        stream = client.completions.create(
            model="demo",
            prompt=f"{n} Verily",
            max_tokens=150,
            temperature=0.9,
            seed=n,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    before = [ask(n) for n in range(4)]
    results: dict[int, str | Exception] = {}

    def run(n: int) -> None:
        try:
            results[n] = ask(n)
        except Exception as e:
            results[n] = e

    assert wait_for(lambda: len(deployment.get("/status")["routers"]) == 2, 30)
    victim = deployment.get("/status")["routers"][0]["pid"]
    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    failed = [r for r in results.values() if isinstance(r, Exception)]
    assert not failed and len(results) == 4
    same = sum(results[n] == before[n] for n in range(4))
    assert same >= 3, "more than a near-tie differs"

    def replaced() -> bool:
        routers = deployment.get("/status")["routers"]
        return len(routers) == 2 and all(r["pid"] != victim for r in routers)

    assert wait_for(replaced, 90)


def test_stopped_group_is_waited_for_or_left_behind(deployment: Deployment) -> None:
    """A group frozen for some seconds delays requests; none fails, no token changes."""
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)

    def ask() -> str:
        answer = client.completions.create(
            model="demo", prompt="The sea", max_tokens=60, temperature=0, extra_body=IGNORE_EOS
        )
        return str(answer.choices[0].text)

    before = ask()
    frozen = deployment.get("/status")["groups"][0]["pid"]
    os.kill(frozen, signal.SIGSTOP)
    thaw = threading.Timer(4, os.kill, (frozen, signal.SIGCONT))
    thaw.start()
    try:
        assert ask() == before
    finally:
        thaw.cancel()
        os.kill(frozen, signal.SIGCONT)
    assert ask() == before


def test_controller_and_a_group_killed_together(deployment: Deployment) -> None:
    """What the surviving groups hold stays; the lost experts come back; the epoch only grows."""
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)
    before = deployment.get("/status")
    kept = {g["id"]: g["pid"] for g in before["groups"][1:]}
    os.kill(before["controller"]["pid"], signal.SIGKILL)
    os.kill(before["groups"][0]["pid"], signal.SIGKILL)
    answer = client.completions.create(
        model="demo", prompt="The sea", max_tokens=40, temperature=0, extra_body=IGNORE_EOS
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 40

    def restored() -> bool:
        status = deployment.get("/status")
        return bool(status["ready"] and all(g["state"] == "ready" for g in status["groups"]))

    assert wait_for(restored, 60)
    after = deployment.get("/status")
    assert {g["id"]: g["pid"] for g in after["groups"][1:]} == kept, "a healthy group was ended"
    assert after["term"] == before["term"] + 1
    assert after["epoch"] > before["epoch"]
    assert sum(g["replicas"] for g in after["groups"]) == 6 * 16


def test_group_frozen_for_good_is_replaced(deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)
    frozen = deployment.get("/status")["groups"][2]
    os.kill(frozen["pid"], signal.SIGSTOP)
    answer = client.completions.create(
        model="demo", prompt="The sea", max_tokens=40, temperature=0, extra_body=IGNORE_EOS
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 40
    now = deployment.get("/status")["groups"][2]
    assert now["pid"] != frozen["pid"] and now["deaths"] == frozen["deaths"] + 1
    assert not psutil.pid_exists(frozen["pid"])


IGNORE_EOS: dict[str, Any] = {"ignore_eos": True}
