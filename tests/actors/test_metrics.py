"""The status as Prometheus text, made from rows as the controller makes them; no Ray here."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from actors.executor import CopyStats
from actors.metrics import Scrapes, StatusCache, status_values
from actors.ray_metrics import RayMetrics
from actors.views import group_row, router_rows
from placement.table import Table
from raymoe.client.stats import ClientStats
from raymoe.engine.stats import EngineStats
from raymoe.errors import RouterUnavailable
from raymoe.gateway.metrics import Registry, text_of
from raymoe.observe.catalogue import CATALOGUE, ON_DEMAND, PLACEMENT, ROUTERS
from raymoe.observe.ledger import Ledger
from raymoe.observe.observer import Observer


def group(name: str, state: str, **changes: Any) -> dict[str, Any]:
    row = {"id": name, "state": state, "speed": 1.0, "resident_bytes": 4096, "replicas": 8}
    return {**row, "deaths": 0, "memory_bytes": 8192, "queued_pairs": 3, **changes}


def status(**changes: Any) -> dict[str, Any]:
    profile = {
        **asdict(EngineStats(steps=9, forward_s=1.5, prefix_reused_tokens=32)),
        **asdict(ClientStats(retried_pairs=5, nacks=2, wait_s=0.25)),
        "kv_used_blocks": 3,
        "kv_blocks": 12,
    }
    rows: dict[str, Any] = {
        "ready": True,
        "term": 1,
        "epoch": 7,
        "balancedness": 0.875,
        "groups": [group("g0", "ready"), group("g1", "lost", deaths=3, speed=0.5, replicas=0)],
        "routers": [{"id": 'r"0', "profile": profile}],
        "copies": vars(CopyStats(copied=4, copied_bytes=400, loaded=1, copy_s=0.5)),
    }
    return {**rows, **changes}


def values(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    return dict(tuple(line.rsplit(" ", 1)) for line in lines)  # type: ignore[misc]


def test_every_row_of_the_status_shows() -> None:
    text = text_of(status_values(status()))
    shown = values(text)
    wanted = {
        "raymoe_epoch": "7",
        "raymoe_ready": "1",
        "raymoe_balancedness": "0.875",
        'raymoe_group_up{group="g0"}': "1",
        'raymoe_group_up{group="g1"}': "0",
        'raymoe_group_deaths_total{group="g1"}': "3",
        'raymoe_group_memory_bytes{group="g0"}': "8192",
        'raymoe_group_resident_bytes{group="g1"}': "4096",
        'raymoe_group_replicas{group="g0"}': "8",
        'raymoe_group_queued_pairs{group="g0"}': "3",
        'raymoe_group_speed{group="g1"}': "0.5",
        'raymoe_kv_cache_usage_perc{router="r\\"0"}': "0.25",
        'raymoe_prefix_cache_hits_total{router="r\\"0"}': "32",
        'raymoe_engine_steps_total{router="r\\"0"}': "9",
        'raymoe_engine_seconds_total{router="r\\"0",part="forward"}': "1.5",
        'raymoe_dispatch_seconds_total{router="r\\"0",part="wait"}': "0.25",
        'raymoe_router_retried_pairs_total{router="r\\"0"}': "5",
        'raymoe_router_nacks_total{router="r\\"0"}': "2",
        'raymoe_migrations_total{source="group"}': "4",
        'raymoe_migrations_total{source="checkpoint"}': "1",
        'raymoe_migrated_bytes_total{source="group"}': "400",
        "raymoe_migration_seconds_total": "0.5",
    }
    assert {name: shown.get(name) for name in wanted} == wanted
    for name in shown:
        bare = name.partition("{")[0]
        kind = "counter" if bare.endswith("_total") else "gauge"
        assert text.count(f"# TYPE {bare} {kind}\n") == 1


def test_what_the_controller_shows_is_what_the_catalogue_says_of_it() -> None:
    observer = Observer()
    load = np.ones((1, 1))
    one = np.ones(1)
    table = Table(
        term=1,
        epoch=1,
        group_ids=("g0",),
        resident=np.ones((1, 1, 1), np.bool_),
        share=np.ones((1, 1, 1)),
        speed=one,
        alpha_s=one,
        gamma_s=one,
    )
    observer.look(
        {**status(), "groups": []}, table, load, {}, lambda _: (0, ""), {}, now=2.0, at=2.0
    )
    shown = {*status_values(status()), *observer.shown(experts=True), "raymoe_controller_up"}
    assert shown == {s.name for s in (*ROUTERS, *PLACEMENT, *ON_DEMAND)}


def test_a_deployment_that_starts_has_metrics_too() -> None:
    empty = status(ready=False, epoch=0, balancedness=None, groups=[], routers=[])
    shown = values(text_of(status_values(empty)))
    assert shown["raymoe_ready"] == "0" and "raymoe_balancedness" not in shown


def test_the_controllers_rows_have_what_is_shown() -> None:
    assert set(group("g0", "ready")) <= set(group_row(MagicMock()))
    assert {"id", "profile"} <= set(*map(set, router_rows([MagicMock()])))


class Told:
    """A controller's side of `exchange`: the real ledger, a status, and a time that is set."""

    def __init__(self) -> None:
        self.now, self.away = 0.0, False
        self.ledger = Ledger(self.now, restarted=False)

    async def __call__(self, gateway_id: str, entries: Any, experts: bool) -> dict[str, Any]:
        if self.away:
            raise RouterUnavailable("the controller restarts")
        answer = self.ledger.exchange(gateway_id, entries, self.now)
        shown = {"raymoe_expert_load": {("0", "1"): 2.5}} if experts else {}
        return {**answer, "status": status(), "shown": shown}


def test_whichever_gateway_is_asked_counters_are_those_of_all() -> None:
    async def main() -> None:
        told = Told()
        registries = [Registry(), Registry()]
        counters = [registry.counter("generation_tokens_total") for registry in registries]
        gateways = [Scrapes(f"gateway-{i}", told) for i in range(2)]

        async def shown(i: int, experts: bool = False) -> dict[str, str]:
            return values(await gateways[i].text(registries[i], experts))

        counters[0].add(10)
        await shown(0)
        counters[1].add(5)
        name = "raymoe_generation_tokens_total"
        assert (await shown(1))[name] == (await shown(0))[name] == "15"
        assert 'raymoe_expert_load{layer="0",expert="1"}' not in await shown(0)
        assert (await shown(0, True))['raymoe_expert_load{layer="0",expert="1"}'] == "2.5"

        told.away = True  # what the other has counted since is not known: no sum at all
        alone = await shown(1)
        assert name not in alone and alone["raymoe_controller_up"] == "0"
        told.away, told.ledger = False, Ledger(told.now, restarted=True)
        assert name not in await shown(1)
        told.now += 6
        counters[0].add(1)
        assert (await shown(0))[name] == (await shown(1))[name] == "16"

        told.now += 60  # the first has ended: what it counted stays
        assert (await shown(1))[name] == "16"
        told.away = True
        counters[1].add(1)
        assert (await shown(1))[name] == "17", "alone it needs no controller"

    asyncio.run(main())


def test_a_scrape_does_not_wait_for_a_controller_that_hangs() -> None:
    async def main() -> None:
        async def hang(*_: Any) -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        registry = Registry()
        registry.counter("generation_tokens_total").add(3)
        text = await Scrapes("gateway", hang, patience_s=0.01).text(registry, False)
        assert values(text) == {"raymoe_controller_up": "0"}, "there may be other gateways"

    asyncio.run(main())


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
        assert await asyncio.gather(*(cache.get() for _ in range(9))) == [status()] * 9
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
        controller.answer = RouterUnavailable("the controller restarts")
        assert await cache.get() is None
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
        assert await cache.get() is None
        controller.free.set()
        await asyncio.sleep(0)
        assert await cache.get() is not None
        controller.free.clear()
        controller.answer = status(ready=False)
        assert not await cache.degraded()  # what was known last
        assert not await cache.degraded()
        assert controller.asked == 3  # one question at a time
        controller.free.set()
        assert await cache.degraded()

    asyncio.run(main())


class FakeRayMetric:
    """As ray.util.metrics has them: what was set or added, by tags."""

    def __init__(self, kind: str, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.kind, self.name, self.tag_keys = kind, name, tag_keys
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.kind == "gauge" and set(tags) == set(self.tag_keys)
        self.values[tuple(sorted(tags.items()))] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.kind == "counter" and set(tags) == set(self.tag_keys) and value > 0
        key = tuple(sorted(tags.items()))
        self.values[key] = self.values.get(key, 0.0) + value


def test_rays_agents_are_told_what_metrics_shows() -> None:
    made: dict[str, FakeRayMetric] = {}

    def make(kind: str, name: str, text: str, tag_keys: tuple[str, ...]) -> FakeRayMetric:
        made[name] = FakeRayMetric(kind, name, text, tag_keys)
        return made[name]

    def shown(name: str, **tags: str) -> float | None:
        return made[name].values.get(tuple(sorted({**tags, "deployment": "d"}.items())))

    told = RayMetrics("d", make)
    assert told.due(0.0)
    own = Registry()
    own.histogram("time_to_first_token_seconds").observe(0.3)
    own.counter("generation_tokens_total").add(5)
    told.tell({**own.values(), **status_values(status())}, 0.0)
    assert not told.due(1.0) and told.due(60.0)
    assert shown("raymoe_epoch") == 7 and shown("raymoe_group_up", group="g0") == 1
    assert shown("raymoe_migrations_total", source="group") == 4
    first = "raymoe_time_to_first_token_seconds"
    assert shown(f"{first}_bucket", le="0.25") == 0 and shown(f"{first}_bucket", le="+Inf") == 1
    assert shown(f"{first}_sum") == 0.3 and shown(f"{first}_count") == 1
    own.counter("generation_tokens_total").add(3)  # made anew: it has 3 now
    told.tell({**own.values(), **status_values(status(groups=[group("g0", "ready")]))}, 9.0)
    assert shown("raymoe_generation_tokens_total") == 5, "never runs backwards"
    own.counter("generation_tokens_total").add(7)
    told.tell(own.values(), 18.0)
    assert shown("raymoe_generation_tokens_total") == 9, "and goes on from there"
    assert shown("raymoe_group_replicas", group="g0") == 0, "it is no longer there"
    assert shown("raymoe_group_deaths_total", group="g1") == 3
    for metric in made.values():
        whole = re.sub("_(bucket|sum|count)$", "", metric.name)
        assert {whole, metric.name} & CATALOGUE.keys()


def test_a_beat_does_not_ask_for_what_nobody_looks_at() -> None:
    asked: list[bool | None] = []

    async def exchange(gateway_id: str, entries: Any, experts: bool | None) -> dict[str, Any]:
        asked.append(experts)
        return {"entries": entries, "live": [gateway_id], "settled": True}

    async def main() -> None:
        beating = asyncio.create_task(Scrapes("a", exchange, beat_s=0.001).beats(Registry()))
        while len(asked) < 2:
            await asyncio.sleep(0.001)
        beating.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert set(asked) == {None}
