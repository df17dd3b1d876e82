"""The operators' routes: who may change what, and that refusals reach the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.testclient import TestClient

from raymoe.gateway.admin import add_admin_routes
from raymoe.gateway.errors import ApiError

ASKED: list[tuple[Any, ...]] = []


async def ask(method: str, *arguments: Any) -> dict[str, Any]:
    ASKED.append((method, *arguments))
    if arguments[:1] == ("g9",):
        return {"error": "there is no group 'g9'"}
    return {"members": []}


def client(token: str | None) -> TestClient:
    app = FastAPI()

    async def shown(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    app.add_exception_handler(ApiError, shown)
    add_admin_routes(app, ask, token)
    ASKED.clear()
    return TestClient(app)


def test_scale_drain_undo() -> None:
    http = client(None)
    assert http.post("/scale", json={"groups": 4}).status_code == 200
    assert http.post("/scale", json={"groups": 1, "kind": "big"}).status_code == 200
    assert http.post("/drain", json={"group": "g1", "undo": True}).json() == {"members": []}
    cell = {"layer": 0, "expert": 3, "group": "g1"}
    assert http.post("/pin", json=cell).status_code == 200
    assert http.post("/evict", json={**cell, "undo": True}).status_code == 200
    assert http.get("/placement/history").status_code == 200
    assert ASKED == [
        ("scale", 4, None),
        ("scale", 1, "big"),
        ("drain", "g1", True),
        ("pin", 0, 3, "g1", True, False),
        ("pin", 0, 3, "g1", False, True),
        ("history",),
    ]


def test_a_refusal_says_why() -> None:
    answer = client(None).post("/drain", json={"group": "g9"})
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "there is no group 'g9'"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic sesame"}, 401),
        ({"authorization": "Bearer sésame".encode().decode("latin-1")}, 401),
        ({"authorization": "Bearer sesame"}, 200),
    ],
)
def test_changing_needs_the_token_reading_does_not(headers: dict[str, str], status: int) -> None:
    http = client("sesame")
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    assert http.post("/scale", json={"groups": 4}, headers=sent).status_code == status
    assert http.post("/drain", json={"group": "g1"}, headers=sent).status_code == status
    for path in ("/pin", "/evict"):
        cell = {"layer": 0, "expert": 3, "group": "g1"}
        assert http.post(path, json=cell, headers=sent).status_code == status
    assert bool(ASKED) is (status == 200)
    assert http.get("/placement/history").status_code == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"groups": "4"}', "groups"),
        (b'{"groups": -1}', "groups"),
        (b'{"groups": true}', "groups"),
        (b'{"groups": 4, "sort": "big"}', "sort"),
        (b"{}", "groups"),
        (b"groups=4", "body"),
    ],
)
def test_a_wrong_body_is_named(body: bytes, named: str) -> None:
    answer = client(None).post("/scale", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]
    assert not ASKED


def test_a_web_page_of_another_site_cannot_post_it() -> None:
    http = client(None)
    answer = http.post("/scale", content=b'{"groups": 1}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    long = b'{"groups": 1' + b" " * 5000 + b"}"
    answer = http.post("/scale", content=long, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and not ASKED


def test_a_dry_run_needs_no_token_and_hands_the_question_on() -> None:
    http = client("sesame")
    asked = {"horizon_s": 30.0, "without": ["g1"]}
    assert http.post("/placement/dry-run", json=asked).status_code == 200
    assert http.post("/placement/dry-run", json={}).status_code == 200
    nothing = {"horizon_s": None, "margin": None, "interval_bytes": None, "without": []}
    assert [("dry_run", {**nothing, **asked}), ("dry_run", nothing)] == ASKED


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"horizon_s": 0}', "horizon_s"),
        (b'{"margin": 1}', "margin"),
        (b'{"interval_bytes": -1}', "interval_bytes"),
        (b'{"without": "g1"}', "without"),
        (b'{"groups": 3}', "groups"),
        (b"[]", "body"),
    ],
)
def test_a_wrong_question_is_named(body: bytes, named: str) -> None:
    headers = {"content-type": "application/json"}
    answer = client(None).post("/placement/dry-run", content=body, headers=headers)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]
    assert not ASKED


def test_a_body_without_end_is_not_read_to_its_end() -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b" " * 1000

    async def main() -> int:
        transport = httpx.ASGITransport(app=client(None).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            headers = {"content-type": "application/json"}
            return (await http.post("/scale", content=parts(), headers=headers)).status_code

    assert asyncio.run(main()) == 413
    assert sent < 10 and not ASKED
