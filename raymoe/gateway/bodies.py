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
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error) from None


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes.", code="body_too_large")
