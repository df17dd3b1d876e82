"""Errors as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from raymoe.errors import Overloaded, RaymoeError, RequestError, RouterUnavailable
from raymoe.requests import TokenEvent

_RETRY_AFTER_S = 1.0
_TYPE_OF_STATUS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. Raised anywhere in a route; shown as an OpenAI error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPE_OF_STATUS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        return JSONResponse(self.body, status_code=self.status, headers=headers)


def api_error(error: RaymoeError) -> ApiError:
    """The answer to one of raymoe's own errors."""
    if isinstance(error, RequestError):
        return ApiError(400, error.message, error.field, "invalid_value")
    if isinstance(error, Overloaded):
        return ApiError(429, error.message, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, RouterUnavailable):
        return ApiError(503, str(error), code="router_unavailable", retry_after_s=_RETRY_AFTER_S)
    return ApiError(500, str(error), code="internal_error")


def event_error(event: TokenEvent) -> ApiError:
    """The answer when a router ends a request with an error."""
    said = event.error or "the router failed"
    if event.error_kind == "overloaded":
        return ApiError(429, said, code="queue_full", retry_after_s=_RETRY_AFTER_S)
    if event.error_kind == "bad_request":
        return ApiError(400, said, code="invalid_value")
    return ApiError(503, said, code="generation_failed", retry_after_s=_RETRY_AFTER_S)


def validation_error(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints, with the field's path as `param`."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg']}", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field '{param}'.", param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing field '{param}'.", param, "missing_required_parameter")
    if not param:
        return ApiError(400, f"The body must be a JSON object: {first['msg']}", code="invalid_json")
    said = first["msg"].removeprefix("Value error, ").rstrip(".")
    return ApiError(400, f"Invalid value for '{param}': {said}.", param, "invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
