"""One choice being generated: what was asked, what has come, and how it goes on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from raymoe.errors import RaymoeError
from raymoe.gateway.connection import RouterConnection
from raymoe.requests import FinishReason, GenerationRequest, TokenEvent
from raymoe.stream.messages import ModelInfo


@dataclass(eq=False, kw_only=True)
class OpenRequest:
    """The pool's Generation. `wire_id` names the present attempt, `connection` who works on it."""

    request: GenerationRequest
    deliver: Callable[[TokenEvent], None]
    fail: Callable[[RaymoeError], None]
    cancel_with: Callable[[OpenRequest], None]
    output_ids: list[int] = field(default_factory=list)
    connection: RouterConnection | None = None
    wire_id: str = ""
    attempts: int = 0
    losses: int = 0  # routers it has lost since its last token
    given_away: bool = False  # by a router that was leaving
    refused_by: set[RouterConnection] = field(default_factory=set)  # as overloaded
    timer: asyncio.TimerHandle | None = None  # while it waits for a router

    def cancel(self) -> None:
        self.cancel_with(self)

    def next_attempt(self) -> GenerationRequest:
        """What to send to the next router: an id of its own, and the output so far."""
        self.attempts += 1
        self.wire_id = f"{self.request.request_id}.{self.attempts}"
        request = replace(self.request, request_id=self.wire_id, output_ids=tuple(self.output_ids))
        if self.output_ids and request.sampling.prompt_logprobs is not None:
            # They came with the first event.
            request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
        return request

    def ended_already(self, model: ModelInfo | None) -> FinishReason | None:
        """How it ended when its router was lost after the last token but before saying so."""
        sampling, output_ids = self.request.sampling, self.output_ids
        if not output_ids:
            return None
        stops = set(sampling.stop_token_ids)
        if model is not None and not sampling.ignore_eos:
            stops.update(model.eos_ids)
        if output_ids[-1] in stops and len(output_ids) > sampling.min_tokens:
            return "stop"
        return "length" if len(output_ids) >= sampling.max_tokens else None
