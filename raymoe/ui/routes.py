"""The page's routes, put on the gateway's application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from raymoe.ui.hub import Hub

_STATIC = Path(__file__).parent / "static"
_TYPES = {"app.js": "text/javascript", "charts.js": "text/javascript", "style.css": "text/css"}
# Nothing is loaded from elsewhere, and nothing in a name of a group can become code.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)
_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, hub: Hub) -> None:
    """GET /ui (the page), /ui/events (server-sent events), /ui/view (everything once, JSON)."""

    @app.get("/ui", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", media_type="text/html", headers=_HEADERS)

    @app.get("/ui/", include_in_schema=False)
    async def with_slash() -> Response:
        return RedirectResponse("../ui")

    @app.get("/ui/events")
    async def events(layer: int = Query(0, ge=0)) -> Response:
        """Server-sent events: each `data:` is one JSON object; the first holds everything."""
        stream = hub.stream(layer)
        return EventsResponse(await anext(stream), stream)

    @app.get("/ui/view")
    async def view(layer: int = Query(0, ge=0), why: bool = False) -> Response:
        """Fleet, loads, one layer's replicas (with `why`: since when and why), events, history."""
        return JSONResponse(await hub.view(layer, why=why))

    @app.get("/ui/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in _TYPES:
            return JSONResponse({"error": {"message": f"There is no /ui/{name} here."}}, 404)
        return FileResponse(_STATIC / name, media_type=_TYPES[name], headers=_HEADERS)


class EventsResponse(StreamingResponse):
    """Server-sent events until the stream ends or the viewer goes; then the stream is closed."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        async def messages() -> AsyncIterator[bytes]:
            yield first
            async for message in rest:
                yield message

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(messages(), media_type="text/event-stream", headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.stream_response(send))
        watching = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            ended = await asyncio.gather(sending, watching, return_exceptions=True)
            await self._rest.aclose()
        if isinstance(ended[0], Exception) and not isinstance(ended[0], OSError):
            raise ended[0]  # a bug, not a viewer that went


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
