"""A deployment's status as Prometheus text, and a copy of it that is cheap to ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Any

from raymoe.errors import RaymoeError
from raymoe.gateway.metrics import Registry

Status = Mapping[str, Any]
_OF_GROUP = (
    ("deaths_total", "counter", "Lives of the group that have ended.", "deaths"),
    ("resident_bytes", "gauge", "Bytes of the experts it holds.", "resident_bytes"),
    ("replicas", "gauge", "Experts that it holds.", "replicas"),
    ("speed", "gauge", "Speed relative to the fastest group's.", "speed"),
)
_OF_ROUTER = (
    ("retried_pairs", "Pairs that went to another replica within their layer."),
    ("nacks", "Messages refused by a group without the experts asked for."),
    ("deadlines", "Links given up because a group did not answer in time."),
    ("links_lost", "Links to groups that were lost."),
    ("preemptions", "Requests that lost their KV blocks to others and were computed again."),
    ("prefix_queried_tokens", "Tokens of requests when they began."),
    ("prefix_reused_tokens", "Of those, tokens whose KV blocks were there already."),
)


def status_metrics(status: Status) -> str:
    """Prometheus text of the controller's `status()`."""
    registry = Registry()

    def put(name: str, text: str, values: Mapping[Any, float], *labels: str, kind: str) -> None:
        registry.reading(f"raymoe_{name}", text, lambda: values, labels, kind)

    balanced = status["balancedness"]
    put("epoch", "Epoch of the placement table.", {(): status["epoch"]}, kind="gauge")
    put("ready", "1 when every expert is ready.", {(): int(status["ready"])}, kind="gauge")
    put(
        "balancedness",
        "Ideal time of the load over the slowest groups'; 1 is perfect.",
        {} if balanced is None else {(): balanced},
        kind="gauge",
    )
    groups = status["groups"]
    up = {(group["id"],): int(group["state"] == "ready") for group in groups}
    put("group_up", "1 when the group has all its experts.", up, "group", kind="gauge")
    for name, kind, text, field in _OF_GROUP:
        of_groups = {(group["id"],): group[field] for group in groups}
        put(f"group_{name}", text, of_groups, "group", kind=kind)
    for field, text in _OF_ROUTER:
        of_routers = {(one["id"],): one["profile"][field] for one in status["routers"]}
        put(f"router_{field}_total", text, of_routers, "router", kind="counter")
    return registry.text()


class StatusCache:
    """The controller's `status()`, asked for once in `keep_s` however often it is wanted.

    `ask` raises a RaymoeError when the controller does not answer. Whoever wants the status waits
    for `patience_s` at most and gets the last one meanwhile: /health and /metrics must not hang
    with a controller that is away.
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

    async def metrics(self) -> str:
        """Prometheus text; empty when the controller did not answer."""
        status = await self.get()
        return "" if status is None else status_metrics(status)

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
