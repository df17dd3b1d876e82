"""The rest of the application: models, health, metrics, placement, and going away."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from raymoe.gateway import AppConfig, create_app
from raymoe.gateway.metrics import Registry
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLE = re.compile(r'^[a-z0-9_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? (\+Inf|-?[0-9.e+-]+)$')


def endless() -> FakeRouter:
    return FakeRouter(lambda request: [70] * 50_000, context_tokens=60_000, step_s=0.002)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_metrics_are_prometheus_text_and_count() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [70] * 5)
        with routers_of(router):
            async with in_process(pool_of([router]), TOKENIZER) as http:
                for stream in (False, True):
                    body = {"prompt": [1, 2, 3], "n": 2, "stream": stream}
                    assert (await http.post("/v1/completions", json=body)).status_code == 200
                assert (await http.post("/v1/completions", json={})).status_code == 400
                answer = await http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.text.splitlines()
        assert [x for x in lines if not (x.startswith("# ") or SAMPLE.match(x))] == []
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values["raymoe_prompt_tokens_total"] == "6"
        assert values["raymoe_generation_tokens_total"] == "20"
        assert values['raymoe_request_success_total{finished_reason="length"}'] == "4"
        route = 'raymoe_http_requests_total{route="/v1/completions",status='
        assert values[route + '"200"}'] == "2"
        assert values[route + '"400"}'] == "1"
        for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
            assert values[f"raymoe_{name}_seconds_count"] == "2"
            assert values[f'raymoe_{name}_seconds_bucket{{le="+Inf"}}'] == "2"
        assert values["raymoe_inter_token_latency_seconds_count"] == "16"
        assert values['raymoe_request_generation_tokens_bucket{le="10.0"}'] == "2"
        assert values["raymoe_gateway_requests_in_flight"] == "0"
        assert values["raymoe_gateway_routers"] == "1"
        assert values["raymoe_gateway_resubmitted_total"] == "0"
        assert "# TYPE raymoe_gateway_resubmitted_total counter" in lines
        assert values['raymoe_router_requests_waiting{router="router-0"}'] == "0"

    asyncio.run(main())


def test_a_histogram_is_cumulative_and_labels_are_escaped() -> None:
    registry = Registry()
    histogram = registry.histogram("e2e_request_latency_seconds")
    for value in (0.0005, 0.1, 0.7, 5000):
        histogram.observe(value)
    registry.counter("http_requests_total").add(2.5, ('a"\\\n', "200"))
    text = registry.text()
    bucket = "raymoe_e2e_request_latency_seconds_bucket"
    assert f'{bucket}{{le="0.1"}} 2\n' in text
    assert f'{bucket}{{le="0.8"}} 3\n' in text
    assert f'{bucket}{{le="1920.0"}} 3\n' in text
    assert f'{bucket}{{le="+Inf"}} 4\n' in text
    assert "raymoe_e2e_request_latency_seconds_count 4\n" in text
    assert 'raymoe_http_requests_total{route="a\\"\\\\\\n",status="200"} 2.5\n' in text


def test_hooks_for_placement_and_metrics() -> None:
    async def main() -> None:
        import httpx

        async def placement() -> dict[str, Any]:
            return {"epoch": 3}

        async def exposition(own: Registry, experts: bool) -> str:
            return own.text() + f"raymoe_epoch {3 + experts}\n"

        pool = pool_of([])
        app = create_app(
            pool,
            TOKENIZER,
            AppConfig(model_name="tiny"),
            placement=placement,
            exposition=exposition,
        )

        @app.get("/status")  # as the gateway's shell adds it
        async def status() -> dict[str, Any]:
            return {}

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://t"
        ) as http:
            assert (await http.get("/placement")).json() == {"epoch": 3}
            await http.get("/status")
            text = (await http.get("/metrics")).text
            assert text.endswith("raymoe_epoch 3\n")
            wanted = (await http.get("/metrics", params={"experts": 1})).text
            assert wanted.endswith("raymoe_epoch 4\n")
            assert 'raymoe_http_requests_total{route="/status",status="200"} 1\n' in text

    asyncio.run(main())


def test_routes_are_counted_by_name_under_a_prefix_too() -> None:
    async def main() -> None:
        import httpx

        app = create_app(pool_of([]), TOKENIZER, AppConfig(model_name="tiny"))
        transport = httpx.ASGITransport(app=app, root_path="/demo")
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            assert (await http.get("/demo/v1/models")).status_code == 200
            text = (await http.get("/demo/metrics")).text
        assert 'raymoe_http_requests_total{route="/v1/models",status="200"} 1\n' in text

    asyncio.run(main())


def test_health_says_when_requests_may_have_to_wait() -> None:
    async def main() -> None:
        import httpx

        slow = True

        async def degraded() -> bool:
            return slow

        with routers_of(FakeRouter(lambda request: [1])) as routers:
            pool = pool_of(routers)
            app = create_app(pool, TOKENIZER, AppConfig(model_name="tiny"), degraded=degraded)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                assert (await http.get("/health")).status_code == 503  # no router: nothing goes
                await pool.start()
                await pool.model_info()
                answer = await http.get("/health")
                assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
                head = await http.head("/health")  # what many load balancers ask
                assert (head.status_code, head.content) == (200, b"")
                slow = False
                assert (await http.get("/health")).json() == {"status": "ok", "routers": 1}
            await pool.close()

    asyncio.run(main())


def test_models_say_how_long_a_request_may_be() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1], context_tokens=64, kv_capacity_tokens=50)
        with routers_of(router):
            pool = pool_of([router])
            async with in_process(pool, TOKENIZER) as http:
                await pool.model_info()
                (model,) = (await http.get("/v1/models")).json()["data"]
                assert model == (await http.get("/v1/models/tiny")).json()
                assert model["id"] == "tiny"
                assert model["max_model_len"] == 50

    asyncio.run(main())


async def _call(app: Any, messages: list[Any], stream: bool) -> list[Any]:
    """Calls the application as a server would; `messages` is what it receives."""
    sent: list[Any] = []
    body = b'{"prompt": "x", "max_tokens": 50000, "stream": %s}' % (b"true" if stream else b"false")
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if inbox:
            return inbox.pop(0)
        while not messages:
            await asyncio.sleep(0.002)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [],
        "scheme": "http",
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["disconnect", "cancel"])
def test_a_client_that_goes_away_costs_nothing_more(stream: bool, way: str) -> None:
    """Servers tell it in two ways: a message, or (Ray Serve) a cancelled task."""

    async def main() -> None:
        with routers_of(endless()) as (router,):
            pool = pool_of([router])
            await pool.start()
            await pool.model_info()
            app = create_app(pool, TOKENIZER, AppConfig(model_name="tiny"))
            messages: list[Any] = []
            task = asyncio.create_task(_call(app, messages, stream))
            await until(lambda: router.running == 1)
            await asyncio.sleep(0.02)
            if way == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                messages.append({"type": "http.disconnect"})
                await task
            await until(lambda: router.running == 0)
            assert len(router.cancelled) == 1
            assert pool.in_flight == 0
            await pool.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not others

    asyncio.run(main())


def test_a_client_gone_before_its_body_is_no_error() -> None:
    async def main() -> None:
        app = create_app(pool_of([]), TOKENIZER, AppConfig(model_name="tiny"))

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app({**scope, "query_string": b"", "http_version": "1.1"}, receive, send)
        assert sent[0]["status"] == 499

    asyncio.run(main())


def test_the_lifespan_starts_and_closes_the_pool() -> None:
    async def main() -> None:
        with routers_of(FakeRouter(lambda request: [1])) as routers:
            pool = pool_of(routers)
            app = create_app(pool, TOKENIZER, AppConfig(model_name="tiny"))
            async with app.router.lifespan_context(app):
                await until(lambda: pool.ready)
            assert not pool.ready
            await until(lambda: routers[0].server.gateways == 0)

    asyncio.run(main())


def test_openapi_names_every_field() -> None:
    app = create_app(pool_of([]), TOKENIZER, AppConfig(model_name="tiny"))
    schema = app.openapi()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rsplit("/", 1)[1]
        assert schema["components"]["schemas"][name]["properties"]
    text = str(schema)
    for reference in re.findall(r"#/components/schemas/(\w+)", text):
        assert reference in schema["components"]["schemas"]
    assert "#/$defs" not in text
