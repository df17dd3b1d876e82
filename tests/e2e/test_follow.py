"""One request followed by its id through the logs, by its trace through the spans."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.collector import Collector
from tests.e2e.conftest import Deployment
from tests.e2e.inside import ray_metrics_port
from tests.e2e.traffic import wait_for

pytestmark = pytest.mark.ray
TRACE = "c" * 32


def logged(folder: Path) -> list[dict[str, Any]]:
    """All lines of all processes so far: each is one JSON object."""
    files = sorted(folder.glob("*.log"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_request_is_found_in_logs_and_spans(
    deployment: Deployment, log_folder: Path, collector: Collector
) -> None:
    body = {"model": "demo", "prompt": "Follow me", "max_tokens": 8, "ignore_eos": True}
    headers = {"content-type": "application/json", "x-request-id": "follow-me"}
    headers["traceparent"] = f"00-{TRACE}-{'d' * 16}-01"
    request = urllib.request.Request(
        deployment.url + "/v1/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["x-request-id"] == "follow-me"

    def lines() -> list[dict[str, Any]]:
        return [line for line in logged(log_folder) if line.get("request_id") == "follow-me"]

    assert wait_for(lambda: len(lines()) >= 3, 60), "it begins, ends, and was at a router"
    at_router = next(line for line in lines() if line["process"] == "router")
    assert at_router["epoch"] >= 1 and at_router["tokens"] == 8
    assert at_router["trace_id"] == TRACE
    assert sum(at_router["messages"].values()) >= 6 * 8, "one a layer and step at least"
    assert {line["process"] for line in lines()} == {"gateway", "router"}
    groups = {line["group"] for line in logged(log_folder) if line["process"] == "group"}
    assert groups >= at_router["messages"].keys()
    assert any(line["process"] == "controller" for line in logged(log_folder))

    wanted = {"POST /v1/completions", "router", "queue", "prefill", "decode", "group"}
    assert wait_for(lambda: {s.name for s in collector.of_trace(TRACE)} == wanted, 60)
    spans = {span.name: span for span in collector.of_trace(TRACE)}
    gateway, router = spans["POST /v1/completions"], spans["router"]
    assert gateway.parent_span_id.hex() == "d" * 16
    assert router.parent_span_id == gateway.span_id
    for name in ("queue", "prefill", "decode", "group"):
        assert spans[name].parent_span_id == router.span_id


def test_rays_agent_exports_our_metrics(deployment: Deployment) -> None:
    port = ray_metrics_port(deployment)

    def shown() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        wanted = ("group_up{", "generation_tokens_total{", "time_to_first_token_seconds_bucket{")
        return all(f"\nray_raymoe_{name}" in text for name in wanted)

    assert wait_for(shown, 90)
