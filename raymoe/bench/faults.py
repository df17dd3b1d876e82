"""Faults in a local deployment while load runs: kill, stop, slow or drain, at given seconds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymoe.bench.sse import BadAnswer, Endpoint, get_json, post_json
from raymoe.errors import ConfigError

KINDS = ("kill", "stop", "slow", "drain")
_SLOW_PERIOD_S = 0.05
_LOCAL = ("localhost", "::1")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """target: the id of a group or router, "controller", or "group" / "router": the first ready
    one. seconds: how long it is stopped or slow; share: of that time, stopped (slow only)."""

    at_s: float
    kind: str
    target: str
    seconds: float = 5.0
    share: float = 0.5


def parse_fault(text: str) -> Fault:
    """ "20:kill:group", "20:stop:group-1:5", "20:slow:router:10:0.5". Raises ConfigError."""
    parts = text.split(":")
    form = "SECONDS:KIND:TARGET[:FOR_SECONDS[:SHARE]]"
    if not 3 <= len(parts) <= 5:
        raise ConfigError(f"--fault {text!r} is not {form}")
    at, kind, target, *more = parts
    if kind not in KINDS:
        raise ConfigError(f"--fault {text!r}: there is no {kind!r}; there are {', '.join(KINDS)}")
    try:
        numbers = [float(at), *map(float, more)]
    except ValueError:
        raise ConfigError(f"--fault {text!r} is not {form}") from None
    fault = Fault(at_s=numbers[0], kind=kind, target=target, **_named(numbers[1:]))
    if fault.at_s < 0 or fault.seconds <= 0 or not 0 < fault.share < 1:
        raise ConfigError(f"--fault {text!r}: seconds must be positive, the share below 1")
    return fault


def _named(numbers: list[float]) -> dict[str, float]:
    return dict(zip(("seconds", "share"), numbers, strict=False))


class Faults:
    """Carries faults out. `done` lists what was done, as (second, sentence)."""

    def __init__(
        self,
        endpoint: Endpoint,
        faults: Sequence[Fault],
        say: Say,
        admin_token: str | None = None,
    ) -> None:
        """admin_token: for draining, where the deployment asks for one."""
        self._admin = replace(endpoint, api_key=admin_token)
        self.done: list[tuple[float, str]] = []
        self._endpoint = endpoint
        self._faults = sorted(faults, key=lambda fault: fault.at_s)
        self._say = say
        self._stopped: set[int] = set()

    async def check(self) -> None:
        """Before the load starts: every target is there. Raises ConfigError."""
        if not self._faults:
            return
        host = self._endpoint.host
        if host not in _LOCAL and not host.startswith("127."):
            raise ConfigError(f"faults need a deployment on this machine, not on {host}")
        for fault in self._faults:
            await self._pid(fault.target)

    async def run(self, now: Callable[[], float]) -> None:
        """All of them, each at its second of `now`."""
        try:
            async with asyncio.TaskGroup() as group:
                for fault in self._faults:
                    group.create_task(self._one(fault, now))
        finally:
            for pid in self._stopped:  # whatever ends the run, nothing stays stopped
                _signal(pid, signal.SIGCONT)

    async def _one(self, fault: Fault, now: Callable[[], float]) -> None:
        await asyncio.sleep(max(0.0, fault.at_s - now()))
        try:
            name, pid = await self._pid(fault.target)
            if fault.kind == "drain":
                await post_json(self._admin, "/drain", {"group": name})
        except (BadAnswer, ConfigError, OSError) as error:
            self._note(now(), f"{fault.kind} {fault.target} failed: {error}")
            return
        said = f"{fault.kind} {name}" + ("" if fault.kind == "drain" else f" (pid {pid})")
        if fault.kind in ("stop", "slow"):
            said += f" for {fault.seconds:g} s"
        self._note(now(), said)
        if fault.kind == "kill":
            _signal(pid, signal.SIGKILL)
        elif fault.kind != "drain":
            await self._hold(pid, fault)

    async def _hold(self, pid: int, fault: Fault) -> None:
        """Stopped for the whole time, or again and again for its share of it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + fault.seconds
        share = 1.0 if fault.kind == "stop" else fault.share
        period = fault.seconds if fault.kind == "stop" else _SLOW_PERIOD_S
        self._stopped.add(pid)
        try:
            while (left := end - loop.time()) > 0:
                _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(min(left, period * share))
                _signal(pid, signal.SIGCONT)
                await asyncio.sleep(period * (1 - share))
        finally:
            _signal(pid, signal.SIGCONT)
            self._stopped.discard(pid)

    async def _pid(self, target: str) -> tuple[str, int]:
        """Id and pid of a target, as /status says now."""
        status = await _status(self._endpoint)
        if target == "controller":
            return target, int(status["controller"]["pid"])
        for one in (*status["groups"], *status["routers"]):
            kind = "group" if one in status["groups"] else "router"
            if one["state"] == "ready" and target in (one["id"], kind):
                return str(one["id"]), int(one["pid"])
        ids = [one["id"] for one in (*status["groups"], *status["routers"])]
        raise ConfigError(f"no ready {target!r}; there are {', '.join(ids)} and controller")

    def _note(self, at_s: float, said: str) -> None:
        self.done.append((at_s, said))
        self._say(f"{at_s:.1f} s: {said}")


async def _status(endpoint: Endpoint) -> dict[str, Any]:
    try:
        status = await get_json(endpoint, "/status")
        status["groups"], status["routers"], status["controller"]["pid"]
    except (BadAnswer, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{endpoint.url} is no raymoe deployment: {error}") from None
    return dict(status)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended since
        pass
