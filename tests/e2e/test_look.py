"""`raymoe status`, GET /placement, GET /metrics on a running deployment."""

from __future__ import annotations

import json
import urllib.request

import psutil
import pytest

from tests.e2e.conftest import Deployment, run_raymoe

pytestmark = pytest.mark.ray


def test_status_json(deployment: Deployment) -> None:
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
    assert "g0" in done.stdout and "ready" in done.stdout


def test_status_without_a_server_says_so() -> None:
    done = run_raymoe("status", "--port", "1")
    assert done.returncode == 2
    assert "no raymoe answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_placement_names_every_expert(deployment: Deployment) -> None:
    placement = deployment.get("/placement")
    assert len(placement["layers"]) == 6
    for layer in placement["layers"]:
        assert len(layer["experts"]) == 16
        for expert in layer["experts"]:
            homes = [replica["group"] for replica in expert["replicas"]]
            assert homes and set(homes) <= {"g0", "g1", "g2"} and len(set(homes)) == len(homes)
            assert abs(sum(replica["share"] for replica in expert["replicas"]) - 1) < 1e-5
            assert all(r["since"] > 0 and r["why"] for r in expert["replicas"])


def test_metrics(deployment: Deployment) -> None:
    with urllib.request.urlopen(deployment.url + "/metrics", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        text = answer.read().decode()
    assert "raymoe_" in text


def test_bytes_are_those_of_the_replicas(deployment: Deployment) -> None:
    """A router holds no expert: together the groups hold every expert's bytes, hot ones twice."""
    status = deployment.get("/status")
    expert_bytes = 4 * 3 * 256 * 128  # float32 gate, up and down projections
    total = sum(group["resident_bytes"] for group in status["groups"])
    assert total == expert_bytes * sum(group["replicas"] for group in status["groups"])
