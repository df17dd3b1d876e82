"""Requests to a router's engine, and what it publishes of them."""

from __future__ import annotations

import threading
from typing import Any

from raymoe.requests import GenerationRequest, SamplingParams, TokenEvent

PATIENCE_S = 180.0


def request(name: str, prompt: tuple[int, ...], **sampling: Any) -> GenerationRequest:
    fields = {"seed": 7, "max_tokens": 20, "ignore_eos": True, **sampling}
    return GenerationRequest(request_id=name, prompt_ids=prompt, sampling=SamplingParams(**fields))


class Heard:
    """What the engine publishes."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._events: dict[str, list[TokenEvent]] = {}
        self.dead = threading.Event()

    def __call__(self, events: Any) -> None:
        with self._news:
            for event in events:
                self._events.setdefault(event.request_id, []).append(event)
            self._news.notify_all()

    def of(self, name: str) -> list[TokenEvent]:
        with self._news:
            return list(self._events.get(name, ()))

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.of(name) for token in event.token_ids]

    def wait(self, name: str, tokens: int | None = None) -> list[int]:
        """Until it has ended, or has so many tokens."""

        def there() -> bool:
            events = self._events.get(name, ())
            if tokens is not None and sum(len(e.token_ids) for e in events) >= tokens:
                return True
            return bool(events) and events[-1].finish is not None

        with self._news:
            assert self._news.wait_for(there, PATIENCE_S), f"{name} does not go on"
        return self.tokens(name)
