"""Routes for operators: change how many groups there are, empty one, see the history of plans.

With a token set, whoever changes something must show it (`Authorization: Bearer TOKEN`); reading
needs none.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raymoe.gateway.errors import ApiError

Ask = Callable[..., Awaitable[Any]]
_MOST_BYTES = 4096


class ScaleBody(BaseModel):
    """So many groups of a kind are to serve."""

    model_config = ConfigDict(extra="forbid", strict=True)
    groups: int = Field(ge=0, le=4096)
    kind: str | None = None


class DrainBody(BaseModel):
    """Empty a group and end it, or have it back."""

    model_config = ConfigDict(extra="forbid", strict=True)
    group: str
    undo: bool = False


class PinBody(BaseModel):
    """A replica is to be on a group, or is not to be; or nothing is said of it any more."""

    model_config = ConfigDict(extra="forbid", strict=True)
    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    group: str
    undo: bool = False


def add_admin_routes(app: FastAPI, ask: Ask, token: str | None) -> None:
    """`ask(method, *arguments)` reaches the controller; its answers may hold an "error"."""

    @app.post("/scale")
    async def scale(request: Request) -> Response:
        body = await _read(request, ScaleBody, token)
        return _answer(await ask("scale", body.groups, body.kind))

    @app.post("/drain")
    async def drain(request: Request) -> Response:
        body = await _read(request, DrainBody, token)
        return _answer(await ask("drain", body.group, body.undo))

    @app.post("/pin")
    async def pin(request: Request) -> Response:
        body = await _read(request, PinBody, token)
        return _answer(await ask("pin", body.layer, body.expert, body.group, True, body.undo))

    @app.post("/evict")
    async def evict(request: Request) -> Response:
        body = await _read(request, PinBody, token)
        return _answer(await ask("pin", body.layer, body.expert, body.group, False, body.undo))

    @app.get("/placement/history")
    async def history() -> Response:
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
    body = await request.body()
    if len(body) > _MOST_BYTES:
        raise ApiError(413, f"The body is longer than {_MOST_BYTES} bytes.")
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
