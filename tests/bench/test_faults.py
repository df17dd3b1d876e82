"""Faults do to processes what they say, and leave none stopped."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from raymoe.bench.faults import Fault, Faults, parse_fault
from raymoe.bench.sse import Endpoint
from raymoe.errors import ConfigError
from tests.gateway.conftest import wait_for


@pytest.fixture
def sleepers() -> Iterator[list[psutil.Popen]]:
    """Three processes that do nothing."""
    code = "import time; time.sleep(600)"
    running = [psutil.Popen([sys.executable, "-S", "-c", code]) for _ in range(3)]
    yield running
    for one in running:
        if one.poll() is None:
            one.kill()
            one.wait()


@asynccontextmanager
async def deployment(pids: list[int], posted: list[Any]) -> AsyncIterator[Endpoint]:
    """Answers /status with two groups and a router of these pids, and takes POSTs."""
    status = {
        "groups": [
            {"id": "g0", "pid": 0, "state": "loading"},
            {"id": "g1", "pid": pids[0], "state": "ready"},
        ],
        "routers": [{"id": "r0", "pid": pids[1], "state": "ready"}],
        "controller": {"pid": pids[2], "state": "ready"},
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        answer: Any = status
        if head.startswith(b"POST"):
            posted.append((head.split()[1], json.loads(await reader.read(1000))))
            answer = {}
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(answer).encode())
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield Endpoint.of(f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}")


def test_kill_stop_slow_and_drain(sleepers: list[psutil.Popen]) -> None:
    posted: list[Any] = []
    group, router, controller = sleepers
    seen: set[str] = set()

    async def main() -> list[tuple[float, str]]:
        async with deployment([one.pid for one in sleepers], posted) as endpoint:
            texts = ("0:kill:group", "0:stop:r0:0.3", "0:slow:controller:0.3:0.5", "0.1:drain:g1")
            faults = Faults(endpoint, [parse_fault(one) for one in texts], lambda said: None)
            await faults.check()
            loop = asyncio.get_running_loop()
            started = loop.time()
            running = asyncio.create_task(faults.run(lambda: loop.time() - started))
            while not running.done():
                seen.update(str(one.status()) for one in (router, controller))
                await asyncio.sleep(0.005)
            await running
            return faults.done

    done = asyncio.run(main())
    assert group.wait() == -9
    assert psutil.STATUS_STOPPED in seen
    for one in (router, controller):
        wait_for(lambda one=one: one.status() == psutil.STATUS_SLEEPING)
    assert posted == [(b"/drain", {"group": "g1"})]
    assert sorted(said.split(" ")[0] for _, said in done) == ["drain", "kill", "slow", "stop"]


def test_a_run_that_ends_leaves_nothing_stopped(sleepers: list[psutil.Popen]) -> None:
    async def main() -> None:
        async with deployment([one.pid for one in sleepers], []) as endpoint:
            faults = Faults(endpoint, [parse_fault("0:stop:router:600")], lambda said: None)
            running = asyncio.create_task(faults.run(lambda: 0.0))
            while sleepers[1].status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0.005)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    wait_for(lambda: sleepers[1].status() == psutil.STATUS_SLEEPING)


def test_targets_are_looked_for_before_the_load(sleepers: list[psutil.Popen]) -> None:
    async def main(target: str) -> None:
        async with deployment([one.pid for one in sleepers], []) as endpoint:
            fault = Fault(at_s=1, kind="kill", target=target)
            await Faults(endpoint, [fault], lambda said: None).check()

    for target in ("g0", "g7", "nobody"):
        with pytest.raises(ConfigError, match="there are g0, g1, r0 and controller"):
            asyncio.run(main(target))
    elsewhere = Faults(
        Endpoint.of("http://example.com"), [parse_fault("1:kill:group")], lambda said: None
    )
    with pytest.raises(ConfigError, match="this machine"):
        asyncio.run(elsewhere.check())


@pytest.mark.parametrize(
    "text",
    ["kill:group", "x:kill:group", "1:kill", "1:stop:group:0", "1:slow:group:1:1.5", "-1:kill:a"],
)
def test_bad_schedules(text: str) -> None:
    with pytest.raises(ConfigError, match="--fault"):
        parse_fault(text)


def test_a_schedule() -> None:
    assert parse_fault("20:slow:group-1:5:0.25") == Fault(
        at_s=20, kind="slow", target="group-1", seconds=5, share=0.25
    )
