"""One request's life at the gateway, for logs and traces: when it came, how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.logs import fields
from raymoe.requests import Origin
from raymoe.tracing import Tracing, fail, trace_id_of, traceparent_of

log = logging.getLogger("raymoe.requests")
_LONGEST_ID = 256
Header = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What becomes of requests. tracing None: no spans; lines: a log line at begin and end."""

    tracing: Tracing | None = None
    lines: bool = False

    def begin(self, name: str, answer_id: str, header: Header) -> Life:
        """A request has been read. header: looks one up by its lower-case name."""
        given = header("x-request-id") or ""
        # what goes into logs and on to routers must be short and harmless
        usable = given.isprintable() and len(given) <= _LONGEST_ID
        request_id = given if given and usable else answer_id
        traceparent, span = "", None
        if self.tracing is not None:
            span = self.tracing.begin(
                name,
                header("traceparent") or "",
                kind="SERVER",
                attributes={"raymoe.request_id": request_id, "gen_ai.response.id": answer_id},
            )
            traceparent = traceparent_of(span)
        return Life(name, Origin(request_id=request_id, traceparent=traceparent), span, self.lines)


NOT_WATCHED = Watching()


class Life:
    """Told by the answer. `origin` goes with the request to routers."""

    def __init__(self, name: str, origin: Origin, span: Any, lines: bool) -> None:
        self.origin = origin
        self._name, self._span, self._lines = name, span, lines

    def started(self, prompt_tokens: int, choices: int) -> None:
        """It was accepted."""
        if self._lines:
            self._say("begins", {"prompt_tokens": prompt_tokens, "outputs": choices})

    def ended(self, how: str, figures: Mapping[str, Any]) -> None:
        """how: "finished", "aborted", or the error's sentence. Once."""
        told = {name: value for name, value in figures.items() if value is not None}
        if self._lines:
            self._say(f"ends: {how}", told)
        if self._span is not None:
            for name, value in told.items():
                self._span.set_attribute(f"raymoe.{name}", value)
            if how in ("finished", "aborted"):
                self._span.set_attribute("raymoe.ended", how)
            else:
                fail(self._span, how)
            self._span.end()

    def _say(self, what: str, told: Mapping[str, Any]) -> None:
        trace_id = trace_id_of(self.origin.traceparent)
        extra = fields(request_id=self.origin.request_id, trace_id=trace_id, **told)
        log.info("%s %s", self._name, what, extra=extra)
