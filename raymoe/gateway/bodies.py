"""Reading a request's body: limits on its size and its parts, strict JSON, one clear error."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from raymoe.gateway.errors import ApiError, validation_error
from raymoe.gateway.inbox import ClientGone

Model = TypeVar("Model", bound=BaseModel)

MAX_PARTS = 1 << 16
"""Objects, arrays and members of objects in one body: 20,000 messages. Reading a part takes
microseconds, some of them with Python's lock held, however small the body is in bytes."""

_LONG = MAX_PARTS  # bytes: a shorter body has fewer parts, and is read in 15 ms at most
_STRIDE = 1 << 16


async def read_body(request: Request, model: type[Model], max_bytes: int) -> tuple[Model, int]:
    """The checked body and its size in bytes. Raises ApiError: 413 when it is too large, else 400.

    A long one is checked in a thread: the streams of other clients go on.
    """
    data = await read_bytes(request, max_bytes)
    if len(data) < _LONG:
        return _checked(data, model), len(data)
    return await asyncio.to_thread(_checked_parts, data, model), len(data)


def _checked(data: bytearray, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error) from None


def _checked_parts(data: bytearray, model: type[Model]) -> Model:
    if _signs(data) > MAX_PARTS and _has_too_many_parts(data):  # most texts have few such signs
        raise too_many_parts()
    return _checked(data, model)


def too_many_parts() -> ApiError:
    said = f"The body has more than {MAX_PARTS} objects, arrays and members of objects."
    return ApiError(413, said, code="body_too_large")


def _has_too_many_parts(data: bytearray) -> bool:
    """Whether valid JSON has more than MAX_PARTS: the signs outside of its strings."""
    # A backslash is in a string, before another one or before what it escapes.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts, inside = 0, 0
    for at in range(0, len(plain), _STRIDE):  # so that other threads have their turns
        pieces = plain[at : at + _STRIDE].split(b'"')
        parts += sum(map(_signs, pieces[inside::2]))
        if parts > MAX_PARTS:
            return True
        inside ^= (len(pieces) - 1) & 1
    return False


def _signs(text: bytearray) -> int:
    return sum(map(text.count, (b"{", b"[", b":")))


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
