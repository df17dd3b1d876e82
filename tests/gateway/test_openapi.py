"""Schemathesis against our own /openapi.json: no failure of ours, and answers as described."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from raymoe.gateway import AppConfig, create_app
from raymoe.gateway.admin import add_admin_routes
from tests.gateway.conftest import pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_described(mode: GenerationMode) -> None:
    """Bodies that fit the schema, and bodies that do not: these must be refused."""
    router = FakeRouter(lambda request: [70, 71], vocab=355, context_tokens=64)
    pool = pool_of([router])
    app = create_app(pool, tiny_tokenizer(), AppConfig(model_name="tiny", max_choices=8))
    schema = schemathesis.openapi.from_dict(app.openapi())
    found = [result.ok() for result in schema.get_all_operations()]
    cases = [one.as_strategy(generation_mode=mode) for one in found if one.body or mode.is_positive]
    statuses: Counter[int] = Counter()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with routers_of(router), asyncio.Runner() as runner:
        runner.run(pool.start())
        http = httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60)

        @seed(3)
        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(cases))
        def run(case: Any) -> None:
            sent = case.as_transport_kwargs(base_url="http://t")
            names = ("method", "url", "headers", "json", "data", "params")
            sent = {name: sent[name] for name in names if sent.get(name) is not None}
            sent["content"] = sent.pop("data", None)
            answer = runner.run(http.request(**sent))
            statuses[answer.status_code] += 1
            case.validate_response(answer, checks=CHECKS)

        run()
        runner.run(http.aclose())
        runner.run(pool.close())
    assert statuses[400] > 10


def test_every_reference_leads_somewhere() -> None:
    """Also with routes that others add."""
    app = create_app(pool_of([]), tiny_tokenizer(), AppConfig(model_name="tiny"))

    @app.get("/more/{number}")
    async def more(number: int) -> int:
        return number

    schema = app.openapi()
    text = json.dumps(schema)
    assert '"422"' not in text
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in schema["components"]["schemas"]


def test_the_operators_routes_tell_their_bodies_and_statuses() -> None:
    app = create_app(pool_of([]), tiny_tokenizer(), AppConfig(model_name="tiny"))
    add_admin_routes(app, None, "token")  # type: ignore[arg-type]
    schema = app.openapi()
    for path in ("/scale", "/drain", "/pin", "/evict", "/placement/dry-run"):
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schema["components"]["schemas"][body.rsplit("/", 1)[1]]["properties"]
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert schema["components"]["schemas"][answer.rsplit("/", 1)[1]]["properties"]
        assert {"400", "409", "415", "503"} <= operation["responses"].keys()
        assert ("401" in operation["responses"]) is (path != "/placement/dry-run")
