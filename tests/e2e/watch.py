"""What is looked at all the time while a deployment is troubled, and what must not have grown."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from tests.e2e.conftest import Deployment

LOOK_S = 0.5


class Watch:
    """While the block runs: is every expert held by a group that lives?

    An expert that is not can be had from the checkpoint as long as groups live that have room for
    it, so it has to be back soon: `longest_s` counts the seconds that any expert was without such
    a replica while as many groups lived as hold everything. With fewer, it may have to wait.
    """

    def __init__(self, deployment: Deployment, enough: int) -> None:
        self._deployment, self._enough = deployment, enough
        self._without_s: dict[tuple[int, int], float] = {}
        self.longest_s = 0.0
        self.looks = self.lacking = 0  # looks, and those of them that found an expert without
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watching = self._thread.is_alive()
        self._stop.set()
        self._thread.join(60)
        if error is None:
            assert watching, "nobody looked to the end: see the thread's traceback"

    def _run(self) -> None:
        last = None
        while not self._stop.wait(LOOK_S):
            try:
                groups = self._deployment.get("/status")["groups"]
                layers = self._deployment.get("/placement")["layers"]
            except (OSError, http.client.HTTPException):  # the controller is away: nobody can tell
                last = None
                continue
            now = time.monotonic()
            living = {group["id"] for group in groups if runs(group["pid"])}
            self._look(living, layers, 0.0 if last is None else now - last)
            last = now

    def _look(self, living: set[str], layers: list[dict[str, Any]], seconds: float) -> None:
        without = {
            (layer["layer"], expert["expert"])
            for layer in layers
            for expert in layer["experts"]
            if not living & {replica["group"] for replica in expert["replicas"]}
        }
        self.looks += 1
        self.lacking += bool(without)
        if len(living) < self._enough:
            seconds = 0.0
        self._without_s = {key: self._without_s.get(key, 0.0) + seconds for key in without}
        self.longest_s = max(self.longest_s, *self._without_s.values(), 0.0)


def runs(pid: int) -> bool:
    """Whether there is such a process and it is neither stopped nor dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return pid > 0 and state not in "TtZX"


class Held(NamedTuple):
    """What a process has open: sockets, descriptors of all kinds, mapped shared memory."""

    sockets: int
    descriptors: int
    segments: int


def held(deployment: Deployment) -> dict[tuple[int, float], Held]:
    """Of raymoe's own processes (groups, routers, gateways), by pid and start."""
    found = {}
    for process in deployment.tree():
        with contextlib.suppress(psutil.Error, OSError):
            line = " ".join(process.cmdline())
            if "ExpertGroup" in line or "ServeReplica" in line:
                found[process.pid, process.create_time()] = _held(process.pid)
    return found


def _held(pid: int) -> Held:
    folder, sockets, descriptors = Path(f"/proc/{pid}/fd"), 0, 0
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            descriptors += 1
            sockets += os.readlink(folder / name).startswith("socket:")
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return Held(sockets, descriptors, len({m.split()[4] for m in maps if "/memfd:" in m}))


def grown(
    before: dict[tuple[int, float], Held], after: dict[tuple[int, float], Held], slack: Held
) -> dict[int, tuple[Held, Held]]:
    """Processes of before that have more than `slack` more of something."""
    return {
        key[0]: (before[key], after[key])
        for key in before.keys() & after.keys()
        if any(
            now > then + more
            for now, then, more in zip(after[key], before[key], slack, strict=True)
        )
    }
