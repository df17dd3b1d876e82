"""Seeded chaos over the HTTP endpoint: whatever dies, comes, goes or freezes, streams go on.

The seed is printed, and RAYMOE_CHAOS_SEED sets it. Every event is waited out before the next, so
that the test is bounded by what happens and not by a clock.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Deployment, run_raymoe
from tests.e2e.streams import Streams
from tests.e2e.traffic import Client, wait_for

pytestmark = pytest.mark.ray

PROMPTS = [
    f"{lead} {n}"
    for lead in (
        "And it came to pass in those days, that",
        "def main(argv=None):\n    parser =",
        "|- ( ph -> ( ps -> ch ) )",
        "ROMEO. Shall I hear more,",
    )
    for n in range(2)
]
EVENTS = 7


class Chaos:
    """What can happen to a deployment, each event followed by its end."""

    def __init__(self, deployment: Deployment, seed: int) -> None:
        self._deployment, self._random = deployment, random.Random(seed)

    def status(self) -> dict[str, Any]:
        """As soon as the controller answers."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return dict(self._deployment.get("/status"))
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline, "no controller"
                time.sleep(0.2)

    def groups(self) -> list[dict[str, Any]]:
        return list(self.status()["groups"])

    def settled(self) -> bool:
        status = self.status()
        return bool(status["ready"]) and all(g["state"] == "ready" for g in status["groups"])

    def run(self, events: int) -> None:
        kinds: list[Callable[[], None]] = [
            self.kill_one,
            self.kill_two,
            self.freeze,
            self.grow_and_shrink,
            self.drain_and_undo,
            self.kill_controller,
            self.kill_controller_and_group,
        ]
        self._random.shuffle(kinds)
        for n in range(events):
            event = kinds[n % len(kinds)]
            print(f"chaos: {event.__name__}", flush=True)
            event()
            assert wait_for(self.settled, 150), f"after {event.__name__}: {self.groups()}"

    def raymoe(self, *arguments: str) -> None:
        done = run_raymoe(*arguments, "--port", str(self._deployment.port))
        assert done.returncode == 0, done.stderr

    def victims(self, count: int) -> list[int]:
        pids = [g["pid"] for g in self.groups() if g["pid"]]
        return self._random.sample(pids, min(count, len(pids)))

    def kill_one(self) -> None:
        os.kill(self.victims(1)[0], signal.SIGKILL)

    def kill_two(self) -> None:
        for pid in self.victims(2):
            os.kill(pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Until the controller has replaced it, or 3 s, by chance."""
        pid = self.victims(1)[0]
        os.kill(pid, signal.SIGSTOP)
        thaw = threading.Timer(self._random.choice((1.0, 3.0)), _continue, (pid,))
        thaw.start()
        thaw.join()

    def grow_and_shrink(self) -> None:
        count = len(self.groups())
        self.raymoe("scale", "--groups", str(count + 1))
        assert wait_for(lambda: len(self.groups()) == count + 1 and self.settled(), 150)
        self.raymoe("scale", "--groups", str(count))
        assert wait_for(lambda: len(self.groups()) == count, 150)

    def drain_and_undo(self) -> None:
        """In the middle: nobody waits until the group is empty."""
        count = len(self.groups())
        self.raymoe("scale", "--groups", str(count + 1))
        assert wait_for(lambda: len(self.groups()) == count + 1 and self.settled(), 150)
        group = self._random.choice(self.groups())["id"]
        self.raymoe("drain", group)
        self.raymoe("drain", group, "--undo")
        assert wait_for(self.settled, 150)
        self.raymoe("scale", "--groups", str(count))
        assert wait_for(lambda: len(self.groups()) == count, 150)

    def kill_controller(self) -> None:
        os.kill(self.status()["controller"]["pid"], signal.SIGKILL)
        time.sleep(1)  # until then the old one's answers may be on their way

    def kill_controller_and_group(self) -> None:
        pid = self.victims(1)[0]
        self.kill_controller()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _continue(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def group_processes(deployment: Deployment) -> set[int]:
    found = set()
    for process in deployment.tree():
        with contextlib.suppress(psutil.Error):
            if "ExpertGroup" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def kv_usage(deployment: Deployment) -> float:
    with urllib.request.urlopen(deployment.url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("raymoe_router_requests_running{")
    ]
    assert values, "no such metric"
    return sum(values)


@pytest.mark.timeout(900)
def test_streams_outlive_whatever_happens(deployment: Deployment) -> None:
    seed = int(os.environ.get("RAYMOE_CHAOS_SEED", time.time_ns() % 1_000_000))
    print(f"RAYMOE_CHAOS_SEED={seed}")
    chaos = Chaos(deployment, seed)
    assert wait_for(chaos.settled, 150)
    count = len(chaos.groups())
    with Streams(Client(deployment), PROMPTS, 60, threads=16):
        chaos.run(EVENTS)
    assert len(chaos.groups()) == count

    def no_leak() -> bool:
        return group_processes(deployment) == {g["pid"] for g in chaos.groups()}

    assert wait_for(no_leak, 60), (group_processes(deployment), chaos.groups())
    assert wait_for(lambda: kv_usage(deployment) == 0, 60), "requests still run"
