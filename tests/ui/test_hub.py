"""One poll for all viewers, everything once and then what is new, over the real routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from raymoe.errors import Overloaded
from raymoe.ui.hub import Hub
from raymoe.ui.routes import EventsResponse, add_page
from tests.ui.fleet import FakeFleet


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def said(message: bytes) -> dict[str, Any]:
    assert message.startswith(b"data: ") and message.endswith(b"\n\n")
    data = json.loads(message[6:])
    assert isinstance(data, dict)
    return data


def test_everything_first_then_only_what_is_new() -> None:
    async def main() -> None:
        fleet = FakeFleet()
        for _ in range(5):
            fleet.look()
        fleet.add(3, 7, 0)
        fleet.look()
        hub = Hub(fleet.ask, every_s=0.01)
        stream = hub.stream(3)
        first = said(await anext(stream))
        assert first["full"] and first["controller"] and first["layer"]["index"] == 3
        assert len(first["history"]) == 6
        assert [e["text"] for e in first["events"]] == [
            "layer 3 expert 7 added on g0: its load grew"
        ]
        assert first["layer"]["replicas"][7] == [[0, 0.5], [1, 0.5]]
        second = said(await anext(stream))
        assert not second["full"] and second["events"] == [] and second["history"] == []
        fleet.drop(3, 7, 1)
        fleet.look()
        while not (third := said(await anext(stream)))["events"]:
            pass
        assert [e["text"] for e in third["events"]] == ["layer 3 expert 7 removed from g1"]
        assert len(third["history"]) == 1 and third["status"]["epoch"] == fleet.epoch
        await stream.aclose()

    run(main)


def test_nobody_looks_nothing_is_asked_and_many_share_one_poll() -> None:
    async def main() -> None:
        fleet = FakeFleet()
        hub = Hub(fleet.ask, every_s=0.01)
        await asyncio.sleep(0.05)
        assert fleet.asked == 0
        streams = [hub.stream(layer % 2) for layer in range(6)]
        asked = 0
        for _ in range(20):
            messages = [said(await anext(stream)) for stream in streams]
            assert [m["layer"]["index"] for m in messages] == [0, 1] * 3
            asked += 1
        assert fleet.asked <= 6 * asked, "at most one question a message that somebody waited for"
        before = fleet.asked
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.gather(*waiting)
        assert fleet.asked - before <= 3, "six viewers, one poll"
        for stream in streams:
            await stream.aclose()
        assert hub.viewers == 0
        polling = hub._polling
        assert polling is not None
        await polling
        settled = fleet.asked
        await asyncio.sleep(0.05)
        assert fleet.asked == settled

    run(main)


def test_too_many_viewers_are_refused_and_places_are_given_back() -> None:
    async def main() -> None:
        hub = Hub(FakeFleet().ask, every_s=0.01, most_viewers=2)
        first, second = hub.stream(0), hub.stream(0)
        await anext(first)
        await anext(second)
        with pytest.raises(Overloaded, match="2 viewers"):
            await anext(hub.stream(0))
        await first.aclose()
        third = hub.stream(0)
        assert said(await anext(third))["full"]
        await second.aclose()
        await third.aclose()

    run(main)


def test_a_controller_that_is_away_is_said_and_nothing_is_missed() -> None:
    async def main() -> None:
        fleet = FakeFleet()
        hub = Hub(fleet.ask, every_s=0.01)
        stream = hub.stream(0)
        assert said(await anext(stream))["controller"]
        fleet.away = True
        while (gone := said(await anext(stream)))["controller"]:
            pass
        assert gone["events"] == [] and "status" not in gone
        fleet.add(0, 0, 1)
        fleet.look()
        fleet.away = False
        while not (back := said(await anext(stream)))["controller"]:
            pass
        assert len(back["events"]) == 1 and len(back["history"]) == 1
        await stream.aclose()

    run(main)


def test_a_slow_viewer_misses_states_but_no_event() -> None:
    async def main() -> None:
        fleet = FakeFleet()
        hub = Hub(fleet.ask, every_s=0.005)
        slow, quick = hub.stream(0), hub.stream(0)
        await anext(slow)
        await anext(quick)
        seen = 0
        for expert in (0, 3, 6):
            fleet.add(0, expert, 1)
            fleet.look()
            while not (events := said(await anext(quick))["events"]):
                pass
            seen += len(events)
        assert seen == 3
        got: list[str] = []
        while len(got) < 3:
            got += [event["text"][:18] for event in said(await anext(slow))["events"]]
        assert got == [f"layer 0 expert {e} a" for e in (0, 3, 6)]
        await slow.aclose()
        await quick.aclose()

    run(main)


def test_a_viewer_that_goes_gives_its_place_back() -> None:
    """Also when the server does not tell by an error of send, but by http.disconnect only."""

    async def main() -> None:
        hub = Hub(FakeFleet().ask, every_s=0.005)
        stream = hub.stream(0)
        response = EventsResponse(await anext(stream), stream)
        sent: list[Any] = []
        enough, gone = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                enough.set()

        serving = asyncio.create_task(response({"type": "http"}, receive, send))
        await enough.wait()
        assert hub.viewers == 1
        gone.set()
        await serving
        assert hub.viewers == 0
        assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")

    run(main)


def page_app(fleet: FakeFleet, **settings: Any) -> FastAPI:
    app = FastAPI()
    add_page(app, Hub(fleet.ask, **settings))

    @app.exception_handler(Overloaded)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 429)

    return app


def test_routes() -> None:
    async def main() -> None:
        fleet = FakeFleet()
        fleet.add(2, 5, 0, "layer 2 was slowest")
        fleet.look()
        transport = httpx.ASGITransport(app=page_app(fleet, most_viewers=0))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            html = await http.get("/ui")
            assert html.status_code == 200 and "raymoe" in html.text
            assert "script-src 'self'" in html.headers["content-security-policy"]
            for name in ("app.js", "charts.js", "style.css"):
                assert f"ui/{name}" in html.text
                assert (await http.get(f"/ui/{name}")).status_code == 200
            assert "http" not in html.text.replace("https://", "http").split("<body>")[0]
            for wrong in ("index.html", "..%2froutes.py", "nothing"):
                assert (await http.get(f"/ui/{wrong}")).status_code == 404
            assert (await http.get("/ui/events")).status_code == 429
            assert (await http.get("/ui/view?layer=-1")).status_code == 422
            view = (await http.get("/ui/view?layer=2&why=1")).json()
            assert view["layer"]["why"]["5,0"]["why"] == "layer 2 was slowest"
            assert view["status"]["model"] == "demo" and len(view["history"]) == 1

    run(main)
