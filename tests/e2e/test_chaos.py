"""Seeded chaos over the HTTP endpoint: whatever dies, comes, goes or freezes, streams go on.

The seed is printed, and RAYMOE_CHAOS_SEED sets it. Every event is waited out before the next, so
that the test is bounded by what happens and not by a clock. Before each the traffic turns to
another of the demo model's domains, so that other experts are wanted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import urllib.error
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Deployment, run_raymoe
from tests.e2e.streams import Streams
from tests.e2e.traffic import Client, wait_for
from tests.e2e.watch import Held, Watch, grown, held

pytestmark = pytest.mark.ray

DOMAINS = {
    "scripture": "And it came to pass in those days, that",
    "code": "def main(argv=None):\n    parser =",
    "proofs": "|- ( ph -> ( ps -> ch ) )",
    "plays": "ROMEO. Shall I hear more,",
}
EACH = 2  # prompts
PROMPTS = [f"{lead} {n}" for lead in DOMAINS.values() for n in range(EACH)]
WITHOUT_S = 60.0
"""An expert may be without a live replica for so long while enough groups live: a lost group is
started again and loads its experts in a few seconds, a frozen one is ended after
`placement.unreachable_s` (10), on a machine that is not as busy as this one gets."""
SLACK = Held(sockets=8, descriptors=16, segments=0)
"""For what Ray opens to new actors. What a proxy keeps open to a gateway for the next request, one
for each of our streams, it closes after some 20 s without any: that is waited for."""
LATE_S = 90.0


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

    def run(self, turn: Callable[[str], None]) -> None:
        """Every event once; `turn` leads the traffic to a domain."""
        kinds: list[Callable[[], None]] = [
            self.kill_one,
            self.kill_two,
            self.freeze,
            self.freeze_for_good,
            self.grow_and_shrink,
            self.drain_and_undo,
            self.kill_controller,
            self.kill_controller_and_group,
        ]
        self._random.shuffle(kinds)
        domain = ""
        for event in kinds:
            domain = self._random.choice([name for name in DOMAINS if name != domain])
            print(f"chaos: {event.__name__} while it reads {domain}", flush=True)
            turn(domain)
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
        """For less than it takes to be replaced."""
        pid = self.victims(1)[0]
        os.kill(pid, signal.SIGSTOP)
        thaw = threading.Timer(self._random.choice((1.0, 3.0)), _continue, (pid,))
        thaw.start()
        thaw.join()

    def freeze_for_good(self) -> None:
        """Until the controller has ended it, and its replacement is there."""
        pid = self.victims(1)[0]
        os.kill(pid, signal.SIGSTOP)

        def replaced() -> bool:
            return not psutil.pid_exists(pid) and pid not in {g["pid"] for g in self.groups()}

        assert wait_for(replaced, 150), self.groups()

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


def of_routers(chaos: Chaos, field: str) -> list[int]:
    """A count of each router's engine. `kv_used_blocks` are those that requests hold: what the
    prefix cache keeps for later can be taken at any time, and does not count."""
    return [router["profile"][field] for router in chaos.status()["routers"]]


@pytest.mark.timeout(900)
def test_streams_outlive_whatever_happens(deployment: Deployment) -> None:
    seed = int(os.environ.get("RAYMOE_CHAOS_SEED", time.time_ns() % 1_000_000))
    print(f"RAYMOE_CHAOS_SEED={seed}")
    chaos = Chaos(deployment, seed)
    assert wait_for(chaos.settled, 150)
    count = len(chaos.groups())
    domains = list(DOMAINS)
    client = Client(deployment)
    streams = Streams(client, PROMPTS, 60, threads=16)

    def turn(domain: str) -> None:
        first = EACH * domains.index(domain)
        streams.among = range(first, first + EACH)

    steps = sum(of_routers(chaos, "steps"))
    before = held(deployment)
    with Watch(deployment, count) as watch, streams:
        chaos.run(turn)
    print(
        f"{watch.lacking} of {watch.looks} looks found experts without a live replica; the longest "
        f"was {watch.longest_s:.1f} s while {count} groups lived"
    )
    assert watch.looks > 20
    assert watch.longest_s < WITHOUT_S
    assert len(chaos.groups()) == count

    def no_leak() -> bool:
        return group_processes(deployment) == {g["pid"] for g in chaos.groups()}

    assert wait_for(no_leak, 60), (group_processes(deployment), chaos.groups())
    # A router that tells of more steps tells of the time since.
    assert wait_for(lambda: sum(of_routers(chaos, "steps")) > steps, 60)
    assert wait_for(lambda: not any(of_routers(chaos, "kv_used_blocks")), 60), "blocks are held"
    client.close()
    fine = wait_for(lambda: not grown(before, held(deployment), SLACK), LATE_S)
    after = held(deployment)
    survived = before.keys() & after.keys()
    print(f"of {len(before)} processes {len(survived)} lived on:")
    for key in survived:
        print(f"  {before[key]} -> {after[key]}")
    assert survived, "routers and gateway"
    assert fine, grown(before, after, SLACK)
