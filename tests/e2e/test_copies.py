"""Two groups that each hold everything, and one small router: either is lost under traffic, and
more is asked for than can be done."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.conftest import DEMO, Deployment
from tests.e2e.traffic import Answer, Client, Wave, judge, wait_for

pytestmark = pytest.mark.ray
BATCH = 4
PROMPTS = [f"{n} And it came to pass" for n in range(BATCH)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = {
        "model": str(DEMO),
        "groups": [{"count": 2, "memory_bytes": 45_000_000}],
        "routers": {"count": 1, "max_batch": BATCH},
        "placement": {"copies": 2, "interval_s": 0.5},
    }
    file = tmp_path_factory.mktemp("copies") / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    running = Deployment("--config", str(file))
    try:
        running.wait_ready()
        yield running
        running.stop()
    finally:
        if running.process.poll() is None:
            running.process.kill()


def both_hold_everything(running: Deployment) -> bool:
    groups = running.get("/status")["groups"]
    return all(g["state"] == "ready" and g["replicas"] == 96 for g in groups)


def router(running: Deployment) -> dict[str, Any]:
    found: list[dict[str, Any]] = running.get("/status")["routers"]
    return found[0] if found else {"pid": 0}


def test_with_two_copies_nothing_waits_for_a_killed_group(running: Deployment) -> None:
    assert wait_for(lambda: both_hold_everything(running), 90)
    client = Client(running).with_tokens()
    before = [client.answer(prompt, 120) for prompt in PROMPTS]
    victim = running.get("/status")["groups"][0]["pid"]
    stalled = router(running)["profile"]["stalled_steps"]
    with Wave(client, PROMPTS, 120) as wave:
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
    judge(client, PROMPTS, before, wave.answers())
    assert wait_for(lambda: bool(router(running)["profile"]["links_lost"]), 60)
    assert router(running)["profile"]["stalled_steps"] == stalled, "a step waited for experts"
    assert wait_for(lambda: both_hold_everything(running), 90), "the copies are made again"


def test_requests_wait_for_the_only_router_to_be_started_again(running: Deployment) -> None:
    """And go on where they were, also those that are sampled."""
    sampling = {"temperature": 0.9, "top_k": 20}
    client = Client(running, **sampling).with_tokens()
    before = [client.answer(prompt, 120, seed=n) for n, prompt in enumerate(PROMPTS)]
    victim = router(running)["pid"]
    with Wave(client, PROMPTS, 120) as wave:
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
    judge(client, PROMPTS, before, wave.answers(), **sampling)
    assert wait_for(lambda: router(running)["pid"] not in (0, victim), 60)


def test_what_is_too_much_is_refused_and_what_was_let_in_is_right(running: Deployment) -> None:
    client = Client(running).with_tokens()
    assert wait_for(lambda: bool(router(running)["pid"]), 60)
    before = [client.answer(prompt, 120) for prompt in PROMPTS]
    count = 6 * BATCH
    at_once = threading.Barrier(count)
    told: dict[int, Answer | openai.RateLimitError] = {}

    def ask(n: int) -> None:
        at_once.wait(60)
        try:
            told[n] = client.answer(PROMPTS[n % BATCH], 120)
        except openai.RateLimitError as e:
            told[n] = e

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert len(told) == count, "a request failed otherwise, or did not end"
    refused = [e for e in told.values() if isinstance(e, openai.RateLimitError)]
    assert refused, "no more than one batch may wait"
    assert all(int(e.response.headers["retry-after"]) >= 1 for e in refused)
    let_in = [(n % BATCH, a) for n, a in sorted(told.items()) if isinstance(a, Answer)]
    assert len(let_in) >= 2 * BATCH
    print(f"{len(refused)} of {count} refused")
    judge(client, [PROMPTS[n] for n, _ in let_in], [before[n] for n, _ in let_in],
          [answer for _, answer in let_in])  # fmt: skip
