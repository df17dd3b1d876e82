"""How requests come in and are cancelled, from any thread; the engine's thread takes them out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from raymoe.engine.config import EngineConfig
from raymoe.errors import Overloaded, RequestError
from raymoe.grammar.state import GrammarStart, GrammarState
from raymoe.requests import GenerationRequest

Arrival = tuple[GenerationRequest, GrammarState | None]


class Intake:
    """Requests that the engine knows (`add` until `forget`), and what it has not looked at yet."""

    def __init__(
        self, config: EngineConfig, max_context: int, grammars: GrammarStart | None
    ) -> None:
        """grammars: how an output that follows a grammar begins; None: such requests are refused"""
        self._most = config.max_waiting + config.max_batch
        self._max_context = max_context
        self._grammars = grammars
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._news: deque[Arrival | str] = deque()  # a string cancels

    def __len__(self) -> int:
        return len(self._known)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run, and Overloaded; one that
        goes on from another router was let in there, and is not refused."""
        length = len(request.prompt_ids)
        if length == 0:
            raise RequestError("the prompt has no tokens", "prompt")
        if length >= self._max_context:
            raise RequestError(
                f"the prompt has {length} tokens and the context holds {self._max_context}, "
                f"of which at least 1 must be left for output",
                "prompt",
            )
        grammar = self._start_grammar(request)
        with self._lock:
            if request.request_id in self._known:
                raise RequestError(f"request {request.request_id} is running already", "request_id")
            if len(self._known) >= self._most and not request.output_ids:
                raise Overloaded(f"{len(self._known)} requests are running or waiting")
            self._known.add(request.request_id)
            self._news.append((request, grammar))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown and ended ones are ignored."""
        with self._lock:
            if request_id in self._known:
                self._news.append(request_id)

    def take(self) -> Iterator[Arrival | str]:
        """What has come since, in order; a string is the id of a request to cancel."""
        while self._news:
            yield self._news.popleft()

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        with self._lock:
            self._known.discard(request_id)

    def _start_grammar(self, request: GenerationRequest) -> GrammarState | None:
        if request.sampling.grammar is None:
            return None
        if self._grammars is None:
            raise RequestError("this router follows no grammars", "response_format")
        return self._grammars(request.sampling.grammar, request.output_ids)
