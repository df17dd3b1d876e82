"""The OpenAI-compatible HTTP application.

Every route is defined on the application itself: Ray Serve's ingress does not cope with routers
that are included (FastAPI 0.137 and later).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from raymoe.errors import RaymoeError, RequestError
from raymoe.gateway.backend import Backend
from raymoe.gateway.bodies import read_body
from raymoe.gateway.errors import ApiError, api_error
from raymoe.gateway.inbox import ClientGone
from raymoe.gateway.life import NOT_WATCHED, Watching
from raymoe.gateway.metrics import CONTENT_TYPE, Registry
from raymoe.gateway.observe import GatewayMetrics
from raymoe.gateway.openapi import body_of, describe
from raymoe.gateway.prompts import chat_text, off_loop, weight
from raymoe.gateway.routes import Serving, chat, complete
from raymoe.gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from raymoe.gateway.tokenizer import GatewayTokenizer
from raymoe.logs import fields

log = logging.getLogger(__name__)
_CLIENT_CLOSED = 499  # nobody sees it but our metrics
Placement = Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]
Exposition = Callable[[Registry, bool], Awaitable[str]]
Alongside = Callable[[Registry], Coroutine[Any, Any, None]]
Degraded = Callable[[], bool | Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """max_choices: outputs of one HTTP request (prompts x n) at most; watching: logs, traces."""

    model_name: str
    request_timeout_s: float | None = 600.0
    max_body_bytes: int = 8 << 20
    max_choices: int = 256
    watching: Watching = NOT_WATCHED


def create_app(
    backend: Backend,
    tokenizer: GatewayTokenizer,
    config: AppConfig,
    *,
    placement: Placement | None = None,
    exposition: Exposition | None = None,
    alongside: Alongside | None = None,
    degraded: Degraded | None = None,
) -> FastAPI:
    """The application; its lifespan starts and closes the backend.

    placement: what GET /placement answers (JSON-able), or a coroutine function giving it.
    exposition: Prometheus text of /metrics from this gateway's own metrics, and whether series
    of single experts are wanted; without it those of this gateway alone are shown.
    alongside: runs from start to end of the application.
    degraded: whether requests are accepted but may have to wait for experts; GET /health says so.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        beside = None if alongside is None else asyncio.create_task(alongside(metrics.registry))
        yield
        if beside is not None:
            beside.cancel()
        await backend.close()

    app = FastAPI(title="raymoe", lifespan=lifespan)
    metrics = GatewayMetrics(backend)
    serving = Serving(
        backend=backend,
        tokenizer=tokenizer,
        metrics=metrics,
        model_name=config.model_name,
        request_timeout_s=config.request_timeout_s,
        max_choices=config.max_choices,
        watching=config.watching,
    )
    app.state.serving = serving  # for the gRPC services beside it
    card = {
        "id": config.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "raymoe",
    }

    @app.post("/v1/completions", openapi_extra=body_of(CompletionBody))
    async def completions(request: Request) -> Response:
        body, _ = await read_body(request, CompletionBody, config.max_body_bytes)
        return await complete(serving, request, body)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body, size = await read_body(request, ChatBody, config.max_body_bytes)
        return await chat(serving, request, body, size)

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise ApiError(400, "This model generates text; it has no embeddings.", "model")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await described()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        serving.check_model(model_id)
        return await described()

    async def described() -> dict[str, Any]:
        longest = (await backend.model_info()).longest_tokens if backend.ready else None
        return {**card, "max_model_len": longest}

    @app.post("/tokenize", openapi_extra=body_of(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        body, size = await read_body(request, TokenizeBody, config.max_body_bytes)
        serving.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either 'prompt' or 'messages'", "prompt")
        text = body.prompt
        if text is None:
            text = await off_loop(weight(body, size), chat_text, body, tokenizer)
        special = body.prompt is not None
        if body.add_special_tokens is not None:
            special = body.add_special_tokens
        ids = await off_loop(len(text), tokenizer.encode, text, special)
        info = await backend.model_info()
        answer = {"count": len(ids), "max_model_len": info.longest_tokens, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = await off_loop(
                len(ids), lambda: [*map(tokenizer.token_text, ids)]
            )
        return answer

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, Any]:
        body, _ = await read_body(request, DetokenizeBody, config.max_body_bytes)
        serving.check_model(body.model)
        info = await backend.model_info()
        ids, skip = body.tokens, bool(body.skip_special_tokens)

        def decoded() -> str:
            for at, token_id in enumerate(ids):
                if token_id >= info.vocab:
                    raise RequestError(
                        f"token id {token_id} is not in the vocabulary of {info.vocab}",
                        f"tokens[{at}]",
                    )
            return tokenizer.decode(ids, skip)

        return {"prompt": await off_loop(len(ids), decoded)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if not backend.ready:
            raise ApiError(503, "No router can be reached yet.", code="router_unavailable")
        slow = degraded is not None and await _maybe_await(degraded())
        status = "degraded" if slow else "ok"
        return JSONResponse({"status": status, "routers": len(backend.routers())})

    @app.get("/metrics")
    async def prometheus(experts: bool = False) -> Response:
        own = metrics.registry
        text = own.text() if exposition is None else await exposition(own, experts)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.get("/placement")
    async def get_placement() -> Response:
        if placement is None:
            raise ApiError(404, "This gateway knows no placement.", code="not_found")
        return JSONResponse(await _maybe_await(placement()))

    _answer_errors(app, metrics)
    describe(app)
    return app


def _answer_errors(app: FastAPI, metrics: GatewayMetrics) -> None:
    """Every error in OpenAI's shape, and every answer counted."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_raymoe_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RaymoeError)
        answer = api_error(error)
        if answer.status == 500:
            extra = fields(request_id=request.headers.get("x-request-id"))
            log.error("%s %s: %s", request.method, request.url.path, error, extra=extra)
        return answer.response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        said = {
            404: f"There is no {path} here.",
            405: f"{path} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, said, code=_CODES.get(error.status_code)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED)

    async def on_bug(request: Request, error: Exception) -> Response:
        extra = fields(request_id=request.headers.get("x-request-id"))
        where = f"{request.method} {request.url.path}"
        log.error("%s failed", where, exc_info=error, extra=extra)
        return ApiError(500, "The gateway failed; its log says why.", code="internal").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RaymoeError, on_raymoe_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
    app.add_middleware(CountRequests, metrics=metrics)


_CODES = {404: "not_found", 405: "method_not_allowed"}
_ROUTES = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/embeddings", "/tokenize"}
    | {
        "/detokenize",
        "/health",
        "/metrics",
        "/placement",
        "/status",
        "/ui",
        "/ui/events",
        "/ui/view",
    }
)


class CountRequests:
    """ASGI middleware: one count a request, by route and status; nothing per chunk of a body."""

    def __init__(self, app: Any, metrics: GatewayMetrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # served under a prefix
        route = path if path in _ROUTES else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._requests.add(1, (route, str(message["status"])))
            await send(message)

        await self._app(scope, receive, counted)


async def _maybe_await(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
