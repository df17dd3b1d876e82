"""A streamed answer: server-sent events written as they come, one write for what came together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from raymoe.gateway.answer import Answer, Batch
from raymoe.gateway.choice import Choice
from raymoe.gateway.errors import ApiError
from raymoe.gateway.inbox import ClientGone
from raymoe.gateway.shapes import ChunkWriter, error_chunk, usage

UNREAD_S = 30.0
"""How much longer than a request may take its stream waits for a client that does not read."""
Opening = Callable[[Choice], bytes]


class EventStream(Response):
    """Writes an Answer's batches; the first has come already, so that a request that fails
    before its first token gets a proper status."""

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Answer,
        first: Batch,
        writer: ChunkWriter,
        opening: Opening,
        headers: dict[str, str],
    ) -> None:
        """opening: what goes before a choice's first chunk (a chat's role, an echoed prompt)."""
        super().__init__(
            headers={
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # proxies are not to hold chunks back
                **headers,
            }
        )
        del self.headers["content-length"]
        self._answer = answer
        self._first = first
        self._writer = writer
        self._opening = opening
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        limit_s = None if answer.timeout_s is None else answer.timeout_s + UNREAD_S
        try:
            async with asyncio.timeout(limit_s):
                await self._send_all(answer, send)
        except (ClientGone, OSError):
            # OSError: what an ASGI server may raise for a closed connection, and TimeoutError, of a
            # client that does not read. An answer without its end makes the server close.
            return
        finally:
            answer.close()

    async def _send_all(self, answer: Answer, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._write(send, self._first)
            while not answer.ended:
                await self._write(send, await answer.next())
            cached = sum(choice.cached_prompt_tokens for choice in answer.choices)
            end = self._writer.last(usage(answer.prompt_tokens, answer.completion_tokens, cached))
        except ApiError as error:
            end = error_chunk(error.body)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _write(self, send: Callable[[Any], Awaitable[None]], batch: Batch) -> None:
        answer, writer = self._answer, self._writer
        parts = []
        for choice, delta in batch:
            if choice.index not in self._opened:
                self._opened.add(choice.index)
                parts.append(self._opening(choice))
            parts.append(
                writer.chunk(choice, delta, answer.prompt_tokens, choice.completion_tokens)
            )
        body = b"".join(parts)
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
