"""The status as Prometheus text, made from rows as the controller makes them; no Ray here."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any
from unittest.mock import MagicMock

import pytest

from actors.metrics import StatusCache, status_metrics
from actors.views import group_row, router_rows
from raymoe.client.stats import ClientStats
from raymoe.engine.stats import EngineStats
from raymoe.errors import RouterUnavailable


def group(name: str, state: str, **changes: Any) -> dict[str, Any]:
    row = {"id": name, "state": state, "speed": 1.0, "resident_bytes": 4096, "replicas": 8}
    return {**row, "deaths": 0, **changes}


def status(**changes: Any) -> dict[str, Any]:
    profile = {**asdict(EngineStats()), **asdict(ClientStats(retried_pairs=5, nacks=2))}
    rows: dict[str, Any] = {
        "ready": True,
        "epoch": 7,
        "balancedness": 0.875,
        "groups": [group("g0", "ready"), group("g1", "lost", deaths=3, speed=0.5, replicas=0)],
        "routers": [{"id": 'r"0', "profile": profile}],
    }
    return {**rows, **changes}


def values(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    return dict(tuple(line.rsplit(" ", 1)) for line in lines)  # type: ignore[misc]


def test_every_row_of_the_status_shows() -> None:
    text = status_metrics(status())
    assert values(text) == {
        "raymoe_epoch": "7",
        "raymoe_ready": "1",
        "raymoe_balancedness": "0.875",
        'raymoe_group_up{group="g0"}': "1",
        'raymoe_group_up{group="g1"}': "0",
        'raymoe_group_deaths_total{group="g0"}': "0",
        'raymoe_group_deaths_total{group="g1"}': "3",
        'raymoe_group_resident_bytes{group="g0"}': "4096",
        'raymoe_group_resident_bytes{group="g1"}': "4096",
        'raymoe_group_replicas{group="g0"}': "8",
        'raymoe_group_replicas{group="g1"}': "0",
        'raymoe_group_speed{group="g0"}': "1",
        'raymoe_group_speed{group="g1"}': "0.5",
        'raymoe_router_retried_pairs_total{router="r\\"0"}': "5",
        'raymoe_router_nacks_total{router="r\\"0"}': "2",
        'raymoe_router_deadlines_total{router="r\\"0"}': "0",
        'raymoe_router_links_lost_total{router="r\\"0"}': "0",
        'raymoe_router_preemptions_total{router="r\\"0"}': "0",
        'raymoe_router_prefix_queried_tokens_total{router="r\\"0"}': "0",
        'raymoe_router_prefix_reused_tokens_total{router="r\\"0"}': "0",
    }
    for name in values(text):
        bare = name.partition("{")[0]
        kind = "counter" if bare.endswith("_total") else "gauge"
        assert text.count(f"# TYPE {bare} {kind}\n") == 1
    assert text.endswith("\n")


def test_a_deployment_that_starts_has_metrics_too() -> None:
    empty = status(ready=False, epoch=0, balancedness=None, groups=[], routers=[])
    assert values(status_metrics(empty)) == {"raymoe_epoch": "0", "raymoe_ready": "0"}


def test_the_controllers_rows_have_what_is_shown() -> None:
    assert set(group("g0", "ready")) <= set(group_row(MagicMock()))
    assert {"id", "profile"} <= set(*map(set, router_rows([MagicMock()])))


class Controller:
    """Answers what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: dict[str, Any] | Exception = status()
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self) -> dict[str, Any]:
        self.asked += 1
        await self.free.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_controller_is_asked_once_for_many() -> None:
    async def main() -> None:
        controller = Controller()
        cache = StatusCache(controller, keep_s=3600.0)
        texts = await asyncio.gather(*(cache.metrics() for _ in range(9)))
        assert set(texts) == {status_metrics(status())}
        controller.answer = status(ready=False)
        assert not await cache.degraded()
        assert controller.asked == 1

    asyncio.run(main())


def test_a_lost_expert_shows_and_a_lost_controller_is_no_error() -> None:
    async def main() -> None:
        controller = Controller()
        cache = StatusCache(controller, keep_s=0.0)
        assert not await cache.degraded()
        controller.answer = status(ready=False)
        assert await cache.degraded()
        assert "raymoe_ready 0\n" in await cache.metrics()
        controller.answer = RouterUnavailable("the controller restarts")
        assert await cache.metrics() == ""
        assert not await cache.degraded()
        controller.answer = RuntimeError("a bug")
        with pytest.raises(RuntimeError):
            await cache.get()

    asyncio.run(main())


def test_nobody_waits_for_a_controller_that_hangs() -> None:
    async def main() -> None:
        controller = Controller()
        cache = StatusCache(controller, keep_s=0.0, patience_s=0.01)
        controller.free.clear()
        assert await cache.metrics() == ""
        controller.free.set()
        await asyncio.sleep(0)
        assert await cache.metrics() != ""
        controller.free.clear()
        controller.answer = status(ready=False)
        assert not await cache.degraded()  # what was known last
        assert not await cache.degraded()
        assert controller.asked == 3  # one question at a time
        controller.free.set()
        assert await cache.degraded()

    asyncio.run(main())
