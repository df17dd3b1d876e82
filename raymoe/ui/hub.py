"""One poll of the controller for everybody who looks, and none when nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from time import monotonic
from typing import Any

from raymoe.errors import Overloaded, RaymoeError

log = logging.getLogger(__name__)
Ask = Callable[[int, float, list[int], bool], Awaitable[dict[str, Any]]]
_KEPT_EVENTS = 200
_KEPT_POINTS = 180


class Hub:
    """What is going on, for viewers of the page.

    `ask(since_seq, since_at, layers, why)` is the controller's view of what is new
    (`raymoe.observe.observer.Observer.view` with the status); it raises a RaymoeError when the
    controller does not answer. A viewer's first message holds everything, later ones what is new
    since its last: a slow one misses states, never events.
    """

    def __init__(
        self, ask: Ask, *, every_s: float = 1.0, most_viewers: int = 16, patience_s: float = 3.0
    ) -> None:
        self._ask = ask
        self._every_s, self._most, self._patience_s = every_s, most_viewers, patience_s
        self._viewers: Counter[int] = Counter()  # by the layer they look at
        self._polling: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()
        self._tick = 0
        self._state: dict[str, Any] | None = None  # None: the controller does not answer
        self._layers: dict[str, Any] = {}
        self._seq, self._at = 0, 0.0  # of the last event and point, as the controller numbers them
        self._made_events = self._made_points = 0  # all there ever were, for viewers' places
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)
        self._points: deque[dict[str, Any]] = deque(maxlen=_KEPT_POINTS)

    @property
    def viewers(self) -> int:
        return sum(self._viewers.values())

    async def view(self, layer: int, *, why: bool = False) -> dict[str, Any]:
        """Everything, once. Raises RouterUnavailable when the controller does not answer."""
        answer = await self._ask(0, 0.0, [layer], why)
        return {**_state_of(answer), **_kept(answer), "layer": _layer_of(answer["layers"], layer)}

    async def stream(self, layer: int) -> AsyncGenerator[bytes]:
        """Server-sent events, one each `every_s`, until the viewer goes. The first `anext` raises
        Overloaded when too many look already."""
        if self.viewers >= self._most:
            raise Overloaded(f"{self.viewers} viewers are looking already; close one, or wait")
        self._viewers[layer] += 1
        try:
            tick = -1
            if self._polling is None or self._polling.done():
                tick = self._tick  # what is known is old
                self._polling = asyncio.create_task(self._poll(), name="raymoe-ui-poll")
            events, points = None, None
            while True:
                async with self._news:
                    while self._tick == tick or not self._fits(layer):
                        await self._news.wait()
                tick = self._tick
                message = self._message(layer, events, points)
                events, points = self._made_events, self._made_points
                yield message
        finally:
            self._viewers[layer] -= 1
            if not self._viewers[layer]:
                del self._viewers[layer]

    def _fits(self, layer: int) -> bool:
        """There is something to show of this layer, or nothing to be had."""
        return self._state is None or str(layer) in self._layers

    async def _poll(self) -> None:
        while self.viewers:
            started = monotonic()
            await self._look()
            await asyncio.sleep(max(self._every_s - (monotonic() - started), self._every_s / 4))

    async def _look(self) -> None:
        layers = sorted(self._viewers)
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._ask(self._seq, self._at, layers, False)
        except (RaymoeError, TimeoutError):
            self._state = None
        except Exception:
            log.exception("the controller's view cannot be had")
            self._state = None
        else:
            self._state, self._layers = _state_of(answer), answer["layers"]
            self._seq = answer["seq"]
            self._events.extend(answer["events"])
            self._points.extend(answer["history"])
            self._made_events += len(answer["events"])
            self._made_points += len(answer["history"])
            if answer["history"]:
                self._at = answer["history"][-1]["at"]
        async with self._news:
            self._tick += 1
            self._news.notify_all()

    def _message(self, layer: int, events: int | None, points: int | None) -> bytes:
        """events, points: how many of all there ever were this viewer has seen; None: nothing."""
        message: dict[str, Any] = {"controller": self._state is not None, "full": events is None}
        if self._state is not None:
            message |= self._state
            message["layer"] = _layer_of(self._layers, layer)
        message["events"] = _unseen(self._events, self._made_events, events)
        message["history"] = _unseen(self._points, self._made_points, points)
        return b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"


def _state_of(answer: dict[str, Any]) -> dict[str, Any]:
    kept = ("status", "layer_balancedness", "group_load", "latency_s", "plans", "last_plan")
    return {name: answer[name] for name in (*kept, "layer_count")}


def _kept(answer: dict[str, Any]) -> dict[str, Any]:
    return {"events": answer["events"][-_KEPT_EVENTS:], "history": answer["history"]}


def _layer_of(layers: dict[str, Any], layer: int) -> dict[str, Any]:
    return {"index": layer, **layers.get(str(layer), {"groups": [], "load": [], "replicas": []})}


def _unseen(kept: deque[Any], made: int, seen: int | None) -> list[Any]:
    new = len(kept) if seen is None else min(made - seen, len(kept))
    return list(kept)[len(kept) - new :]
