"""Routes for operators: how many groups there are, empty one, fix a replica, try and see plans.

With a token set, whoever changes something must show it (`Authorization: Bearer TOKEN`); reading
needs none.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from raymoe.gateway.admin_bodies import DrainBody, DryRunBody, PinBody, ScaleBody
from raymoe.gateway.bodies import read_bytes
from raymoe.gateway.errors import ApiError
from raymoe.gateway.openapi import body_of

Ask = Callable[..., Awaitable[Any]]
_MOST_BYTES = 4096


def add_admin_routes(app: FastAPI, ask: Ask, token: str | None) -> None:
    """`ask(method, *arguments)` reaches the controller; its answers may hold an "error"."""

    @app.post("/scale", openapi_extra=body_of(ScaleBody))
    async def scale(request: Request) -> Response:
        """So many groups of a kind are to serve."""
        body = await _read(request, ScaleBody, token)
        return _answer(await ask("scale", body.groups, body.kind))

    @app.post("/drain", openapi_extra=body_of(DrainBody))
    async def drain(request: Request) -> Response:
        """Empty a group and end it; with `undo` have it back."""
        body = await _read(request, DrainBody, token)
        return _answer(await ask("drain", body.group, body.undo))

    @app.post("/pin", openapi_extra=body_of(PinBody))
    async def pin(request: Request) -> Response:
        """Keep a replica on a group; with `undo` let the planner decide again."""
        body = await _read(request, PinBody, token)
        return _answer(await ask("pin", body.layer, body.expert, body.group, True, body.undo))

    @app.post("/evict", openapi_extra=body_of(PinBody))
    async def evict(request: Request) -> Response:
        """Keep a replica off a group while another serves; with `undo` no more."""
        body = await _read(request, PinBody, token)
        return _answer(await ask("pin", body.layer, body.expert, body.group, False, body.undo))

    @app.post("/placement/dry-run", openapi_extra=body_of(DryRunBody))
    async def dry_run(request: Request) -> Response:
        """Would moving help? The plan that would be made now; nothing changes."""
        body = await _read(request, DryRunBody, None)
        return _answer(await ask("dry_run", body.model_dump()))

    @app.get("/placement/history")
    async def history() -> Response:
        """The last plans, newest first: trigger, actions, what they promised and brought."""
        return JSONResponse(await ask("history"))


async def _read(request: Request, model: type[Any], token: str | None) -> Any:
    """The body, once the caller was found entitled to ask."""
    if token is not None:
        shown = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {token}".encode()):
            raise ApiError(401, "This needs the admin token: Authorization: Bearer TOKEN.")
    # a form of some web page cannot send this type across sites
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "The body must be JSON: content-type application/json.")
    body = await read_bytes(request, _MOST_BYTES)
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(400, f"{field or 'body'}: {first['msg']}", field) from None


def _answer(told: dict[str, Any]) -> Response:
    if "error" in told:
        raise ApiError(409, told["error"], code="refused")
    return JSONResponse(told)
