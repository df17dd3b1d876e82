"""A gateway over fake routers: in process (httpx) and behind a real HTTP server (uvicorn)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from raymoe.gateway import AppConfig, GatewayTokenizer, PoolConfig, RouterPool, create_app
from tests.gateway.fakes import IDENTITY, SECRET, FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

POOL = PoolConfig(router_wait_s=2.0, poll_s=0.05)


@pytest.fixture(scope="session")
def tokenizer() -> GatewayTokenizer:
    return tiny_tokenizer()


def pool_of(routers: Sequence[FakeRouter], **changes: Any) -> RouterPool:
    """A pool over those of `routers` that live; the sequence may change meanwhile."""
    return RouterPool(
        lambda: [router.server.endpoint for router in routers],
        identity=IDENTITY,
        secret=SECRET,
        node="here",
        config=replace(POOL, **changes),
    )


@asynccontextmanager
async def in_process(
    pool: RouterPool, tokenizer: GatewayTokenizer, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the application, with no socket between."""
    app = create_app(pool, tokenizer, AppConfig(model_name="tiny", **settings))
    await pool.start()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as http:
            yield http
    finally:
        await pool.close()


@dataclass
class Served:
    """A running HTTP server; `call` runs a coroutine function in its loop."""

    url: str
    loop: asyncio.AbstractEventLoop
    pool: RouterPool

    def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)


@contextmanager
def serve(app_of: Callable[[], tuple[FastAPI, RouterPool]]) -> Iterator[Served]:
    """uvicorn in a thread, on a free port of the loopback address."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    started: list[Any] = []
    server_box: list[uvicorn.Server] = []

    def run() -> None:
        async def main() -> None:
            app, pool = app_of()
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            server_box.append(server)
            started.extend([asyncio.get_running_loop(), pool])
            await server.serve(sockets=[sock])

        asyncio.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not (server_box and server_box[0].started):
        assert time.monotonic() < deadline, "the HTTP server did not start"
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", *started)
    finally:
        server_box[0].should_exit = True
        thread.join(20)
        sock.close()


@contextmanager
def served(
    routers: Sequence[FakeRouter], tokenizer: GatewayTokenizer, **changes: Any
) -> Iterator[Served]:
    def app_of() -> tuple[FastAPI, RouterPool]:
        pool = pool_of(routers, **changes)
        return create_app(pool, tokenizer, AppConfig(model_name="tiny")), pool

    with serve(app_of) as running:
        yield running


@contextmanager
def routers_of(*routers: FakeRouter) -> Iterator[list[FakeRouter]]:
    """Started fake routers, closed in the end."""
    for router in routers:
        router.start()
    try:
        yield list(routers)
    finally:
        for router in routers:
            router.close()


def wait_for(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
