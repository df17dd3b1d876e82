"""The run of one HTTP request: its choices opened at the backend, their deltas as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from raymoe.errors import RaymoeError
from raymoe.gateway.backend import Backend, Generation
from raymoe.gateway.choice import Choice, Delta
from raymoe.gateway.errors import ApiError, api_error, event_error
from raymoe.gateway.inbox import ClientGone, Inbox
from raymoe.gateway.life import Life
from raymoe.gateway.observe import GatewayMetrics

Receive = Callable[[], Awaitable[Any]]
Batch = list[tuple[Choice, Delta]]


class Answer:
    """Opens every choice, then gives `next()` batches until all have ended.

    Whoever makes one calls `close()` in the end, whatever happens: that cancels what is still
    being generated. A client that goes away ends the answer with ClientGone.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: GatewayMetrics,
        choices: Sequence[Choice],
        prompt_tokens: int,
        timeout_s: float | None,
        life: Life,
    ) -> None:
        self.choices = choices
        for choice in choices:
            choice.request = replace(choice.request, origin=life.origin)
        self._life = life
        self._how = "aborted"  # how it ended, unless it finishes or fails
        self.prompt_tokens = prompt_tokens
        self._backend = backend
        self._metrics = metrics
        self.timeout_s = timeout_s
        self._inbox = Inbox()
        self._generations: list[Generation] = []
        self._unfinished = len(choices)
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._last_token = [0.0] * len(choices)  # monotonic seconds; 0: none yet
        self._closed = False

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def ended(self) -> bool:
        return self._unfinished == 0

    def start(self, receive: Receive) -> None:
        """Sends the choices off. `receive` is ASGI's, with the body already read.

        Raises Overloaded when there are too many; nothing is open then.
        """
        self._backend.admit(len(self.choices))
        for at, choice in enumerate(self.choices):
            self._generations.append(
                self._backend.open(choice.request, self._inbox.deliver_to(at), self._inbox.fail)
            )
        self._metrics.prompt_tokens.add(self.prompt_tokens)
        self._life.started(self.prompt_tokens, len(self.choices))
        self._watcher = asyncio.create_task(self._watch(receive))
        if self.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.timeout_s, self._inbox.fail, TimeoutError())

    async def next(self) -> Batch:
        """What has come since: (choice, delta) for each event, at least one; in order.

        Raises ApiError when it cannot be finished and ClientGone when nobody reads it.
        """
        try:
            events = await self._inbox.take()
        except TimeoutError:
            self._how = f"the request took longer than {self.timeout_s:g} s"
            raise ApiError(504, self._how, code="request_timeout") from None
        except RaymoeError as error:
            self._how = str(error)
            raise api_error(error) from error
        now = time.monotonic()
        if self._first_token is None:
            self._first_token = now
            self._metrics.first_token_s.observe(now - self._started)
        batch: Batch = []
        for at, event in events:
            choice = self.choices[at]
            if choice.finish is not None:
                continue  # it ended at a stop string; this was on its way
            if event.finish == "error":
                self._how = event.error or "error"
                raise event_error(event)
            self._metrics.generation_tokens.add(len(event.token_ids))
            if self._last_token[at]:
                self._metrics.between_tokens_s.observe(now - self._last_token[at])
            self._last_token[at] = now
            delta = choice.take(event)
            if delta.finish is not None:
                self._unfinished -= 1
                self._metrics.finished.add(1, (delta.finish,))
                if event.finish is None:
                    self._generations[at].cancel()
            batch.append((choice, delta))
        return batch

    def close(self) -> None:
        """Cancels what has not ended. Repeatable."""
        if self._closed:
            return
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for choice, generation in zip(self.choices, self._generations, strict=False):
            if choice.finish is None:
                generation.cancel()
                self._metrics.finished.add(1, ("abort",))
        now = time.monotonic()
        if self.ended:
            self._observe_end(now)
        first_s = None if self._first_token is None else self._first_token - self._started
        self._life.ended(
            "finished" if self.ended else self._how,
            {
                "tokens": self.completion_tokens,
                "finish": ",".join(choice.finish or "abort" for choice in self.choices),
                "first_token_s": None if first_s is None else round(first_s, 4),
                "seconds": round(now - self._started, 4),
            },
        )

    def _observe_end(self, now: float) -> None:
        self._metrics.request_s.observe(now - self._started)
        self._metrics.request_prompt_tokens.observe(self.prompt_tokens)
        self._metrics.request_generation_tokens.observe(self.completion_tokens)
        longest = max((choice.completion_tokens for choice in self.choices), default=0)
        if self._first_token is not None and longest > 1:
            self._metrics.per_token_s.observe((now - self._first_token) / (longest - 1))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._inbox.fail(ClientGone())
