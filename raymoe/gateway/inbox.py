"""Where the events of one HTTP request's choices wait for the task that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raymoe.requests import TokenEvent


class ClientGone(Exception):
    """The client has closed its connection: nobody reads the answer."""


class Inbox:
    """Filled by callbacks of the event loop, emptied by one task; no locks, no queues."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[tuple[int, TokenEvent]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def deliver_to(self, index: int) -> Callable[[TokenEvent], None]:
        """The callback of choice `index`."""

        def deliver(event: TokenEvent) -> None:
            self._events.append((index, event))
            self._wake()

        return deliver

    def fail(self, error: Exception) -> None:
        """`take` raises it, after what has arrived before. The first one counts."""
        self._error = self._error or error
        self._wake()

    async def take(self) -> list[tuple[int, TokenEvent]]:
        """All that has arrived, at least one event: (choice index, event), in order.

        Raises what was given to `fail`.
        """
        if not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if not self._events:
                assert self._error is not None
                raise self._error
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
