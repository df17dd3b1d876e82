"""Reading a request's body: a limit on its size, strict JSON, one clear error."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from raymoe.gateway.errors import ApiError, validation_error
from raymoe.gateway.inbox import ClientGone

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The checked body. Raises ApiError: 413 when it is too large, else 400."""
    data = await read_bytes(request, max_bytes)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error) from None


async def read_bytes(request: Request, max_bytes: int) -> bytearray:
    """The whole body, never more than `max_bytes` of it in memory. Raises ApiError (413) and
    ClientGone."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect:
        raise ClientGone from None
    return data


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes.", code="body_too_large")
