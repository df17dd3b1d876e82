"""Sends a load and keeps a record of every request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymoe.bench.load import Planned
from raymoe.bench.sse import BadAnswer, Endpoint, post_events

_AFTER_FAILURE_S = 0.2  # a stream waits: an endpoint that is down is not asked in a tight loop


@dataclass(kw_only=True)
class Record:
    """One request; seconds since the start of the run. Without `error` it was answered in full."""

    domain: str
    sent_s: float
    late_s: float = 0.0  # sent later than planned: the load generator could not keep up
    chunk_s: list[float] = field(default_factory=list)  # when each chunk with output came
    end_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    finish: str | None = None
    error: str | None = None


class Source(Protocol):
    """`Load` or `Trace`."""

    def next(self, now_s: float) -> Planned | None: ...


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """streams: how many at once, closed loop; None: as the source plans them. The run ends when
    duration_s has passed, `requests` have been sent or the source has no more; what is under way
    then is awaited."""

    model: str
    chat: bool = False
    streams: int | None = None
    duration_s: float | None = None
    requests: int | None = None
    timeout_s: float = 600.0
    fields: dict[str, Any] = field(default_factory=dict)  # of the body, beside ours


class Run:
    """One run; `records` grows while it goes on."""

    def __init__(
        self, endpoint: Endpoint, config: RunConfig, source: Source, on_start: Callable[[], None]
    ) -> None:
        """on_start: called when time begins."""
        self.records: list[Record] = []
        self.running = 0
        self.seconds = 0.0
        self._endpoint, self._config, self._source = endpoint, config, source
        self._on_start = on_start
        self._sent = 0
        self._started = 0.0

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._started

    async def run(self) -> list[Record]:
        """To the end; the records in the order of sending."""
        self._started = time.perf_counter()
        self._on_start()
        try:
            if self._config.streams is not None:
                await asyncio.gather(*(self._stream() for _ in range(self._config.streams)))
            else:
                await self._open_loop()
        finally:
            self.seconds = max((one.end_s for one in self.records), default=self.now_s)
        return self.records

    async def _stream(self) -> None:
        while (planned := self._next()) is not None:
            record = await self._send(planned)
            if record.error is not None:
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _open_loop(self) -> None:
        under_way = set()
        while (planned := self._next()) is not None:
            assert planned.at_s is not None
            if (limit := self._config.duration_s) is not None and planned.at_s > limit:
                break
            await asyncio.sleep(max(0.0, planned.at_s - self.now_s))
            task = asyncio.create_task(self._send(planned))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    def _next(self) -> Planned | None:
        config, now = self._config, self.now_s
        if config.requests is not None and self._sent >= config.requests:
            return None
        if config.duration_s is not None and now >= config.duration_s:
            return None
        self._sent += 1
        return self._source.next(now)

    async def _send(self, planned: Planned) -> Record:
        now = self.now_s
        late = 0.0 if planned.at_s is None else now - planned.at_s
        record = Record(domain=planned.domain, sent_s=now, late_s=late)
        self.records.append(record)
        self.running += 1
        try:
            async with asyncio.timeout(self._config.timeout_s):
                await self._read(planned, record)
        except TimeoutError:
            record.error = f"no end within {self._config.timeout_s:g} s"
        except BadAnswer as error:
            record.error = str(error)
        except (OSError, asyncio.IncompleteReadError) as error:
            record.error = f"connection: {error or type(error).__name__}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record.error = f"an event that is none: {error!r}"[:300]
        finally:
            record.end_s = self.now_s
            self.running -= 1
        return record

    async def _read(self, planned: Planned, record: Record) -> None:
        path = "/v1/chat/completions" if self._config.chat else "/v1/completions"
        ended = False
        async for at, data in post_events(self._endpoint, path, self._body(planned)):
            if data == b"[DONE]":
                ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                record.error = str(event["error"].get("message", event["error"]))[:300]
                continue
            if usage := event.get("usage"):
                record.prompt_tokens = usage["prompt_tokens"]
                record.tokens = usage["completion_tokens"]
            for choice in event.get("choices", ()):
                record.finish = choice.get("finish_reason") or record.finish
                if _has_output(choice):
                    record.chunk_s.append(at - self._started)
        record.tokens = record.tokens or len(record.chunk_s)
        if not ended and record.error is None:
            record.error = "the stream broke off"

    def _body(self, planned: Planned) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": planned.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._config.fields,
        }
        if self._config.chat:
            body["messages"] = [{"role": "user", "content": planned.prompt}]
        else:
            body["prompt"] = planned.prompt
        return body


def _has_output(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings output; a chat's first one has only the role."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))
