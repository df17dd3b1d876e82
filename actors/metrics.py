"""Prometheus text of a whole deployment, and a copy of its status that is cheap to ask for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from time import monotonic
from typing import Any

from raymoe.errors import RaymoeError
from raymoe.gateway.metrics import Registry, Values, text_of
from raymoe.observe.catalogue import CATALOGUE
from raymoe.observe.ledger import Entry, merged, total

Status = Mapping[str, Any]
Labelled = dict[tuple[str, ...], float]
_OF_GROUP = ("deaths_total", "memory_bytes", "resident_bytes", "replicas", "speed", "queued_pairs")
_PARTS = {
    "engine_seconds_total": ("plan", "forward", "sample", "stalled"),
    "dispatch_seconds_total": ("dispatch", "wait", "combine"),
}
_OF_ROUTER = {
    "prefix_cache_queries_total": "prefix_queried_tokens",
    "prefix_cache_hits_total": "prefix_reused_tokens",
    "num_preemptions_total": "preemptions",
    "engine_steps_total": "steps",
    "router_retried_pairs_total": "retried_pairs",
    "router_nacks_total": "nacks",
    "router_errors_total": "errors",
    "router_deadlines_total": "deadlines",
    "router_links_lost_total": "links_lost",
}


def status_values(status: Status) -> dict[str, Labelled]:
    """Metrics of the controller's `status()`, by name in the catalogue."""
    values = dict(itertools.chain(_of_deployment(status), _of_routers(status["routers"])))
    groups, copies = status["groups"], status["copies"]
    values["group_up"] = {(g["id"],): int(g["state"] == "ready") for g in groups}
    for name in _OF_GROUP:
        field = name.removesuffix("_total")
        values[f"group_{name}"] = {(group["id"],): group[field] for group in groups}
    sources = (("group", "copied"), ("checkpoint", "loaded"))
    values["migrations_total"] = {(source,): copies[field] for source, field in sources}
    values["migrated_bytes_total"] = {
        (source,): copies[f"{field}_bytes"] for source, field in sources
    }
    values["migration_seconds_total"] = {(): copies["copy_s"]}
    values["migrations_failed_total"] = {(): copies["failed"]}
    return {f"raymoe_{name}": series for name, series in values.items()}


def _of_deployment(status: Status) -> Iterator[tuple[str, Labelled]]:
    for name in ("epoch", "term", "ready", "balancedness"):
        value = status[name]
        yield name, {} if value is None else {(): value}


def _of_routers(routers: list[Mapping[str, Any]]) -> Iterator[tuple[str, Labelled]]:
    used: Labelled = {}
    for router in routers:
        profile = router["profile"]
        used[router["id"],] = profile["kv_used_blocks"] / max(profile["kv_blocks"], 1)
    yield "kv_cache_usage_perc", used
    for name, field in _OF_ROUTER.items():
        yield name, {(router["id"],): router["profile"][field] for router in routers}
    for name, parts in _PARTS.items():
        yield (
            name,
            {(r["id"], part): r["profile"][f"{part}_s"] for r in routers for part in parts},
        )


class Scrapes:
    """What one gateway answers at /metrics: the same as every other gateway would.

    `exchange(gateway_id, entries, experts)` is the controller's: it gives {"entries", "live",
    "settled"}, and unless `experts` is None (nobody looks) "status" and "shown", or raises a
    RaymoeError when it does not answer. Then, and as long as a new controller has not heard all
    gateways, what other gateways count is not known: their sums are left out rather than shown too
    small, and `raymoe_controller_up` is 0.
    """

    def __init__(
        self,
        gateway_id: str,
        exchange: Callable[[str, dict[str, Entry], bool | None], Awaitable[dict[str, Any]]],
        *,
        patience_s: float = 1.0,
        beat_s: float = 2.0,
    ) -> None:
        self._id, self._exchange = gateway_id, exchange
        self._patience_s, self._beat_s = patience_s, beat_s
        self._seq = 0
        self._entries: dict[str, Entry] = {}
        self._live: set[str] = set()  # when last known for sure; empty: not yet

    async def text(self, own: Registry, experts: bool) -> str:
        """Prometheus text, within `patience_s` whatever the controller does."""
        answer = await self._ask(own, experts)
        counted: dict[str, Values] = {}
        if self._live == {self._id} or (answer is not None and answer["settled"]):
            counted = dict(total(self._entries, self._live))
        values: dict[str, Values] = {"raymoe_controller_up": {(): int(answer is not None)}}
        if answer is not None:
            values |= status_values(answer["status"]) | answer["shown"]
        order = (*own.values(), *(n for n in CATALOGUE if n not in own.values()))
        everything = counted | values
        return text_of({name: everything[name] for name in order if name in everything})

    async def beats(self, own: Registry) -> None:
        """Tells the controller of this gateway's numbers, for scrapes that reach another one."""
        while True:
            await self._ask(own, None)
            await asyncio.sleep(self._beat_s)

    async def _ask(self, own: Registry, experts: bool | None) -> dict[str, Any] | None:
        self._seq += 1
        mine = {"seq": self._seq, "values": own.values()}
        self._entries = merged(self._entries, {self._id: mine})
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._exchange(self._id, self._entries, experts)
        except (RaymoeError, TimeoutError):
            return None
        self._entries = merged(self._entries, answer["entries"])
        if answer["settled"]:
            self._live = set(answer["live"])
        return answer


class StatusCache:
    """The controller's `status()`, asked for once in `keep_s` however often it is wanted.

    `ask` raises a RaymoeError when the controller does not answer. Whoever wants the status waits
    for `patience_s` at most and gets the last one meanwhile: /health must not hang with a
    controller that is away.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Status]],
        *,
        keep_s: float = 2.0,
        patience_s: float = 0.5,
    ) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._patience_s = patience_s
        self._status: Status | None = None
        self._asked_s = -float("inf")
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> Status | None:
        """None when the controller did not answer."""
        if self._asking is None and monotonic() - self._asked_s >= self._keep_s:
            self._asking = asyncio.create_task(self._refresh())
        asking = self._asking
        if asking is not None:
            await asyncio.wait((asking,), timeout=self._patience_s)
            if asking.done():
                asking.result()  # raises what is a bug
        return self._status

    async def degraded(self) -> bool:
        """Whether an expert is known to have no ready replica."""
        status = await self.get()
        return status is not None and not status["ready"]

    async def _refresh(self) -> None:
        try:
            self._status = await self._ask()
        except RaymoeError:
            self._status = None
        finally:
            self._asked_s = monotonic()
            self._asking = None
