"""What the HTTP side needs of the routers: one small seam, so that tests can put a fake there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from raymoe.errors import RaymoeError
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.messages import Load, ModelInfo


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """One connected router, for /metrics and for operators."""

    router_id: str
    pid: int
    load: Load
    own_requests: int


class Generation(Protocol):
    """One choice being generated."""

    def cancel(self) -> None:
        """Stops it everywhere; nothing is delivered any more. Repeatable, also after the end."""


class Backend(Protocol):
    """Generates tokens somewhere. All calls from the gateway's event loop."""

    @property
    def ready(self) -> bool:
        """Whether a request could be answered now."""

    @property
    def in_flight(self) -> int:
        """Choices being generated."""

    @property
    def max_in_flight(self) -> int: ...

    @property
    def resubmitted(self) -> int:
        """How often a request went on at another router, since the start."""

    def routers(self) -> list[RouterState]: ...

    async def start(self) -> None:
        """Repeatable."""

    async def close(self) -> None: ...

    async def model_info(self) -> ModelInfo:
        """Raises RouterUnavailable when no router was seen in time."""

    def admit(self, count: int) -> None:
        """Raises Overloaded when `count` more requests are too many."""

    def open(
        self,
        request: GenerationRequest,
        deliver: Callable[[TokenEvent], None],
        fail: Callable[[RaymoeError], None],
    ) -> Generation:
        """Starts one choice. `deliver` gets every event until the one with `finish`; `fail` is
        called instead, once, when no router can finish it. Raises Overloaded."""
