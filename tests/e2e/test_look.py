"""`raymoe status`, GET /placement, GET /metrics on a running deployment."""

from __future__ import annotations

import json
import re
import urllib.request

import psutil
import pytest

from raymoe.observe.catalogue import CATALOGUE
from tests.e2e.conftest import Deployment, run_raymoe
from tests.e2e.traffic import Client, wait_for

pytestmark = pytest.mark.ray


def test_status_json(deployment: Deployment) -> None:
    # a controller that has just been restarted hears of the routers within a beat of each
    assert wait_for(lambda: len(deployment.get("/status")["routers"]) == 2, 60)
    done = run_raymoe("status", "--json", "--port", str(deployment.port))
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["epoch"] >= 1
    assert len(status["groups"]) == 3
    for group in status["groups"]:
        assert group["state"] == "ready"
        assert 0 < group["resident_bytes"] <= group["memory_bytes"]
        assert psutil.pid_exists(group["pid"])
    assert len(status["routers"]) == 2
    assert all(router["state"] == "ready" for router in status["routers"])
    assert psutil.pid_exists(status["controller"]["pid"])
    assert sum(group["replicas"] for group in status["groups"]) >= 6 * 16


def test_status_for_people(deployment: Deployment) -> None:
    done = run_raymoe("status", "--port", str(deployment.port))
    assert done.returncode == 0
    names = [group["id"] for group in deployment.get("/status")["groups"]]
    assert all(name in done.stdout for name in names) and "ready" in done.stdout


def test_status_without_a_server_says_so() -> None:
    done = run_raymoe("status", "--port", "1")
    assert done.returncode == 2
    assert "no raymoe answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_placement_names_every_expert(deployment: Deployment) -> None:
    groups = {group["id"] for group in deployment.get("/status")["groups"]}
    placement = deployment.get("/placement")
    assert len(placement["layers"]) == 6
    for layer in placement["layers"]:
        assert len(layer["experts"]) == 16
        for expert in layer["experts"]:
            homes = [replica["group"] for replica in expert["replicas"]]
            assert homes and set(homes) <= groups and len(set(homes)) == len(homes)
            assert abs(sum(replica["share"] for replica in expert["replicas"]) - 1) < 1e-5
            assert all(r["since"] > 0 and r["why"] for r in expert["replicas"])


def test_metrics_are_the_catalogues_and_counters_do_not_run_backwards(
    deployment: Deployment,
) -> None:
    def scrape(query: str = "") -> dict[str, float]:
        with urllib.request.urlopen(deployment.url + "/metrics" + query, timeout=10) as answer:
            assert answer.headers["content-type"].startswith("text/plain")
            lines = answer.read().decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def counters(values: dict[str, float]) -> dict[str, float]:
        ends = ("_total", "_bucket", "_count", "_sum")
        return {k: v for k, v in values.items() if k.partition("{")[0].endswith(ends)}

    before = scrape()
    Client(deployment).ask("Observe and be silent", 24)
    assert wait_for(lambda: 'raymoe_layer_balancedness{layer="5"}' in scrape(), 30)
    after = scrape("?experts=1")
    assert {k: v for k, v in counters(before).items() if after.get(k, 0.0) < v} == {}
    made = "raymoe_generation_tokens_total"
    assert after[made] - before[made] == 24
    for name in CATALOGUE:
        if not name.startswith("raymoe_plan"):  # there may have been no plan yet
            assert any(k.startswith(name) for k in after), name
    for k in after:
        whole = k.partition("{")[0]
        assert {whole, re.sub("_(bucket|sum|count)$", "", whole)} & CATALOGUE.keys(), k
    assert sum(k.startswith("raymoe_expert_replicas{") for k in after) == 6 * 16


def test_the_page_its_events_and_the_terminal(deployment: Deployment) -> None:
    with urllib.request.urlopen(deployment.url + "/ui", timeout=10) as answer:
        assert b"raymoe" in answer.read()
    with urllib.request.urlopen(deployment.url + "/ui/events?layer=4", timeout=30) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        first = json.loads(events.readline().removeprefix(b"data: "))
        assert first["full"] and first["layer"]["index"] == 4
        assert len(first["layer"]["load"]) == 16 and first["layer_count"] == 6
        assert any("ready" in event["text"] for event in first["events"])
        events.readline()
        assert not json.loads(events.readline().removeprefix(b"data: "))["full"]
    port = str(deployment.port)
    top = run_raymoe("top", "--once", "--layer", "4", "--port", port)
    assert top.returncode == 0 and "layer 4 of 6" in top.stdout, top.stderr
    told = run_raymoe("explain", "4", "7", "--port", port)
    assert told.returncode == 0 and "of its pairs, since" in told.stdout, told.stderr


def test_bytes_are_those_of_the_replicas(deployment: Deployment) -> None:
    """A router holds no expert: together the groups hold every expert's bytes, hot ones twice.

    While the controller moves some, bytes and replicas are not of one moment: it is asked again.
    """
    numbers = 3 * 256 * 128  # of gate, up and down projections

    def agree() -> bool:
        # 2 bytes each as they are stored, where a group's kernel keeps them so; else float32
        return all(
            group["resident_bytes"]
            in (2 * numbers * group["replicas"], 4 * numbers * group["replicas"])
            for group in deployment.get("/status")["groups"]
        )

    assert wait_for(agree, 60), deployment.get("/status")["groups"]
