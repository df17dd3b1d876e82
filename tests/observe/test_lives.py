"""One request followed from the gateway through a router to its groups, by logs and by spans."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from raymoe import tracing
from raymoe.client.stats import ClientStats
from raymoe.gateway import AppConfig, create_app
from raymoe.gateway.life import Watching
from raymoe.observe.lives import Lives
from raymoe.requests import GenerationRequest, Origin, SamplingParams, TokenEvent
from raymoe.tracing import Tracing, from_environment
from tests.gateway.conftest import pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

PARENT = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter), {"service.name": "raymoe"})

    def named(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def log_lines() -> Iterator[list[logging.LogRecord]]:
    """Records of raymoe.requests."""
    found: list[logging.LogRecord] = []
    logger = logging.getLogger("raymoe.requests")
    handler, level = logging.Handler(), logger.level
    handler.emit = found.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def ask(watching: Watching, headers: dict[str, str], **body: Any) -> tuple[FakeRouter, Any]:
    """One request to a gateway; the fake router that got it, and the answer."""

    async def main() -> tuple[FakeRouter, Any]:
        router = FakeRouter(lambda request: [70, 71], vocab=355)
        with routers_of(router) as routers:
            pool = pool_of(routers)
            config = AppConfig(model_name="tiny", watching=watching)
            app = create_app(pool, tiny_tokenizer(), config)
            await pool.start()
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                sent = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, **body}
                answer = await http.post("/v1/completions", json=sent, headers=headers)
            await pool.close()
        return router, answer

    return asyncio.run(asyncio.wait_for(main(), 60))


def lived(spans: Spans | None, *, lines: bool = False) -> None:
    """A request at a router: queue, prefill, two decoded tokens, one group at work."""
    stats = ClientStats()
    stats.answered("g0", 0.5, 10, 0.1)
    lives = Lives(stats, spans.tracing if spans else None, lines=lines)
    for name, parent in (("a", PARENT), ("b", "")):
        lives.came(
            GenerationRequest(
                request_id=name,
                prompt_ids=(1, 2, 3),
                sampling=SamplingParams(seed=0),
                origin=Origin(request_id=f"client-{name}", traceparent=parent),
            )
        )
    stats.answered("g0", 0.25, 8, 0.125)
    stats.answered("g1", 0.25, 4, 0.125)
    for event in (
        TokenEvent(request_id="a", token_ids=(5,)),
        TokenEvent(request_id="nobody", token_ids=(5,)),
        TokenEvent(request_id="a", token_ids=(6,), finish="length", began_s=1e-3),
        TokenEvent(request_id="b", finish="cancelled"),
    ):
        lives.heard([event])
    lives.close()


def test_a_router_tells_queue_prefill_decode_and_what_groups_did() -> None:
    spans = Spans()
    lived(spans)
    found = spans.named()
    assert found.keys() == {"router", "queue", "prefill", "decode", "group"}
    router = found["router"]
    assert f"{router.context.trace_id:032x}" == "1" * 32, "the gateway's trace"
    assert f"{router.parent.span_id:016x}" == "2" * 16
    assert router.attributes["raymoe.request_id"] == "client-a"
    assert router.attributes["gen_ai.usage.output_tokens"] == 2
    for name in ("queue", "prefill", "decode", "group"):
        assert found[name].parent.span_id == router.context.span_id
        assert found[name].start_time <= found[name].end_time
    groups = [s for s in spans.exporter.get_finished_spans() if s.name == "group"]
    totals = {s.attributes["raymoe.group.id"]: dict(s.attributes) for s in groups}
    assert totals["g0"]["raymoe.group.answers"] == 1 and totals["g0"]["raymoe.group.pairs"] == 8
    assert totals["g1"]["raymoe.group.busy_s"] == 0.125


def test_a_router_logs_every_request_when_asked(log_lines: list[logging.LogRecord]) -> None:
    lived(None, lines=True)
    told = {record.fields["request_id"]: record for record in log_lines}  # type: ignore[attr-defined]
    assert told.keys() == {"client-a", "client-b"}
    assert told["client-a"].fields["messages"] == {"g0": 1, "g1": 1}  # type: ignore[attr-defined]
    assert told["client-a"].fields["trace_id"] == "1" * 32  # type: ignore[attr-defined]
    assert "cancelled" in told["client-b"].getMessage()


def test_the_gateways_span_is_the_clients_child_and_the_routers_parent() -> None:
    spans = Spans()
    headers = {"traceparent": PARENT, "x-request-id": "mine"}
    router, answer = ask(Watching(tracing=spans.tracing), headers)
    assert answer.status_code == 200
    span = spans.named()["POST /v1/completions"]
    assert f"{span.context.trace_id:032x}" == "1" * 32
    assert f"{span.parent.span_id:016x}" == "2" * 16
    assert span.attributes["raymoe.request_id"] == "mine"
    assert span.attributes["raymoe.tokens"] == 2 and span.attributes["raymoe.ended"] == "finished"
    (request,) = router.seen
    assert request.origin.request_id == "mine"
    assert request.origin.traceparent == f"00-{'1' * 32}-{span.context.span_id:016x}-01"


def test_a_trace_that_the_client_does_not_record_is_not_recorded() -> None:
    spans = Spans()
    router, _ = ask(Watching(tracing=spans.tracing), {"traceparent": PARENT[:-1] + "0"})
    assert not spans.named()
    assert router.seen[0].origin.traceparent == ""


def test_without_a_parent_or_with_a_malformed_one_a_trace_begins_here() -> None:
    spans = Spans()
    for headers in ({}, {"traceparent": "00-zz-1"}):
        ask(Watching(tracing=spans.tracing), headers)
    first, second = spans.exporter.get_finished_spans()
    assert first.parent is None and second.parent is None
    assert first.context.trace_id != second.context.trace_id


def test_a_request_is_logged_under_its_clients_id(log_lines: list[logging.LogRecord]) -> None:
    router, answer = ask(Watching(lines=True), {"x-request-id": "mine"}, stream=True)
    assert "[DONE]" in answer.text
    begins, ends = log_lines
    assert begins.fields["request_id"] == ends.fields["request_id"] == "mine"  # type: ignore[attr-defined]
    assert ends.fields["tokens"] == 2 and "finished" in ends.getMessage()  # type: ignore[attr-defined]
    assert router.seen[0].origin.request_id == "mine"


@pytest.mark.parametrize("given", ["", "x" * 300, "a\tb"])
def test_an_id_that_is_no_id_is_replaced_by_the_answers(given: str) -> None:
    router, answer = ask(Watching(), {"x-request-id": given})
    assert router.seen[0].origin.request_id == answer.json()["id"]


def test_it_is_off_unless_an_exporter_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", *tracing._ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    assert from_environment("router", "d") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    made = from_environment("router", "d")
    assert made is not None
    made.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert from_environment("router", "d") is None
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert from_environment("router", "d") is None
