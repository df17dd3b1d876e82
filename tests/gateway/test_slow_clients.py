"""Clients that read slowly or not at all: only they wait, and nothing is kept for them for long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from raymoe.gateway import AppConfig, create_app, streaming
from tests.gateway.conftest import pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BODY = json.dumps({"prompt": "x", "max_tokens": 500, "stream": True}).encode()
SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
    "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions",
    "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
}  # fmt: skip


class Client:
    """An ASGI server's side of one connection. It takes what is sent only while `reads` is set."""

    def __init__(self, reads: bool) -> None:
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()
        self.got = b""
        self.ended = False
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": BODY, "more_body": False}
        await asyncio.Event().wait()  # it never goes away
        raise AssertionError

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            await self.reads.wait()
            self.got += message["body"]
            self.ended |= not message.get("more_body", False)


@pytest.mark.parametrize("wakes_up", [True, False])
def test_only_the_slow_client_waits(monkeypatch: pytest.MonkeyPatch, wakes_up: bool) -> None:
    monkeypatch.setattr(streaming, "UNREAD_S", 1e9 if wakes_up else 0.0)
    router = FakeRouter(lambda request: [70] * 500, context_tokens=4000)

    async def main() -> tuple[Client, Client]:
        pool = pool_of([router])
        apps = [
            create_app(pool, TOKENIZER, AppConfig(model_name="tiny", request_timeout_s=limit_s))
            for limit_s in (600.0 if wakes_up else 0.5, 600.0)
        ]
        await pool.start()
        slow, fast = Client(False), Client(True)
        waiting = asyncio.create_task(apps[0](SCOPE, slow.receive, slow.send))
        await apps[1](SCOPE, fast.receive, fast.send)
        assert fast.ended and fast.got.count(b'"text":') == 500
        assert not slow.got
        if wakes_up:
            while router.running:  # its tokens do not wait for it: the router is free
                await asyncio.sleep(0.005)
            slow.reads.set()
        await asyncio.wait_for(waiting, 60)
        assert pool.in_flight == 0
        await pool.close()
        return slow, fast

    with routers_of(router):
        slow, _ = asyncio.run(main())
        assert router.running == 0
    assert slow.ended == wakes_up
    assert slow.got.count(b'"text":') == (500 if wakes_up else 0)
