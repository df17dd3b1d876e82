"""The live page on a running deployment, in headless Chromium: a real death, a real move."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.e2e.conftest import Deployment
from tests.e2e.traffic import Client, Wave
from tests.ui.browser import opened

pytestmark = pytest.mark.ray
LIMIT_S = 90.0


def until(page: Any, script: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(100)


def test_the_page_shows_a_death_and_replicas_that_come_as_it_happens(
    deployment: Deployment,
) -> None:
    events = "document.getElementById('events').innerText"
    ready = "document.querySelectorAll('#fleet .state.ready').length"
    with opened() as browser:
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(deployment.url + "/ui")
        until(page, f"{ready} === 3")
        until(page, "document.querySelectorAll('#heat [role=gridcell]').length === 3 * 16")
        victim = deployment.get("/status")["groups"][1]
        seen = page.evaluate(f"{events}.split('replicas added on {victim['id']}').length")
        with Wave(Client(deployment), [f"{n} Behold" for n in range(4)], 100):
            os.kill(victim["pid"], signal.SIGKILL)
            until(page, f"{events}.includes('group {victim['id']} was lost')")
            until(page, f"{ready} === 3 && {events}.includes('removed from {victim['id']}')")
            until(page, f"{events}.split('replicas added on {victim['id']}').length > {seen}")
        with Wave(Client(deployment), [f"{n} Lo" for n in range(4)], 600):
            until(page, "/[1-9]/.test(document.getElementById('tile-tokens').textContent)")
        until(page, f"!{events}.includes('undefined')")
        assert complaints == []
