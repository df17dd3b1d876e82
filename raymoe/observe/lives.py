"""Requests' lives at a router, for logs and traces: queue, prefill, decode, which groups worked.

Made only when somebody wants to know. The engine's thread notes times; lines and spans are written
by a thread of this file.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic, time_ns
from typing import Any

from raymoe.client.stats import ClientStats
from raymoe.logs import fields
from raymoe.requests import GenerationRequest, Origin, TokenEvent
from raymoe.tracing import Tracing, trace_id_of, traceparent_of

log = logging.getLogger("raymoe.requests")
_TOTALS = ("answers", "pairs", "latency_s", "busy_s")
Totals = Mapping[str, Mapping[str, float]]


@dataclass(slots=True, kw_only=True)
class _Life:
    """Times are monotonic seconds; 0: not yet."""

    origin: Origin
    prompt_tokens: int
    before: Totals
    came_s: float
    began_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0
    tokens: int = 0
    finish: str = ""
    error: str | None = None
    after: Totals = field(default_factory=dict)


class Lives:
    """`came` before the engine hears of a request, `heard` with each step's events."""

    def __init__(self, stats: ClientStats, tracing: Tracing | None, *, lines: bool) -> None:
        self._stats, self._tracing, self._lines = stats, tracing, lines
        self._lives: dict[str, _Life] = {}
        self._ended: queue.SimpleQueue[_Life | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="raymoe-lives", daemon=True)
        self._thread.start()

    def came(self, request: GenerationRequest) -> None:
        """Any thread."""
        if not self._lines and not request.origin.traceparent:
            return  # nobody will read of it
        self._lives[request.request_id] = _Life(
            origin=request.origin,
            prompt_tokens=len(request.prompt_ids),
            before=self._totals(),
            came_s=monotonic(),
        )

    def refused(self, request_id: str) -> None:
        """The engine did not take it."""
        self._lives.pop(request_id, None)

    def heard(self, events: Iterable[TokenEvent]) -> None:
        """The engine's thread: what one step has made."""
        if not self._lives:
            return
        now = monotonic()
        for event in events:
            life = self._lives.get(event.request_id)
            if life is None:
                continue
            life.tokens += len(event.token_ids)
            if event.token_ids and not life.first_s:
                life.first_s = now
            if event.finish is not None:
                del self._lives[event.request_id]
                life.began_s, life.ended_s = event.began_s, now
                life.finish, life.error = event.finish, event.error
                life.after = self._totals()
                self._ended.put(life)

    def close(self) -> None:
        """Writes what has ended, then ends the thread."""
        self._ended.put(None)
        self._thread.join(5)

    def _totals(self) -> Totals:
        return {name: dict(getattr(self._stats, name)) for name in _TOTALS}

    # -- the thread

    def _write(self) -> None:
        while (life := self._ended.get()) is not None:
            try:
                self._tell(life)
            except Exception:
                log.exception("a request's life cannot be told")

    def _tell(self, life: _Life) -> None:
        parts, groups = _parts(life), _by_group(life)
        if self._lines:
            told = {f"{name}_s": round(end - begin, 4) for name, (begin, end) in parts.items()}
            messages = {group: int(totals["answers"]) for group, totals in groups.items()}
            extra = fields(
                request_id=life.origin.request_id,
                trace_id=trace_id_of(life.origin.traceparent),
                prompt_tokens=life.prompt_tokens,
                tokens=life.tokens,
                **told,
                messages=messages,
                error=life.error,
            )
            log.info("at the router: %s", life.finish, extra=extra)
        if self._tracing is not None and life.origin.traceparent:
            self._trace(self._tracing, life, parts, groups)

    def _trace(
        self,
        tracing: Tracing,
        life: _Life,
        parts: Mapping[str, tuple[float, float]],
        groups: Mapping[str, Mapping[str, float]],
    ) -> None:
        wall_ns = time_ns() - int(monotonic() * 1e9)

        def at(seconds: float) -> int:
            return wall_ns + int(seconds * 1e9)

        attributes = {
            "raymoe.request_id": life.origin.request_id,
            "raymoe.finish": life.finish,
            "gen_ai.usage.input_tokens": life.prompt_tokens,
            "gen_ai.usage.output_tokens": life.tokens,
        }
        if life.error:
            attributes["raymoe.error"] = life.error
        origin = life.origin.traceparent
        span = tracing.begin("router", origin, at_ns=at(life.came_s), attributes=attributes)
        own = traceparent_of(span)
        if own:
            for name, (begin, end) in parts.items():
                tracing.add(name, own, at(begin), at(end))
            begin = life.began_s or life.came_s
            for group, totals in groups.items():
                told: dict[str, Any] = {f"raymoe.group.{n}": v for n, v in totals.items()}
                told["raymoe.group.id"] = group
                tracing.add("group", own, at(begin), at(life.ended_s), **told)
        span.end(at(life.ended_s))


def _parts(life: _Life) -> dict[str, tuple[float, float]]:
    """queue, prefill and decode as far as it came, each (begin, end)."""
    began, first, ended = life.began_s, life.first_s, life.ended_s
    parts = {"queue": (life.came_s, max(began, life.came_s) if began else ended)}
    if began:
        parts["prefill"] = (parts["queue"][1], first or ended)
    if first:
        parts["decode"] = (first, ended)
    return parts


def _by_group(life: _Life) -> dict[str, dict[str, float]]:
    """What each group did for this router's whole batch while the request was there."""
    found: dict[str, dict[str, float]] = {}
    for name in _TOTALS:
        before = life.before[name]
        for group, total in life.after[name].items():
            found.setdefault(group, {})[name] = round(total - before.get(group, 0), 6)
    return {group: totals for group, totals in sorted(found.items()) if totals.get("answers")}
